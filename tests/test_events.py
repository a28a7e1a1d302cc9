"""Events and the log: what a session and an endpoint report, and that a listener never affects a refund."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial

import anyio
import attrs
import httpx
import pytest

from lianlian_async import (
    ConfigurationError,
    Endpoints,
    NotificationEndpoint,
    RefundConflict,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRejected,
    RefundRequest,
    RefundSession,
    RetryPolicy,
    events,
)
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.journal import MemoryJournal
from lianlian_async.logs import Listeners
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway, When
from tests.support.notices import HEADERS, Handler, notification
from tests.support.parties import OID_PARTNER, boot_clock, refund_request, sandbox, unused_port
from tests.support.readme import run_example

pytestmark = pytest.mark.anyio

POLICY = RetryPolicy(attempts=2, initial=0.001, maximum=0.002, not_found_grace=0)


def word(event):
    """Return what happened, in one or a few words; None for the begin of a request."""
    match event:
        case events.CallBegan(call=call):
            return call
        case events.Paused(cause=cause):
            return cause
        case events.Leased(standing=standing):
            return f"lease {standing}"
        case events.AttemptEnded():
            return f"{event.request} {event.attempt} {event.finding}"
        case events.CallEnded(outcome=outcome):
            return outcome
    return None


class Recorder(list):
    """A listener that records its events."""

    def __call__(self, event):
        self.append(event)

    @property
    def words(self):
        return [told for event in self if (told := word(event)) is not None]

    def only(self, kind):
        return [event for event in self if isinstance(event, kind)]


def request(number=1, **changes):
    fields = {"no_refund": f"R-{number}", "dt_refund": datetime.now(UTC), "money_refund": "10.00"}
    return RefundRequest(**fields | {"no_order": f"O-{number}", "notify_url": "https://shop.example/refund"} | changes)


# ── every outcome, on every backend ──────────────────────────────────────────────────────────────


def poor(gateway):
    gateway.add_order("O-1", Decimal("5.00"))


def faults(*scripted):
    def script(gateway):
        for fault, call, options in scripted:
            gateway.script(fault, call=call, **options)

    return script


LOST = (Fault.HTTP_500, "apply", {})
NEVER_MADE = (Fault.HTTP_500, "apply", {"when": When.BEFORE})
OUTCOMES = {
    "made": (faults(), ["apply 1 FOUND", "made"]),
    "rejected": (poor, ["apply 1 REJECTED", "RefundRejected"]),
    "in progress": (
        faults((Fault.BUSY, "apply", {"ret_code": "2005"})),
        ["apply 1 EXISTS", "query 1 FOUND", "made"],
    ),
    "answer lost": (faults(LOST), ["apply 1 UNCERTAIN", "query 1 FOUND", "made"]),
    "wrong signature": (
        faults((Fault.WRONG_SIGNATURE, "apply", {})),
        ["apply 1 UNCERTAIN", "query 1 FOUND", "made"],
    ),
    "connection reset": (faults((Fault.RESET, "apply", {})), ["apply 1 UNCERTAIN", "query 1 FOUND", "made"]),
    "query busy": (
        faults(LOST, (Fault.BUSY, "query", {})),
        ["apply 1 UNCERTAIN", "query 1 UNCERTAIN", "backoff", "query 2 FOUND", "made"],
    ),
    "sent again": (faults(NEVER_MADE), ["apply 1 UNCERTAIN", "query 1 NOT_FOUND", "apply 2 FOUND", "made"]),
    "rejected after a resend": (
        lambda gateway: (poor(gateway), faults(NEVER_MADE)(gateway)),
        ["apply 1 UNCERTAIN", "query 1 NOT_FOUND", "apply 2 REJECTED", "query 2 NOT_FOUND", "RefundRejected"],
    ),
    "unknown": (
        faults(LOST, (Fault.BUSY, "query", {"ret_code": "3005"})),
        ["apply 1 UNCERTAIN", "query 1 REJECTED", "RefundOutcomeUnknown"],
    ),
}


@pytest.fixture(params=["in process", "httpx", "aiohttp"])
def backend(request, anyio_backend):
    """Return the options of a session for each backend, and the base URL of the gateway for a server."""
    if request.param == "aiohttp" and anyio_backend[0] == "trio":
        pytest.skip("aiohttp runs on asyncio only")

    @contextmanager
    def connected(gateway):
        if request.param == "in process":
            yield "httpx", {"transport": httpx.ASGITransport(app=gateway), "merchant": gateway.merchant()}
            return
        with serving(gateway) as base_url:
            yield request.param, {"http_backend": request.param, "merchant": gateway.merchant(base_url)}

    return connected


@pytest.mark.parametrize("case", OUTCOMES)
async def test_each_outcome_reports_the_same_sequence_on_every_backend(case, backend):
    """Every row of the decision table reports its requests, pauses and outcome in order."""
    prepare, expected = OUTCOMES[case]
    gateway, listener = SandboxGateway(default_order=Decimal("10.00")), Recorder()
    prepare(gateway)
    with backend(gateway) as (name, options):
        async with RefundSession(**options, retry=POLICY, listeners=[listener]) as session:
            outcome = await session.outcome_of(request())
    assert listener.words == ["apply_refund", *expected]
    assert {(event.no_refund, event.backend) for event in listener} == {("R-1", name)}
    ended = listener[-1]
    assert (ended.attempts, ended.queries) == (outcome.attempts, outcome.queries)
    assert ended.error == (None if outcome.error is None else str(outcome.error))
    assert ended.sta_refund == (outcome.refund and outcome.refund.sta_refund)
    assert ended.reason == getattr(outcome.error, "reason", None)
    assert all(event.seconds >= 0 for event in listener.only(events.AttemptEnded | events.CallEnded))


async def test_a_conflict_is_reported(backend):
    """The gateway has another refund under the number."""
    gateway, listener = SandboxGateway(default_order=Decimal("10.00"), repeated=Repeated.REPLAY), Recorder()
    with backend(gateway) as (_, options):
        async with RefundSession(**options) as session:
            await session.apply_refund(request(money_refund="5.00"))
        async with RefundSession(**options, listeners=[listener]) as session:
            with pytest.raises(RefundConflict):
                await session.apply_refund(request())
    assert listener.words == ["apply_refund", "apply 1 CONFLICT", "RefundConflict"]


@pytest.mark.parametrize("http_backend", ["httpx", "aiohttp"])
async def test_a_refund_that_is_not_sent_is_reported(http_backend):
    """Both attempts to connect are reported, with the pause between them; there is no HTTP status."""
    listener, gateway = Recorder(), SandboxGateway()
    merchant = gateway.merchant(f"http://127.0.0.1:{unused_port()}")
    async with RefundSession(merchant, http_backend=http_backend, retry=POLICY, listeners=[listener]) as session:
        with pytest.raises(RefundNotSent):
            await session.apply_refund(request())
    assert listener.words == ["apply_refund", "apply 1 NOT_SENT", "backoff", "apply 2 NOT_SENT", "RefundNotSent"]
    assert {event.http_status for event in listener.only(events.AttemptEnded)} == {None}


async def test_an_attempt_reports_code_status_and_url_without_its_query_string():
    """The begin has the URL without its query string; the end has ``ret_code`` and the HTTP status."""
    gateway, listener = SandboxGateway(default_order=Decimal("10.00")), Recorder()
    gateway.script(Fault.BAD_GATEWAY, call="apply")
    merchant = gateway.merchant("https://gateway.invalid")
    merchant = attrs.evolve(
        merchant, endpoints=Endpoints(merchant.endpoints.apply + "?token=1", merchant.endpoints.query)
    )
    async with RefundSession(merchant, transport=httpx.ASGITransport(app=gateway), listeners=[listener]) as session:
        await session.apply_refund(request())
    assert [event.url for event in listener.only(events.AttemptBegan)] == [
        "https://gateway.invalid/exchangerefund.htm",
        "https://gateway.invalid/refundquery.htm",
    ]
    ended = [(event.http_status, event.ret_code) for event in listener.only(events.AttemptEnded)]
    assert ended == [(502, None), (200, "0000")]


@pytest.mark.virtual_time
async def test_query_refund_is_a_call_with_queries():
    """A query of the caller reports its attempts, and ``found`` or the error."""
    gateway, listener = sandbox(), Recorder()
    async with gateway.session(clock=boot_clock, listeners=[listener]) as session:
        made = await session.apply_refund(refund_request())
        listener.clear()
        gateway.script(Fault.BUSY, call="query")
        await session.query_refund(made.query())
        with pytest.raises(Exception, match="no record"):
            await session.query_refund(RefundQuery(no_refund="R-2", dt_refund=boot_clock().wall))
        await session.query_refund(RefundQuery(oid_refundno=made.oid_refundno, dt_refund=boot_clock().wall))
    first, second, third = "query_refund", "query_refund", "query_refund"
    assert listener.words == [
        *(first, "query 1 UNCERTAIN", "backoff", "query 2 FOUND", "found"),
        *(second, "query 1 NOT_FOUND", "RefundNotFound"),
        *(third, "query 1 FOUND", "found"),
    ]
    assert [event.no_refund for event in listener if word(event) == "backoff"] == ["R-1"]
    assert all(0 <= event.seconds < 60 for event in listener.only(events.AttemptEnded))
    assert listener[-1].no_refund is None
    assert [event.queries for event in listener.only(events.CallEnded)] == [2, 1, 1]


# ── waits, leases, shared refunds ────────────────────────────────────────────────────────────────


@pytest.mark.virtual_time
async def test_followers_of_one_refund_each_get_their_outcome():
    """Three concurrent calls make one refund: each reports its begin and end, the first one also the request."""
    gateway, listener = sandbox(), Recorder()
    async with gateway.session(listeners=[listener]) as session, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(session.apply_refund, refund_request())
    assert listener.words == [*["apply_refund"] * 3, "apply 1 FOUND", *["made"] * 3]
    assert sorted(event.attempts for event in listener.only(events.CallEnded)) == [0, 0, 1]


@pytest.mark.virtual_time
async def test_a_cancelled_call_reports_its_end():
    """The request that was under way ends as UNCERTAIN, the call as cancelled."""
    gateway, listener = sandbox(), Recorder()
    gateway.script(Fault.NO_ANSWER, call="apply")
    async with gateway.session(listeners=[listener]) as session:
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())
    assert sorted(listener.words) == ["apply 1 UNCERTAIN", "apply_refund", "cancelled"]


@pytest.mark.virtual_time
async def test_a_call_that_waits_for_a_slot_reports_a_pause():
    """Only the call that finds no free connection slot reports the pause."""
    gateway, listener = sandbox(), Recorder()
    async with gateway.session(listeners=[listener], max_connections=1) as session, anyio.create_task_group() as tasks:
        for number in (1, 2):
            tasks.start_soon(session.apply_refund, refund_request(number))
    (pause,) = listener.only(events.Paused)
    assert (pause.cause, pause.seconds) == ("slot", None)


@pytest.mark.virtual_time
async def test_the_journal_reports_the_lease():
    """A call that meets the lease of another worker reports that, pauses, and then what the journal knows."""
    gateway, first, second = sandbox(), Recorder(), Recorder()
    gateway.script(Fault.DELAY, call="apply", delay=0.04)
    async with MemoryJournal() as journal:
        options = {"journal": journal, "clock": boot_clock}
        async with (
            gateway.session(**options, listeners=[first]) as one,
            gateway.session(**options, listeners=[second]) as other,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(one.apply_refund, refund_request())
            await anyio.sleep(0.01)
            await other.apply_refund(refund_request())
    assert first.words == ["apply_refund", "lease new", "apply 1 FOUND", "made"]
    assert second.words == ["apply_refund", "lease leased", "lease", "lease finished", "made"]
    assert {event.no_refund for event in (*first, *second)} == {"R-1"}
    assert all(0 <= event.seconds < 60 for event in (*first, *second) if isinstance(event, events.Leased))


# ── listeners that return context managers, fail, block, add headers ─────────────────────────────


@pytest.mark.virtual_time
async def test_a_context_manager_is_entered_for_the_time_of_its_span():
    """Requests and pauses are inside their call; the event about the end arrives inside of its own span."""
    gateway, path = sandbox(), []
    gateway.script(Fault.HTTP_500, call="apply")
    gateway.script(Fault.BUSY, call="query")

    @contextmanager
    def listener(event):
        name = type(event).__name__
        path.append(f"<{name}")
        yield
        path.append(f"{name}>")

    async with gateway.session(listeners=[listener]) as session:
        await session.apply_refund(refund_request())
    request_ = ["<AttemptBegan", "<AttemptEnded", "AttemptEnded>", "AttemptBegan>"]
    pause, end = ["<Paused", "Paused>"], ["<CallEnded", "CallEnded>"]
    assert path == ["<CallBegan", *request_, *request_, *pause, *request_, *end, "CallBegan>"]


class Swallowing:
    """A context manager that tries to suppress every exception."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return True


