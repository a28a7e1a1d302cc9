"""The session: thousands of concurrent calls, opening and closing, threads, and invalid arguments."""

from __future__ import annotations

import gc
import logging
import os
import re
import threading
from base64 import b64decode
from decimal import Decimal
from enum import Enum
from typing import ClassVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx
import pytest

from lianlian_async import (
    AnswerMismatch,
    ConfigurationError,
    Endpoints,
    GatewayUnavailable,
    InvalidRequest,
    MalformedMessage,
    Merchant,
    QueryRejected,
    RefundConflict,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRejected,
    RefundRequest,
    RefundSession,
    RefundStatus,
    RetryPolicy,
    SignatureInvalid,
    SigningKey,
    VerifyingKey,
    rsa_worker,
    wire,
)
from lianlian_async.clock import system_clock
from lianlian_async.exchange import Call
from lianlian_async.journal import MemoryJournal
from lianlian_async.sandbox import Fault, When
from lianlian_async.transport import asgi_transport
from tests.support import keypairs
from tests.support.parties import EPOCH, Connection, as_json, boot_clock, made, refund_request, sandbox, serving

pytestmark = pytest.mark.anyio

virtual = pytest.mark.virtual_time

CALLS = int(os.environ.get("LIANLIAN_TEST_CALLS", "300"))
"""Number of concurrent calls; 5000 is a slow, complete test."""


def question(number=1):
    return refund_request(number).query()


# ── concurrent calls ─────────────────────────────────────────────────────────────────────────────


@virtual
async def test_thousands_of_concurrent_calls_succeed():
    """All calls on one session succeed, although they wait for their slots far beyond their deadlines."""
    gateway = sandbox(delay=1.0)
    gateway.script(Fault.DELAY, times=CALLS)
    refunds = []
    most = running = 0

    async def counting(exchange, call_next):
        nonlocal most, running
        running += 1
        most = max(most, running)
        try:
            return await call_next(exchange)
        finally:
            running -= 1

    async with gateway.session(max_connections=5, deadline=10, middleware=[counting], clock=boot_clock) as session:

        async def one(number):
            refunds.append(await session.apply_refund(refund_request(number)))

        async with anyio.create_task_group() as tasks:
            for number in range(CALLS):
                tasks.start_soon(one, number)
    assert {refund.no_refund for refund in refunds} == {f"R-{number}" for number in range(CALLS)}
    assert len(refunds) == CALLS
    assert all(gateway.times_made(refund.no_refund) == 1 for refund in refunds)
    assert gateway.requests == {"apply": CALLS}
    assert most == 5
    assert anyio.current_time() == pytest.approx(CALLS / 5)


async def test_the_session_opens_at_most_max_connections():
    """It opens as many connections as calls run concurrently, and reuses them."""
    all_here = anyio.Event()

    async def handler(connection: Connection):
        while (request := await connection.request()) is not None:
            if server.opened == 4:
                all_here.set()
            await all_here.wait()
            await connection.respond(as_json(made(wire.decode(request[1]))))

    async with serving(handler) as server:
        endpoints = Endpoints(f"{server.url}/exchangerefund.htm", f"{server.url}/refundquery.htm")
        async with RefundSession(sandbox().merchant(endpoints=endpoints), max_connections=4) as session:
            async with anyio.create_task_group() as tasks:
                for number in range(40):
                    tasks.start_soon(session.apply_refund, refund_request(number))
            assert session.max_connections == 4
    assert server.opened == 4


@virtual
async def test_cancelled_calls_leave_all_slots_free():
    """Calls that are cancelled while they wait or run release their slots."""
    gateway = sandbox()
    gateway.faults = {Fault.NO_ANSWER: 1.0}
    async with gateway.session(max_connections=3, clock=boot_clock) as session:
        with anyio.move_on_after(2):
            async with anyio.create_task_group() as tasks:
                for number in range(50):
                    tasks.start_soon(session.apply_refund, refund_request(number))
        gateway.faults = {}
        gateway.script(Fault.DELAY, times=3, delay=4)
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for number in range(100, 103):
                tasks.start_soon(session.apply_refund, refund_request(number))
        assert anyio.current_time() == pytest.approx(began + 4)


# ── deadline ─────────────────────────────────────────────────────────────────────────────────────


