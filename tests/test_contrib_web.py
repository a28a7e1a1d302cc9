"""What all web services share: responses to errors, and refunds that no disconnect cancels."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import anyio
import pytest

from lianlian_async import LianLianError, Refund, errors
from lianlian_async.clock import Moment
from lianlian_async.codes import CODES, CodeClass
from lianlian_async.contrib.web import apply_shielded, respond
from lianlian_async.errors import (
    AnswerMismatch,
    BatchStopped,
    ConfigurationError,
    GatewayUnavailable,
    InvalidRequest,
    JournalError,
    MalformedMessage,
    Problem,
    QueryRejected,
    RefundConflict,
    RefundNotFinal,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    SignatureInvalid,
)
from lianlian_async.journal import MemoryJournal
from lianlian_async.sandbox import Fault, Repeated
from tests.support.parties import EPOCH, boot_clock, refund_request, sandbox

NOW = EPOCH

MADE = Refund(no_refund="R-1", sta_refund="0", money_refund=Decimal("10.00"))


def rejected(code, kind=RefundRejected):
    return kind(code, "余额不足", verified=True, no_refund="R-1")


def unknown(seconds):
    return RefundOutcomeUnknown(
        request=refund_request(),
        oid_partner="201103171000000000",
        apply_url="https://gateway.example/apply",
        body=b"{}",
        attempts=1,
        queries=2,
        moment=Moment(NOW, 7.5, "this boot"),
        ask_again_at=NOW + timedelta(seconds=seconds),
        last_error="connection to 10.1.2.3 lost",
    )


def failed(said):
    error = JournalError("/srv/refunds.sqlite: disk full")
    error.said = said
    return error


RESPONSES = [
    (InvalidRequest([Problem("money_refund", "must be digits", "'x'")]), 422),
    (RefundConflict("R-1", field="money_refund", ours="1.00", theirs="2.00"), 409),
    (rejected("5003"), 422),
    (rejected("5006"), 402),
    (rejected("1014"), 402),
    (rejected("1008"), 500),
    (rejected("3005", QueryRejected), 502),
    (rejected("3010", QueryRejected), 500),
    (RefundNotFound(no_refund="R-1", oid_refundno=None, ret_code="8901", ret_msg="没有记录", verified=True), 404),
    (unknown(900), 202),
    (RefundNotFinal(MADE, last_error=None), 202),
    (RefundNotSent("R-1", attempts=3, last_error="10.1.2.3 refused"), 503),
    (GatewayUnavailable("no answer of 10.1.2.3", attempts=4, last_error="timeout", ret_code=None), 503),
    (SignatureInvalid("no valid signature"), 502),
    (AnswerMismatch("no_refund", asked="R-1", answered=None), 502),
    (MalformedMessage("not JSON"), 502),
    (failed(None), 503),
    (failed(MADE), 202),
    (failed(rejected("5003")), 422),
    (failed(unknown(900)), 202),
    (BatchStopped(rejected("5006")), 402),
    (BatchStopped(SignatureInvalid("no valid signature")), 502),
    (ConfigurationError("private key: /srv/key.pem is not a key"), 500),
    (LianLianError("something in /srv"), 500),
]


@pytest.mark.parametrize(("error", "status"), RESPONSES, ids=[f"{type(e).__name__}-{s}" for e, s in RESPONSES])
def test_every_error_has_an_honest_status(error, status):
    """The body is JSON; it never shows a host, a file or the records of the service."""
    given, headers, body = respond(error, NOW)
    assert given == status
    assert ("Retry-After" in headers) == ("ask_again_at" in body)
    text = json.dumps(body)
    assert not any(secret in text for secret in ("10.1.2.3", "/srv", "2.00"))


def test_every_error_of_the_tree_has_a_response_here():
    """A new error class must be added above."""
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LianLianError)}
    assert {type(error) for error, _ in RESPONSES} == {each for each in classes if not each.__name__.startswith("_")}


@pytest.mark.parametrize("code", [code for code, row in CODES.items() if row.kind is CodeClass.REJECTED])
def test_every_rejection_of_this_refund_shows_its_code(code):
    """402: may pass; 422: this refund is refused; 500: the service's configuration, which is not shown."""
    status, _, body = respond(rejected(code), NOW)
    row = CODES[code]
    assert status == (500 if row.is_configuration else 402 if row.may_pass else 422)
    assert (body["error"], body["no_refund"]) == ("RefundRejected", "R-1")
    shown = {"ret_code": code, "ret_msg": "余额不足", "meaning": row.meaning}
    assert body.items() >= shown.items() if status != 500 else not body.keys() & shown.keys()


@pytest.mark.parametrize(("seconds", "retry_after"), [(900, "900"), (0.2, "1"), (0, "0"), (-5, "0")])
def test_an_unknown_refund_says_when_to_ask(seconds, retry_after):
    """``Retry-After`` is never earlier than ``ask_again_at``, and never negative."""
    _, headers, body = respond(unknown(seconds), NOW)
    assert headers == {"Retry-After": retry_after}
    assert body["ask_again_at"] == (NOW + timedelta(seconds=seconds)).isoformat()
    assert body["no_refund"] == "R-1"