@pytest.mark.virtual_time
async def test_a_listener_cannot_suppress_the_error_of_a_refund():
    """The call raises its error, whatever a listener's context manager returns."""
    gateway = sandbox()
    poor(gateway)
    async with gateway.session(listeners=[lambda event: Swallowing()]) as session:
        with pytest.raises(RefundRejected):
            await session.apply_refund(refund_request())


class Failing:
    """A context manager that raises at its entry, at its exit, or nowhere."""

    def __init__(self, where, error):
        self.where = where
        self.error = error

    def __enter__(self):
        if self.where == "enter":
            raise self.error

    def __exit__(self, *error):
        if self.where == "exit":
            raise self.error


@pytest.mark.virtual_time
@pytest.mark.parametrize("error", [ValueError("mine"), asyncio.CancelledError("mine")], ids=repr)
@pytest.mark.parametrize("where", ["call", "enter", "exit"])
async def test_a_failing_listener_is_logged_once_and_affects_nothing(where, error, caplog):
    """The refund is made, the other listener hears everything, and the log has one traceback."""
    gateway, healthy = sandbox(), Recorder()

    def failing(event):
        if where == "call":
            raise error
        return Failing(where, error)

    async with gateway.session(listeners=[failing, healthy]) as session:
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert healthy.words == ["apply_refund", "apply 1 FOUND", "made"]
    (record,) = [record for record in caplog.records if "failed" in record.getMessage()]
    assert "failing failed" in record.getMessage()
    assert "Error: mine" in logging.Formatter().format(record)
    assert "sign" not in logging.Formatter().format(record)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_listener_can_end_the_program(error):
    """These two are no failures."""

    def ending(_event):
        raise error

    with pytest.raises(error):
        Listeners([ending]).tell(events.Notified, no_refund="R-1", verdict="malformed", seconds=0.0)