@virtual
@pytest.mark.parametrize(
    ("session_wide", "own", "ends"), [(30, None, 30), (12, None, 12), (30, 4, 4), (2, 9, 9)], ids=str
)
async def test_a_call_ends_by_its_deadline(session_wide, own, ends):
    """If the gateway does not answer, a call ends by its own deadline or by the session's."""
    gateway = sandbox()
    gateway.faults = {Fault.NO_ANSWER: 1.0}
    async with gateway.session(deadline=session_wide, clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request(), deadline=own)
        assert ends / 2 < anyio.current_time() <= ends
        began = anyio.current_time()
        with pytest.raises(GatewayUnavailable):
            await session.query_refund(question(), deadline=own, retry=RetryPolicy(attempts=1000))
        assert began + ends / 2 < anyio.current_time() <= began + ends


@virtual
async def test_the_policy_of_a_call_overrides_the_sessions():
    """``retry=`` of a call overrides the session's."""
    gateway = sandbox()
    gateway.script(Fault.BUSY, call="query", times=99)
    async with gateway.session(clock=boot_clock, retry=RetryPolicy(attempts=2)) as session:
        for policy, attempts in ((None, 2), (RetryPolicy(attempts=5), 5)):
            with pytest.raises(GatewayUnavailable) as caught:
                await session.query_refund(question(), retry=policy)
            assert caught.value.attempts == attempts


@pytest.mark.parametrize("given", [None, "R-1", {"no_refund": "R-1"}, question(), RefundRequest], ids=type)
async def test_another_type_is_refused_before_anything_is_sent(given):
    """The error names the expected and the given type; nothing is sent or recorded."""
    gateway = sandbox()
    async with MemoryJournal() as journal, gateway.session(journal=journal) as session:
        with pytest.raises(InvalidRequest, match="request: must be a RefundRequest") as caught:
            await session.apply_refund(given)
        assert f"of type {type(given).__name__}" in str(caught.value)
        with pytest.raises(InvalidRequest, match="request: must be a RefundRequest"):
            await session.apply_and_wait(given)
        outcome = await session.outcome_of(given)
        assert isinstance(outcome.error, InvalidRequest)
        assert outcome.request is given
        assert outcome.attempts == 0
        with pytest.raises(InvalidRequest, match="query: must be a RefundQuery"):
            await session.query_refund(refund_request() if isinstance(given, RefundQuery) else given)
        with pytest.raises(InvalidRequest, match="unknown: must be a RefundOutcomeUnknown"):
            await session.resolve(given)
        with pytest.raises(InvalidRequest, match="refund: must be a Refund"):
            await session.wait_refund(given)
        assert isinstance((await session.outcome_of(refund_request(), earlier="R-1")).error, InvalidRequest)
        with pytest.raises(ConfigurationError, match=r"journal: must be a journal, .* not str"):
            await session.outcome_of(refund_request(), journal="refunds.db")
        with pytest.raises(ConfigurationError, match="retry: must be of type RetryPolicy, not int"):
            await session.apply_refund(refund_request(), retry=3)
        assert sum((await journal.counts()).values()) == 0
    assert gateway.requests == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"merchant": "201103171000000000"}, "merchant: must be of type Merchant, not str"),
        ({"retry": 3}, "retry: must be of type RetryPolicy, not int"),
        ({"middleware": print}, "middleware: must be of type Sequence, not builtin_function_or_method"),
        ({"middleware": [1]}, "middleware: must be of type Callable, not int"),
        (
            {"limiter": threading.Lock()},
            "limiter: must be of type contextlib.AbstractAsyncContextManager | None, not lock",
        ),
        ({"listeners": print}, "listeners: must be of type Iterable, not builtin_function_or_method"),
        ({"journal": "refunds.db"}, "journal: must be a journal, such as SqliteJournal(path), not str"),
    ],
)
def test_settings_of_another_type_are_refused(merchant, settings, words):
    """The error names the argument, the expected type, and the given type."""
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        RefundSession(**{"merchant": merchant} | settings)


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), "30", True, [30], Decimal(30), 10**400])
async def test_an_invalid_deadline_is_refused(merchant, deadline):
    """A deadline must be a positive number of seconds."""
    with pytest.raises(ConfigurationError, match="deadline"):
        RefundSession(merchant, deadline=deadline)
    gateway = sandbox()
    async with gateway.session() as session:
        with pytest.raises(ConfigurationError, match="deadline"):
            await session.apply_refund(refund_request(), deadline=deadline)
    assert gateway.requests == {}


@pytest.mark.parametrize("number", [0, -1, 2.5, "20", True, None])
async def test_an_invalid_max_connections_is_refused(merchant, number):
    """It must be an integer of at least 1."""
    with pytest.raises(ConfigurationError, match="max_connections"):
        RefundSession(merchant, max_connections=number)