def test_details_of_the_other_errors():
    """The client learns which fields are invalid, which one conflicts, and that a refund was made."""
    assert respond(RESPONSES[0][0], NOW)[2] == {
        "error": "InvalidRequest",
        "detail": "a field is invalid; nothing was sent",
        "problems": [{"field": "money_refund", "rule": "must be digits"}],
    }
    assert respond(RESPONSES[1][0], NOW)[2]["field"] == "money_refund"
    for error in (RefundNotFinal(MADE, last_error=None), failed(MADE)):
        body = respond(error, NOW)[2]
        assert (body["no_refund"], body["sta_refund"]) == ("R-1", "0")
        assert "was made" in body["detail"]
    assert "was not sent" not in respond(failed(None), NOW)[2]["detail"]  # by an earlier request, perhaps
    for code in ("3005", "3010"):  # apply_and_wait may raise it about a refund that was made
        assert "says nothing about the refund" in respond(rejected(code, QueryRejected), NOW)[2]["detail"]
    decided = RefundRejected("decided", "", verified=False, no_refund="R-1", evidence="mail")
    assert "LianLian" not in respond(decided, NOW)[2]["detail"]


def test_problems_of_the_service_are_logged(caplog):
    """The client sees no detail of a 5xx, so the log has the message; refusals of a request are not logged."""
    assert respond(ConfigurationError("private key: /srv/key.pem is not a key"))[0] == 500
    assert respond(rejected("5003"))[0] == 422
    assert caplog.messages == ["HTTP status 500: ConfigurationError: private key: /srv/key.pem is not a key"]


# ── a caller that is cancelled ───────────────────────────────────────────────────────────────────


@pytest.mark.anyio
@pytest.mark.virtual_time
@pytest.mark.parametrize("has_journal", [True, False])
async def test_a_cancelled_caller_leaves_a_complete_refund(has_journal):
    """The refund is made once, and ``on_outcome`` gets its outcome; with a journal, a repeated request gets it, too."""
    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal("100000000.00"))
    gateway.script(Fault.DELAY, delay=5)
    told = []
    journal = MemoryJournal() if has_journal else None
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(1) as caller:
            await apply_shielded(session, refund_request(), told.append)
        assert caller.cancelled_caught
        assert [refund.no_refund for refund in told] == ["R-1"]
        if has_journal:
            assert await apply_shielded(session, refund_request(), told.append) == told[0]
    assert (len(told), gateway.times_made("R-1")) == (1, 1)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_another_request_joins_the_refund_of_a_cancelled_caller():
    """While the refund continues, a repeated request gets its outcome without a second application."""
    gateway, told = sandbox(repeated=Repeated.AGAIN, default_order=Decimal("100000000.00")), []
    gateway.script(Fault.DELAY, delay=5)

    async def leave():
        with anyio.move_on_after(1):
            await apply_shielded(session, refund_request(), told.append)

    async with gateway.session(clock=boot_clock) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        await anyio.sleep(2)
        refund = await apply_shielded(session, refund_request())
    assert told == [refund]
    assert gateway.requests == {"apply": 1}


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_cancelled_caller_leaves_its_error(caplog):
    """``on_outcome`` gets the error of a refund; without it, the error is logged. An uncancelled call raises it."""
    gateway, told = sandbox(default_order=None), []
    gateway.script(Fault.DELAY, delay=5, times=2)
    async with gateway.session(clock=boot_clock) as session:
        for arguments in ((told.append,), ()):
            with anyio.move_on_after(1):
                await apply_shielded(session, refund_request(), *arguments)
        with pytest.raises(RefundRejected):
            await apply_shielded(session, refund_request())
    (error,) = told
    assert (type(error), error.ret_code) == (RefundRejected, "5002")
    assert [text for text in caplog.messages if "cancelled" in text] == [
        f"the caller of a refund was cancelled; the refund's outcome: {error}"
    ]


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_an_outcome_that_cannot_be_stored_is_logged(caplog):
    """If ``on_outcome`` fails, the caller is cancelled nevertheless, and the log has the outcome."""
    gateway = sandbox()
    gateway.script(Fault.DELAY, delay=5)

    def store(_outcome):
        raise OSError("disk full")

    async with gateway.session(clock=boot_clock) as session:
        with anyio.move_on_after(1) as caller:
            await apply_shielded(session, refund_request(), store)
    assert caller.cancelled_caught
    [message] = [
        text for text in caplog.messages if text.startswith("on_outcome failed; the refund's outcome: Refund(")
    ]
    assert "no_refund='R-1'" in message


@pytest.mark.anyio
async def test_an_async_on_outcome_is_refused():
    """Nobody would await it, and the outcome would be lost. Nothing is sent."""

    async def store(outcome):
        raise AssertionError(outcome)

    gateway = sandbox()
    async with gateway.session() as session:
        with pytest.raises(ConfigurationError, match="on_outcome: must be a function, and not async"):
            await apply_shielded(session, refund_request(), store)
    assert gateway.requests == {}