@pytest.mark.virtual_time
async def test_a_blocking_listener_is_warned_about_once(caplog):
    """A listener that takes more than 10 ms for an event blocks the event loop; the log says so once."""

    class Blocking:
        def __call__(self, event):
            time.sleep(0.011)

    async with sandbox().session(listeners=[Blocking()]) as session:
        await session.apply_refund(refund_request())
    (record,) = [record for record in caplog.records if "blocked" in record.getMessage()]
    assert record.getMessage().startswith("listener ")
    assert record.levelno == logging.WARNING


class AsyncListener:
    """A listener whose calls nobody would await."""

    async def __call__(self, event):
        raise AssertionError(event)


@pytest.mark.parametrize("wrong", ["print", anyio.sleep, partial(anyio.sleep, 0), AsyncListener()])
async def test_a_listener_must_be_a_plain_function(wrong, merchant):
    """Anything else is refused when the session or the endpoint is made."""
    for make in (RefundSession, lambda merchant, **options: NotificationEndpoint(merchant, Handler(), **options)):
        with pytest.raises(ConfigurationError, match="listeners: must be a function, and not async"):
            make(merchant, listeners=[wrong])


async def test_headers_of_a_listener_are_sent_with_every_request(backend):
    """Each request has the headers that a listener added to its event."""
    gateway, seen = SandboxGateway(default_order=Decimal("10.00")), []
    gateway.script(Fault.HTTP_500, call="apply")

    async def watched(scope, receive, send):
        seen.append([value for name, value in scope["headers"] if name == b"x-request"])
        await gateway(scope, receive, send)

    def listener(event):
        if isinstance(event, events.AttemptBegan):
            event.headers["X-Request"] = f"{event.request} {event.attempt}"

    watched.merchant = gateway.merchant
    with backend(watched) as (_, options):
        async with RefundSession(**options, listeners=[listener], retry=POLICY) as session:
            await session.apply_refund(request())
    assert seen == [[b"apply 1"], [b"query 1"]]