@pytest.mark.parametrize("number", [-1, 21, 1.0, None, True])
def test_warm_up_is_at_most_max_connections(merchant, number):
    """It must be an integer from 0 to ``max_connections``."""
    with pytest.raises(ConfigurationError, match="warm_up"):
        RefundSession(merchant, warm_up=number)


async def test_a_client_excludes_a_transport(merchant):
    """A client already has its transport."""
    async with httpx.AsyncClient() as client:
        with pytest.raises(ConfigurationError, match="client, transport and http_backend"):
            RefundSession(merchant, client=client, transport=asgi_transport(sandbox()))


class WithLength(httpx.ASGITransport):
    """A transport that is false, like an empty list, until it has sent a request."""

    def __init__(self, app):
        super().__init__(app)
        self.requests = []

    def __len__(self):
        return len(self.requests)

    async def handle_async_request(self, request):
        self.requests.append(request)
        return await super().handle_async_request(request)


class JournalWithLength(MemoryJournal):
    """A journal that is false."""

    def __len__(self):
        return 0


@virtual
async def test_a_transport_or_journal_with_a_length_is_used():
    """A transport or a journal that is false is not replaced by the network, or by no journal."""
    gateway = sandbox()
    transport, journal = WithLength(gateway), JournalWithLength()
    async with journal, RefundSession(gateway.merchant(), transport=transport, journal=journal) as session:
        await session.apply_refund(refund_request())
        assert (await journal.find("R-1")).ending is not None
    assert len(transport) == gateway.requests["apply"] == 1


# ── opening and closing ──────────────────────────────────────────────────────────────────────────


async def uses(session):
    """The calls of a session."""
    unknown = RefundOutcomeUnknown(
        request=refund_request(),
        oid_partner=session.merchant.oid_partner,
        apply_url=session.merchant.endpoints.apply,
        body=b"{}",
        attempts=1,
        queries=0,
        moment=system_clock(),
        ask_again_at=EPOCH,
        last_error="",
    )
    yield session.apply_refund(refund_request())
    yield session.query_refund(question())
    yield session.resolve(unknown)
    yield session.outcome_of(refund_request())


async def assert_refuses(session, match):
    async for use in uses(session):
        with pytest.raises(RuntimeError, match=match):
            await use


async def test_a_session_that_is_not_open_raises():
    """Before ``async with`` every call raises, and the message shows the cure."""
    session = sandbox().session()
    await assert_refuses(session, "not open: use it in `async with`")
    assert repr(session) == "<RefundSession 201103171000000000 not open>"


async def test_a_closed_session_raises():
    """After the block every call raises."""
    gateway = sandbox()
    async with gateway.session() as session:
        assert repr(session) == "<RefundSession 201103171000000000 open>"
    await assert_refuses(session, "closed")
    assert gateway.requests == {}


async def test_a_session_cannot_be_entered_twice():
    """The end of one of two ``async with`` blocks would close the session of the other."""
    async with sandbox().session() as session:
        with pytest.raises(RuntimeError, match="is open: enter it only once at a time"):
            await session.__aenter__()
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_a_session_belongs_to_its_event_loop(other):
    """In another event loop, in another thread, it raises at once."""
    gateway = sandbox()
    async with gateway.session() as session:
        await anyio.to_thread.run_sync(lambda: anyio.run(assert_refuses, session, "another event loop", backend=other))
    assert gateway.requests == {}


@virtual
async def test_closing_waits_for_running_calls():
    """The block ends after the last running call; new calls, and calls that wait for a slot, raise."""
    gateway = sandbox()
    gateway.script(Fault.DELAY, call="apply", delay=5, times=9)
    refunds, queued = [], []

    async def one(number):
        try:
            refunds.append(await session.apply_refund(refund_request(number)))
        except RuntimeError as error:
            queued.append(str(error))

    async def refused():
        await anyio.sleep(2)
        await assert_refuses(session, "closing")
        assert repr(session) == "<RefundSession 201103171000000000 closing>"

    async with anyio.create_task_group() as tasks:
        async with gateway.session(max_connections=2, clock=boot_clock) as session:
            for number in range(4):
                tasks.start_soon(one, number)
            tasks.start_soon(refused)
            await anyio.sleep(1)
        assert anyio.current_time() == pytest.approx(5)
    assert len(refunds) == 2
    assert queued == ["this RefundSession is closing"] * 2
    assert gateway.requests == {"apply": 2}