# ── notifications ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.virtual_time
@pytest.mark.parametrize("own", [True, False])
async def test_notifications_and_handler_calls_are_reported(own, caplog):
    """To the endpoint's own listeners, else to its session's; without a session, ``backend`` is empty."""
    caplog.set_level(logging.DEBUG, "lianlian_async")
    gateway, listener, handler = sandbox(), Recorder(), Handler()
    async with gateway.session(clock=boot_clock, listeners=[] if own else [listener]) as session:
        options = {"listeners": [listener]} if own else {"session": session}
        endpoint = NotificationEndpoint(
            session.merchant, handler, clock=boot_clock, allow_from=["10.0.0.0/8"], **options
        )
        for body, client in ((notification(), "10.0.0.1"), (b"{}", "10.0.0.1"), (b"", "11.0.0.1")):
            await endpoint.handle(body, HEADERS, client=client)

        async def failing():
            raise ValueError("mine")

        handler.then.append(failing)
        await endpoint.handle(notification(2), HEADERS, client="10.0.0.1")
    told = [(event.no_refund, getattr(event, "verdict", None), getattr(event, "succeeded", None)) for event in listener]
    assert told == [
        ("R-1", None, True),
        ("R-1", "acted", None),
        (None, "unverified", None),
        (None, "not admitted", None),
        ("R-2", None, False),
        ("R-2", "failed", None),
    ]
    assert {event.backend for event in listener} == {"" if own else "httpx"}
    assert all(0 <= event.seconds < 60 for event in listener)
    logged = [record for record in caplog.records if record.getMessage().startswith("Notified no_refund=R-1")]
    assert len(logged) == 1