@virtual
async def test_closing_under_cancellation_does_not_wait():
    """A cancelled close returns at once; a running call ends as unknown, since it cannot query any more."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply")
    unknown = []

    async def one():
        with pytest.raises(RefundOutcomeUnknown, match="closed") as caught:
            await session.apply_refund(refund_request())
        unknown.append(caught.value)

    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(2):
            async with gateway.session(clock=boot_clock) as session:
                tasks.start_soon(one)
                await anyio.sleep(1)
        assert anyio.current_time() == 2
        await assert_refuses(session, "closed")
    assert len(unknown) == 1


@virtual
async def test_a_session_that_is_opened_again_queries_what_it_left_unknown():
    """A call that outlives a cancelled close does not delay the next close; its refund is not sent a second time."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    session = gateway.session(clock=boot_clock)

    async def one():
        with pytest.raises(RefundOutcomeUnknown, match="closed"):
            await session.apply_refund(refund_request())

    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(2):
            async with session:
                tasks.start_soon(one)
                await anyio.sleep(1)
        async with session:
            pass
        assert anyio.current_time() == 2
    async with session:
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


@virtual
async def test_an_exception_in_the_block_closes_the_session():
    """The session is closed, and the exception propagates."""
    gateway = sandbox()
    with pytest.raises(KeyError):
        async with gateway.session() as session:
            raise KeyError
    await assert_refuses(session, "closed")


async def test_a_session_closes_its_own_client():
    """The session closes the transport that it got for its own client."""
    closed = []

    class Closing(httpx.ASGITransport):
        async def aclose(self):
            closed.append(True)

    gateway = sandbox()
    async with RefundSession(gateway.merchant(), transport=Closing(app=gateway)) as session:
        await session.apply_refund(refund_request())
        assert not closed
    assert closed == [True]


async def test_a_cancelled_opening_leaves_nothing_behind():
    """If it is cancelled while it loads its keys, the session is closed, and no resource warns."""
    with anyio.CancelScope() as scope:
        scope.cancel()
        session = sandbox().session()
        await session.__aenter__()
    assert repr(session) == "<RefundSession 201103171000000000 closed>"
    gc.collect()


async def test_an_unusable_key_raises_when_the_session_opens(merchant, stranger_keys):
    """The error names the setting; the session is then closed."""
    gateway = sandbox()
    for wrong in (
        {"private_key": "/no/such/key.pem"},
        {"private_key": gateway.gateway_key.public_key().to_pem()},
        {"gateway_public_keys": [keypairs.pair("merchant").public_pem]},
    ):
        session = RefundSession(gateway.merchant(**wrong), transport=asgi_transport(gateway))
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            await session.__aenter__()
        await assert_refuses(session, "closed")
    assert gateway.requests == {}


# ── threads ──────────────────────────────────────────────────────────────────────────────────────


class SeenSigningKey(SigningKey):
    """A merchant's key that records the threads in which it signed."""

    __slots__ = ()
    threads: ClassVar[list[int]] = []

    def sign(self, source):
        self.threads.append(threading.get_ident())
        return super().sign(source)


class SeenVerifyingKey(VerifyingKey):
    """A gateway's key that records the threads in which it verified."""

    __slots__ = ()
    threads: ClassVar[list[int]] = []
    lengths: ClassVar[list[int]] = []

    def verify(self, source, signature):
        self.threads.append(threading.get_ident())
        self.lengths.append(len(b64decode(signature)))
        return super().verify(source, signature)


@pytest.fixture
def seen(monkeypatch):
    """A sandbox, and a merchant whose keys record their threads."""
    monkeypatch.setattr(SeenSigningKey, "threads", [])
    monkeypatch.setattr(SeenVerifyingKey, "threads", [])
    monkeypatch.setattr(SeenVerifyingKey, "lengths", [])

    def make():
        gateway = sandbox()
        merchant = gateway.merchant(
            private_key=SeenSigningKey.load(keypairs.pair("merchant").private_pem),
            gateway_public_keys=[SeenVerifyingKey.load(keypairs.pair("gateway").public_pem)],
        )
        return gateway, merchant

    return make


async def test_the_event_loop_never_signs(seen):
    """All signatures, for apply calls and queries, are made in one other thread at a time."""
    gateway, merchant = seen()
    gateway.script(Fault.HTTP_500, call="apply", times=5)
    async with (
        RefundSession(merchant, transport=asgi_transport(gateway)) as session,
        anyio.create_task_group() as tasks,
    ):
        for number in range(10):
            tasks.start_soon(session.apply_refund, refund_request(number))
            tasks.start_soon(session.outcome_of, refund_request(10 + number))
    assert len(SeenSigningKey.threads) >= 25
    assert threading.get_ident() not in SeenSigningKey.threads