# ── the log ──────────────────────────────────────────────────────────────────────────────────────


def lines(caplog):
    return [(record.levelname, record.event_name, record.getMessage()) for record in caplog.records]


@pytest.mark.virtual_time
async def test_the_outcome_of_each_refund_is_one_line(caplog):
    """INFO for a refund that was made, WARNING for another outcome; nothing for requests, pauses and queries."""
    caplog.set_level(logging.INFO, "lianlian_async")
    gateway = sandbox()
    gateway.script(Fault.HTTP_500, no_refund="R-3", call="apply")
    gateway.script(Fault.BUSY, no_refund="R-3", call="query", ret_code="3005")
    gateway.add_order("O-2", Decimal("5.00"))
    async with gateway.session(clock=boot_clock) as session:
        made = await session.apply_refund(refund_request(1))
        await session.query_refund(made.query())
        rejected = await session.outcome_of(refund_request(2))
        unknown = await session.outcome_of(refund_request(3))
        with pytest.raises(RefundConflict) as conflict:
            await session.apply_refund(refund_request(1, money_refund="5.00"))
    assert isinstance(unknown.error, RefundOutcomeUnknown)
    levels = [(level, text) for level, _, text in lines(caplog)]
    assert levels[1:] == [
        ("WARNING", str(rejected.error)),
        ("WARNING", str(unknown.error)),
        ("WARNING", str(conflict.value)),
    ]
    record = caplog.records[0]
    assert record.getMessage().startswith("CallEnded no_refund=R-1 backend=httpx call=apply_refund outcome=made")
    assert (record.levelname, record.outcome, record.no_refund, record.attempts) == ("INFO", "made", "R-1", 1)


@pytest.mark.virtual_time
async def test_requests_are_logged_at_debug(caplog):
    """DEBUG shows one line for each request, pause, and query call."""
    caplog.set_level(logging.DEBUG, "lianlian_async")
    gateway = sandbox()
    gateway.script(Fault.HTTP_500, call="apply")
    gateway.script(Fault.BUSY, call="query")
    async with gateway.session() as session:
        await session.apply_refund(refund_request())
    names = [(level, name) for level, name, _ in lines(caplog)]
    attempt = ("DEBUG", "AttemptEnded")
    assert names == [attempt, attempt, ("DEBUG", "Paused"), attempt, ("INFO", "CallEnded")]
    assert "finding=UNCERTAIN http_status=500" in lines(caplog)[0][2]