@pytest.mark.parametrize(("seconds", "inline"), [(0.0, False), (1e9, True)])
async def test_answers_are_verified_on_the_loop_only_if_that_is_fast(monkeypatch, seen, seconds, inline):
    """The session measures a verification when it opens; a slow one runs in a thread."""
    monkeypatch.setattr(rsa_worker, "INLINE_VERIFY_SECONDS", seconds)
    gateway, merchant = seen()
    async with RefundSession(merchant, transport=asgi_transport(gateway)) as session:
        assert threading.get_ident() not in SeenVerifyingKey.threads  # the measurement
        SeenVerifyingKey.threads.clear()
        for number in range(3):
            await session.apply_refund(refund_request(number))
    assert len(SeenVerifyingKey.threads) == 3
    assert {thread == threading.get_ident() for thread in SeenVerifyingKey.threads} == {inline}


async def test_verifying_is_measured_on_signatures_of_full_length(seen):
    """The measurement runs the whole computation: a shorter signature would be rejected at once."""
    gateway, merchant = seen()
    async with RefundSession(merchant, transport=asgi_transport(gateway)):
        assert SeenVerifyingKey.lengths
        assert set(SeenVerifyingKey.lengths) == {1024 // 8}


async def test_keys_are_loaded_in_a_thread(tmp_path):
    """Key files are read in a thread when the session opens, not on the event loop."""
    file = tmp_path / "merchant.pem"
    file.write_text(keypairs.pair("merchant").private_pem)
    threads = []

    class SeenPath(os.PathLike):
        def __fspath__(self):
            threads.append(threading.get_ident())
            return str(file)

    gateway = sandbox()
    merchant = gateway.merchant(private_key=SeenPath())
    assert not threads
    async with RefundSession(merchant, transport=asgi_transport(gateway)) as session:
        assert threads
        assert threading.get_ident() not in threads
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"


async def test_keys_of_4096_bits_work():
    """The largest key that the gateway accepts signs apply calls and queries."""
    theirs, ours = keypairs.pair("gateway", 2048).private, keypairs.pair("merchant", 4096).private
    gateway = sandbox(merchant_key=ours, gateway_key=theirs)
    async with gateway.session() as session:
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
        assert (await session.query_refund(question())).no_refund == "R-1"


# ── results of the calls ─────────────────────────────────────────────────────────────────────────


@virtual
async def test_a_query_returns_the_current_record():
    """``query_refund`` returns the current state, with the settlement date after success."""
    gateway = sandbox(settle_after=10)
    async with gateway.session(clock=boot_clock) as session:
        applied = await session.apply_refund(refund_request())
        assert applied.sta_refund is RefundStatus.INITIALIZED
        await anyio.sleep(60)
        for query in (
            question(),
            applied.query(),
            RefundQuery(oid_refundno=applied.oid_refundno, dt_refund=EPOCH),
        ):
            refund = await session.query_refund(query)
            assert refund.sta_refund is RefundStatus.SUCCESS
            assert refund.settle_date is not None
            assert refund.oid_refundno == applied.oid_refundno


@virtual
@pytest.mark.parametrize(
    ("fault", "error", "attempts"),
    [
        (Fault.BUSY, GatewayUnavailable, 4),
        (Fault.NO_ANSWER, GatewayUnavailable, 4),
        (Fault.RESET, GatewayUnavailable, 4),
        (Fault.HTTP_500, MalformedMessage, 4),
        (Fault.BAD_GATEWAY, MalformedMessage, 4),
        (Fault.REDIRECT, MalformedMessage, 4),
        (Fault.BROKEN_JSON, MalformedMessage, 4),
        (Fault.OVERSIZED, MalformedMessage, 4),
        (Fault.COMPRESSED, MalformedMessage, 4),
        (Fault.WRONG_SIGNATURE, SignatureInvalid, 4),
        (Fault.NO_SIGNATURE, SignatureInvalid, 4),
        (Fault.ALTERED_FIELD, SignatureInvalid, 4),
        (Fault.OTHER_REFUND, AnswerMismatch, 4),
    ],
)
async def test_a_query_without_a_usable_answer_raises_the_last_error(fault, error, attempts):
    """A query is repeated as often as the policy allows."""
    gateway = sandbox()
    gateway.script(fault, call="query", times=99)
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request())
        with pytest.raises(error):
            await session.query_refund(question())
    assert gateway.requests["query"] == attempts


@virtual
async def test_a_query_for_an_unknown_number_is_not_found_at_once():
    """The answer "no such record" is no failure, so the query is not repeated."""
    gateway = sandbox()
    async with gateway.session(clock=boot_clock) as session:
        with pytest.raises(RefundNotFound) as caught:
            await session.query_refund(question())
    assert caught.value.no_refund == "R-1"
    assert gateway.requests == {"query": 1}


@virtual
async def test_a_rejected_query_says_nothing_about_the_refund():
    """A query that the gateway rejects raises ``QueryRejected``, never ``RefundRejected``."""
    gateway = sandbox()
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request())
        gateway.advance(100 * 86_400)
        with pytest.raises(QueryRejected) as caught:
            await session.query_refund(question())
    assert caught.value.ret_code == "3005"


@virtual
async def test_outcome_of_returns_the_error_as_a_value():
    """``outcome_of`` returns the refund or the error with its numbers; only misuse raises."""
    gateway = sandbox()
    gateway.add_order("O-poor", Decimal("1.00"))
    gateway.script(Fault.HTTP_500, call="apply", no_refund="R-2", when=When.AFTER)
    gateway.script(Fault.NO_ANSWER, call="apply", no_refund="R-3", when=When.BEFORE)
    async with gateway.session(clock=boot_clock) as session:
        plain = await session.outcome_of(refund_request(1))
        asked = await session.outcome_of(refund_request(2))
        unknown = await session.outcome_of(refund_request(3))
        rejected = await session.outcome_of(refund_request("poor"))
        assert (plain.refund.no_refund, plain.error, plain.attempts, plain.queries) == ("R-1", None, 1, 0)
        assert (asked.refund.no_refund, asked.error, asked.attempts, asked.queries) == ("R-2", None, 1, 1)
        assert rejected.refund is None
        assert isinstance(rejected.error, RefundRejected)
        assert unknown.refund is None
        assert isinstance(unknown.error, RefundOutcomeUnknown)
        assert unknown.queries == unknown.error.queries
        assert 15 < unknown.seconds <= 30
        await anyio.sleep(900)
        resolved = await session.outcome_of(unknown.request, earlier=unknown.error)
        assert resolved.refund.no_refund == "R-3"
        assert (resolved.attempts, resolved.queries) == (1, 2)  # twice: before and after R-2 proved the query service
    assert gateway.times_made("R-3") == 1


# ── with a journal ───────────────────────────────────────────────────────────────────────────────


@virtual
async def test_with_a_journal_a_made_refund_is_returned_without_traffic():
    """The second call for a refund, in any session, sends nothing and returns the same record."""
    gateway, journal = sandbox(), MemoryJournal()
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        first = await session.apply_refund(refund_request())
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        second = await session.apply_refund(refund_request())
        outcome = await session.outcome_of(refund_request())
        with pytest.raises(RefundConflict):
            await session.apply_refund(refund_request(money_refund="9.00"))
    assert first == second == outcome.refund
    assert (outcome.attempts, outcome.queries) == (0, 0)
    assert gateway.requests == {"apply": 1}


@virtual
async def test_with_a_journal_a_cancelled_refund_is_queried_first():
    """After a call was cancelled during its send, the next call queries, and finds the refund."""
    gateway, journal = sandbox(), MemoryJournal()
    gateway.script(Fault.NO_ANSWER, call="apply")
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())
        refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


@virtual
@pytest.mark.parametrize("second_journal", [True, False], ids=["journal", "no journal"])
async def test_with_a_journal_resolve_sends_the_recorded_bytes(second_journal):
    """After the grace the recorded bytes are sent once more, and the refund is made."""
    gateway, journal = sandbox(), MemoryJournal()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    sent = []

    async def watching(exchange, call_next):
        if exchange.call is Call.APPLY:
            sent.append(exchange.body)
        return await call_next(exchange)

    async with gateway.session(journal=journal, clock=boot_clock, middleware=[watching]) as session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
        await anyio.sleep(900)
        if second_journal:
            refund = await session.resolve(caught.value)
        else:
            refund = await session.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert sent == [caught.value.body] * 2
    assert gateway.times_made("R-1") == 1