PROGRAM = """
import anyio, datetime
from lianlian_async import Merchant, RefundRequest, RefundSession

async def main():
    async with RefundSession(Merchant.from_env()) as session:
        await session.apply_refund(RefundRequest(
            no_refund="R-1", dt_refund=datetime.datetime.now(datetime.UTC), money_refund="1.00", no_order="O-1"))

anyio.run(main)
"""


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("", []), ("info", ["CallEnded"]), ("debug", ["AttemptEnded", "CallEnded"])],
)
def test_the_environment_shows_the_log(wanted, expected):
    """``LIANLIAN_LOG`` sets level and handler; without it, a refund that is made writes nothing."""
    gateway = SandboxGateway(default_order=Decimal("10.00"))
    with serving(gateway) as base_url:
        variables = os.environ | environment(gateway, base_url) | {"LIANLIAN_LOG": wanted}
        ran = subprocess.run(
            [sys.executable, "-W", "error", "-c", PROGRAM], env=variables, capture_output=True, text=True, timeout=60
        )
    assert ran.returncode == 0
    assert [line.partition("lianlian_async: ")[2].split()[0] for line in ran.stderr.splitlines()] == expected


def test_sessions_share_the_handler_of_the_environment(monkeypatch, merchant):
    """A second session does not write each line twice."""
    logger = logging.getLogger("lianlian_async")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setenv("LIANLIAN_LOG", "info")
    try:
        for _ in range(2):
            RefundSession(merchant)
        assert (logger.level, len(logger.handlers)) == (logging.INFO, 1)
    finally:
        logger.setLevel(logging.NOTSET)


def test_an_unknown_log_level_is_refused(monkeypatch, merchant):
    """The error names the variable and its values."""
    monkeypatch.setenv("LIANLIAN_LOG", "all")
    with pytest.raises(ConfigurationError, match="LIANLIAN_LOG: must be debug or info, is 'all'"):
        RefundSession(merchant)


@pytest.mark.parametrize("formatter", ["json_formatter", "structlog_formatter"])
async def test_the_recipes_write_json_lines(formatter, capsys, monkeypatch):
    """Each line is a JSON object with level, text and the fields of the event."""
    monkeypatch.setattr(logging.getLogger("lianlian_async"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("lianlian_async"), "level", logging.WARNING)
    recipe = run_example("logs")
    recipe["set_up"](recipe[formatter])
    async with SandboxGateway(default_order=Decimal("10.00")).session() as session:
        await session.apply_refund(request())
    logging.getLogger("lianlian_async").setLevel(logging.NOTSET)
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert told.get("levelname", str(told.get("level")).upper()) == "INFO"
    assert told.get("message", told.get("event")).startswith("CallEnded no_refund=R-1")
    assert (told["event_name"], told["outcome"], told["attempts"]) == ("CallEnded", "made", 1)


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.virtual_time
async def test_no_event_and_no_log_line_has_a_key_or_a_body(caplog):
    """Neither keys nor the bytes of a request, an answer or a signature appear, whatever happens."""
    caplog.set_level(logging.DEBUG, "lianlian_async")
    gateway, listener, bodies = sandbox(), Recorder(), []
    poor(gateway)

    async def watching(exchange, call_next):
        bodies.append(exchange.body.decode())
        return await call_next(exchange)

    for fault in Fault:
        gateway.script(fault, call="apply", no_refund=f"R-{fault.name}")
    async with gateway.session(clock=boot_clock, listeners=[listener], middleware=[watching]) as session:
        for number in (1, *(fault.name for fault in Fault)):
            await session.outcome_of(refund_request(number))
    text = repr(list(listener)) + repr([vars(record) for record in caplog.records])
    text += "".join(logging.Formatter().format(record) for record in caplog.records)
    keys = [line for line in gateway.merchant_key.to_pem().splitlines() if "-----" not in line]
    signatures = [json.loads(body)["sign"] for body in bodies]
    assert len(bodies) > len(Fault)
    assert [secret for secret in (*keys, *signatures, *bodies) if secret in text] == []
    assert '"oid_partner"' not in text
    assert OID_PARTNER not in repr(list(listener))