@virtual
async def test_resolve_needs_no_default_notify_url():
    """An unknown refund is resolved with its own bytes, although the merchant has no default notify_url any more."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    async with gateway.session(clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
    await anyio.sleep(900)
    merchant = gateway.merchant(notify_url=None)
    async with RefundSession(merchant, transport=asgi_transport(gateway), clock=boot_clock) as session:
        assert (await session.resolve(caught.value)).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


@virtual
async def test_with_a_journal_two_calls_for_one_refund_send_it_once():
    """One of the concurrent calls sends; the others wait for it and return its outcome."""
    gateway, journal = sandbox(), MemoryJournal()
    gateway.script(Fault.DELAY, call="apply", delay=3)
    refunds = []

    async def one(session):
        refunds.append(await session.apply_refund(refund_request()))

    async with (
        gateway.session(journal=journal, clock=boot_clock) as here,
        gateway.session(journal=journal, clock=boot_clock) as there,
        anyio.create_task_group() as tasks,
    ):
        for session in (here, there, here):
            tasks.start_soon(one, session)
    assert len(refunds) == 3
    assert refunds[0] == refunds[1] == refunds[2]
    assert gateway.requests == {"apply": 1}


@virtual
async def test_with_a_journal_open_refunds_are_resumed():
    """``resume`` queries unresolved and accepted refunds, and returns the number of resolved ones."""
    gateway, journal = sandbox(settle_after=60), MemoryJournal()
    gateway.script(Fault.NO_ANSWER, call="apply", no_refund="R-2")
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        await session.apply_refund(refund_request(1))
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request(2))
        await anyio.sleep(120)
        assert await session.resume() == (2, 0)
        assert (await session.apply_refund(refund_request(2))).sta_refund is RefundStatus.SUCCESS
        assert await session.resume(concurrency=1) == (0, 0)
    assert gateway.requests["apply"] == 2


@virtual
async def test_resume_takes_a_deadline_and_a_policy():
    """``deadline`` limits each refund, resolved or queried, and ``retry`` the attempts; both override the session's."""
    gateway, journal = sandbox(settle_after=9999), MemoryJournal()
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        await session.apply_refund(refund_request(1))
        gateway.script(Fault.NO_ANSWER, times=99)
        assert await session.resume(retry=RetryPolicy(attempts=1)) == (0, 1)
        assert gateway.requests["query"] == 1
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request(2))
        await anyio.sleep(60)
        began = anyio.current_time()
        assert await session.resume(concurrency=1, deadline=4.0) == (0, 2)
        assert 4 < anyio.current_time() - began <= 8
        for wrong in ({"deadline": 0}, {"retry": 3}):
            with pytest.raises(ConfigurationError):
                await session.resume(**wrong)


async def test_resume_of_a_session_that_is_not_open_raises():
    """A service that forgot the session in its lifespan learns it at the first sweep, before any refund is open."""
    async with MemoryJournal() as journal:
        with pytest.raises(RuntimeError, match="is not open: use it in `async with`"):
            await sandbox().session(journal=journal).resume()


async def test_resume_without_a_journal_raises():
    """``ConfigurationError``: the session has no journal."""
    async with sandbox().session() as session:
        with pytest.raises(ConfigurationError, match="no journal"):
            await session.resume()


# ── settings and secrets ─────────────────────────────────────────────────────────────────────────


class Shop(str, Enum):  # noqa: UP042 - not StrEnum, whose str() is the value
    """A class whose ``str()`` and ``format()`` return the name of a member, not its value."""

    PARTNER = "201103171000000000"
    URL = "https://shop.example/notify"


async def test_a_member_of_an_enumeration_is_sent_as_its_value():
    """The gateway gets and verifies the same text that was checked."""
    gateway = sandbox()
    merchant = gateway.merchant(oid_partner=Shop.PARTNER, notify_url=Shop.URL)
    request = refund_request(no_order=Shop.PARTNER, trader_refund=Shop.PARTNER)
    assert request.to_dict()["trader_refund"] == request.query().to_dict()["trader_refund"] == "201103171000000000"
    async with RefundSession(merchant, transport=asgi_transport(gateway)) as session:
        await session.apply_refund(request)
        await session.apply_refund(refund_request(2, notify_url=Shop.URL))
    assert [refund.no_order for refund in gateway.refunds] == ["201103171000000000", "O-2"]
    assert {refund.notify_url for refund in gateway.refunds} == {"https://shop.example/notify"}


async def test_a_request_without_a_notify_url_is_refused():
    """Nothing is signed or sent."""
    gateway = sandbox()
    merchant = gateway.merchant(notify_url=None)
    async with RefundSession(merchant, transport=asgi_transport(gateway)) as session:
        with pytest.raises(InvalidRequest, match="notify_url"):
            await session.apply_refund(refund_request())
        assert (await session.apply_refund(refund_request(notify_url="https://shop.example/n"))).no_refund == "R-1"
    assert gateway.requests == {"apply": 1}


@virtual
async def test_a_session_reads_its_own_clock():
    """``clock`` replaces the clocks of this machine."""
    assert sandbox().session(clock=boot_clock).clock() == boot_clock()
    assert sandbox().session().clock().timeline == system_clock().timeline


@virtual
async def test_no_log_repr_or_error_shows_a_key(caplog):
    """No log record, ``repr`` or error shows a part of a private key when refunds fail."""
    pair = keypairs.pair("merchant")
    secrets = [line for line in pair.private_pem.splitlines() if len(line) > 40]
    assert len(secrets) > 5
    gateway = sandbox()
    merchant = gateway.merchant(private_key=pair.private_pem)
    shown = [repr(merchant)]
    with caplog.at_level(logging.DEBUG):
        async with RefundSession(
            merchant, transport=asgi_transport(gateway), clock=boot_clock, middleware=[_show(shown)]
        ) as session:
            shown.append(repr(session))
            for number, fault in enumerate(Fault):
                gateway.script(fault, call="apply")
                outcome = await session.outcome_of(refund_request(number))
                shown += [repr(outcome), str(outcome.error), repr(outcome.error)]
    everything = "\n".join([*shown, caplog.text])
    assert len(caplog.records) > 10
    assert not [secret for secret in secrets if secret in everything]


def _show(shown):
    async def layer(exchange, call_next):
        reply = await call_next(exchange)
        shown.extend([repr(exchange), repr(reply)])
        return reply

    return layer


@virtual
async def test_sessions_of_two_merchants_are_independent():
    """Each of two concurrent sessions uses its own merchant and gateway."""
    gateways = [sandbox(oid_partner="201103171000000000"), sandbox(oid_partner="201304121000001004")]
    async with gateways[0].session(clock=boot_clock) as one, gateways[1].session(clock=boot_clock) as two:
        await one.apply_refund(refund_request())
        with pytest.raises(RefundNotFound):
            await two.query_refund(question())
    assert [gateway.requests for gateway in gateways] == [{"apply": 1}, {"query": 1}]


async def test_a_session_opens_without_a_gateway(merchant):
    """Opening needs no network: the first call opens the first connection."""
    async with RefundSession(merchant) as session:
        assert isinstance(session, RefundSession)


async def test_a_wrong_merchant_number_or_signature_is_a_configuration_error():
    """The gateway's 3001 and 1001 are rejections with ``is_configuration``."""
    gateway = sandbox()
    for wrong, ret_code in (
        ({"oid_partner": "201304121000001004"}, "3001"),
        ({"private_key": keypairs.pair("stranger").private}, "1001"),
    ):
        merchant = gateway.merchant(**wrong)
        assert isinstance(merchant, Merchant)
        async with RefundSession(merchant, transport=asgi_transport(gateway)) as session:
            with pytest.raises(RefundRejected) as caught:
                await session.apply_refund(refund_request())
        assert caught.value.ret_code == ret_code
        assert caught.value.is_configuration
    assert not gateway.refunds


@virtual
async def test_a_native_cancellation_is_a_cancellation(anyio_backend_name):
    """On asyncio, ``asyncio.timeout`` and ``Task.cancel`` end a call like any cancel scope; the session works on."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than its scopes")
    import asyncio

    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", times=2)
    async with gateway.session(max_connections=1, clock=boot_clock) as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await session.apply_refund(refund_request())
        task = asyncio.create_task(session.apply_refund(refund_request(9)))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        results = await asyncio.gather(*(session.apply_refund(refund_request(n)) for n in range(2, 6)))
    assert [refund.no_refund for refund in results] == ["R-2", "R-3", "R-4", "R-5"]


async def test_not_sent_counts_every_attempt():
    """The error for an unreachable gateway has the number of attempts of its call."""
    merchant = sandbox().merchant(endpoints=Endpoints("http://127.0.0.1:9/a", "http://127.0.0.1:9/q"))

    class Unreachable(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            raise httpx.ConnectError("unreachable")

    async with RefundSession(merchant, transport=Unreachable(), retry=RetryPolicy(initial=1e-6)) as session:
        with pytest.raises(RefundNotSent) as caught:
            await session.apply_refund(refund_request())
        outcome = await session.outcome_of(refund_request())
    assert caught.value.attempts == outcome.attempts == 4
    assert outcome.queries == 0
