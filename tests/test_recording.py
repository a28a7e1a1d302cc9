"""A session with a journal: every refund is recorded before its first byte is sent, and its outcome at once."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from decimal import Decimal
from typing import ClassVar

import anyio
import attrs
import httpx
import pytest

from lianlian_async import (
    ConfigurationError,
    Endpoints,
    JournalError,
    NotificationEndpoint,
    Refund,
    RefundConflict,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRecord,
    RefundRejected,
    RefundRequest,
    RefundSession,
    RefundStatus,
    RetryPolicy,
    SigningKey,
    asgi,
    wire,
)
from lianlian_async.exchange import Call, Finding, Reply
from lianlian_async.journal import MemoryJournal, SqliteJournal, State
from lianlian_async.journal.base import facts
from lianlian_async.journal.sqlite_file import JournalFile, restore
from lianlian_async.middleware import RateLimit
from lianlian_async.recording import decision, learn, recorded_refund
from lianlian_async.recovery import Resumed
from lianlian_async.resolution import IncompleteRecord
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support import keypairs
from tests.support.journals import intent
from tests.support.notices import HEADERS, Handler
from tests.support.parties import EPOCH, OID_PARTNER, boot_clock, refund_request, sandbox, wall_clock

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

TRUSTING = RetryPolicy(not_found_grace=0.0)
"""For gateways that are known to deduplicate."""


@pytest.fixture(params=["memory", "sqlite"])
def new_journal(request, tmp_path):
    """Creates journals with the same entries, one for each of several successive processes."""
    memory = MemoryJournal()
    return lambda: memory if request.param == "memory" else SqliteJournal(tmp_path / "journal.sqlite")


@contextlib.asynccontextmanager
async def shop(gateway, new_journal, **options):
    """One process of a merchant: a session with an open journal."""
    async with new_journal() as journal, gateway.session(journal=journal, clock=boot_clock, **options) as session:
        yield session, journal


class Wires(httpx.AsyncBaseTransport):
    """A transport to the sandbox that records every apply body, and refuses connections while ``closed`` is true."""

    def __init__(self, gateway):
        self.inner = httpx.ASGITransport(app=gateway)
        self.closed = False
        self.applied = []

    async def handle_async_request(self, request):
        if self.closed:
            raise httpx.ConnectError("road closed")
        if request.url.path != "/refundquery.htm":
            self.applied.append(await request.aread())
        return await self.inner.handle_async_request(request)


def over(wires, gateway, journal, **options):
    return RefundSession(gateway.merchant(), transport=wires, journal=journal, clock=boot_clock, **options)


async def standing(new_journal, no_refund="R-1"):
    """Return the entry as the next process reads it."""
    async with new_journal() as journal:
        return await journal.find(no_refund)


class SeenKey(SigningKey):
    """A merchant's key that records what it signed, except the empty message with which a session measures it."""

    signed: ClassVar[list[bytes]] = []

    def sign(self, source):
        if source:
            self.signed.append(source)
        return super().sign(source)


@pytest.fixture
def merchant_key(monkeypatch):
    """The merchant's key, with an empty record."""
    monkeypatch.setattr(SeenKey, "signed", [])
    return SeenKey.load(keypairs.pair("merchant").private_pem)


# ── made ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_refund_is_recorded_before_its_first_byte(new_journal):
    """When the gateway gets the request, the journal has the refund as maybe sent; afterwards it has the outcome."""
    gateway, seen = sandbox(settle_after=0), []

    async def look(exchange, call_next):
        seen.append((exchange.body, await journal.find("R-1")))
        return await call_next(exchange)

    async with shop(gateway, new_journal, middleware=[look]) as (session, journal):
        refund = await session.apply_refund(refund_request())
    ((body, entry),) = seen
    assert entry.state is State.UNRESOLVED
    assert entry.body == body
    assert entry.sent_at.wall > wall_clock()
    assert entry.fields == refund_request().to_dict()
    resolved = await standing(new_journal)
    assert resolved.state is State.DONE
    assert recorded_refund(resolved) == refund


@pytest.mark.parametrize(("settle_after", "state"), [(0, State.DONE), (60, State.ACCEPTED)])
async def test_a_resolved_refund_is_returned_from_the_journal(settle_after, state, new_journal, merchant_key):
    """A later call, also in another process, returns the same refund without a request or a signature."""
    gateway = sandbox(settle_after=settle_after, merchant_key=merchant_key)
    async with shop(gateway, new_journal) as (session, _):
        refund = await session.apply_refund(refund_request())
    async with shop(gateway, new_journal) as (session, journal):
        again = await session.apply_refund(refund_request())
        outcome = await session.outcome_of(refund_request())
        assert (await journal.find("R-1")).state is state
    assert again == outcome.refund == refund
    assert again.dt_refund == refund.dt_refund
    assert (outcome.attempts, outcome.queries) == (0, 0)
    assert gateway.requests == {"apply": 1}
    assert len(merchant_key.signed) == 1


async def test_a_failed_refund_is_done(new_journal):
    """A refund that was made and failed later is final, and no error."""
    gateway = sandbox(settle_after=0)
    gateway.fail("R-1")
    async with shop(gateway, new_journal) as (session, _):
        assert (await session.apply_refund(refund_request())).sta_refund is RefundStatus.FAILED
        assert (await session.apply_refund(refund_request())).sta_refund is RefundStatus.FAILED
    assert gateway.requests == {"apply": 1}


# ── rejected ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("signs", [True, False], ids=["signed", "unsigned"])
async def test_a_rejection_is_recorded_and_raised_again(signs, new_journal, merchant_key):
    """A later call raises an equal error, without a request or a signature, and so without an exchange."""
    gateway = sandbox(default_order=None, sign_errors=signs, merchant_key=merchant_key)
    async with shop(gateway, new_journal) as (session, _):
        with pytest.raises(RefundRejected) as first:
            await session.apply_refund(refund_request())
    gateway.add_order("O-1", Decimal("10.00"))
    async with shop(gateway, new_journal) as (session, journal):
        with pytest.raises(RefundRejected) as again:
            await session.apply_refund(refund_request())
        assert (await journal.find("R-1")).state is State.REJECTED
    assert first.value.last_exchange.status == 200
    assert again.value.last_exchange is None
    assert vars(again.value) | {"last_exchange": first.value.last_exchange} == vars(first.value)
    assert str(again.value) == str(first.value)
    assert again.value.verified is signs
    assert gateway.requests == {"apply": 1}
    assert len(merchant_key.signed) == 1


async def test_a_rejection_by_configuration_is_sent_again_after_the_fix(new_journal, stranger_keys):
    """A refund that was rejected for the configuration is signed and sent again with the corrected configuration."""
    gateway = sandbox()
    ours = gateway.merchant_key
    async with shop(gateway, new_journal) as (session, _):
        gateway.merchant_key = stranger_keys.private
        with pytest.raises(RefundRejected) as caught:
            await session.apply_refund(refund_request())
    assert caught.value.is_configuration
    entry = await standing(new_journal)
    assert (entry.state, entry.sent_at) == (State.UNRESOLVED, None)
    gateway.merchant_key = ours
    async with shop(gateway, new_journal) as (session, _):
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 2}


async def test_a_refund_that_was_certainly_not_sent_is_new_again(new_journal):
    """After a refused connection the next call sends without a query."""
    gateway = sandbox()
    wires = Wires(gateway)
    wires.closed = True
    async with new_journal() as journal, over(wires, gateway, journal) as session:
        with pytest.raises(RefundNotSent):
            await session.apply_refund(refund_request())
        assert (await journal.find("R-1")).sent_at is None
        wires.closed = False
        await session.apply_refund(refund_request())
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("code", ["5002", "5006"], ids=["final", "may pass"])
@pytest.mark.parametrize("is_contradicted", [False, True], ids=["made", "conflict"])
async def test_a_notification_before_a_rejection_is_the_outcome(code, is_contradicted, new_journal):
    """A load balancer sends the request twice. The first copy makes the refund, the second copy is rejected."""
    gateway = sandbox(settle_after=0)

    async def balancer(scope, receive, send):
        body = await asgi.read(receive, 10_000)

        async def again():
            return {"type": "http.request", "body": body, "more_body": False}

        async def lost(message):
            pass

        await gateway(scope, again, lost)
        made = wire.decode(gateway.notification(gateway.refunds[0]))
        if is_contradicted:
            made["money_refund"] = "9.00"
        with contextlib.suppress(RefundConflict):
            await learn(journal, Refund.from_dict(made), boot_clock(), "notification")
        gateway.script(Fault.BUSY, call="apply", when=When.BEFORE, ret_code=code)
        await gateway(scope, again, send)

    transport = httpx.ASGITransport(app=balancer)
    async with new_journal() as journal, over(transport, gateway, journal) as session:
        for _ in range(2):
            outcome = await session.outcome_of(refund_request())
            if is_contradicted:
                assert isinstance(outcome.error, RefundConflict)
            else:
                assert outcome.refund.is_final
    assert gateway.times_made("R-1") == 1


# ── conflict ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("money_refund", {"money_refund": Decimal("9.00")}),
        ("dt_refund", {"dt_refund": EPOCH + timedelta(seconds=1)}),
        ("no_order", {"no_order": "O-2"}),
        ("dt_order", {"dt_order": EPOCH - timedelta(days=4)}),
        ("oid_paybill", {"oid_paybill": "2013051613121201"}),
    ],
)
@pytest.mark.parametrize("resolved", [True, False], ids=["resolved", "unresolved"])
async def test_other_content_under_the_same_number_is_a_conflict(field, change, resolved, new_journal):
    """Nothing is sent or queried, and the entry does not change."""
    gateway = sandbox()
    gateway.script(Fault.DELAY if resolved else Fault.NO_ANSWER, when=When.BEFORE)
    async with shop(gateway, new_journal) as (session, journal):
        await session.outcome_of(refund_request())
        before = await journal.find("R-1")
        gateway.requests.clear()
        with pytest.raises(RefundConflict) as caught:
            await session.apply_refund(refund_request(**change))
        assert await journal.find("R-1") == before
    assert before.state is (State.ACCEPTED if resolved else State.UNRESOLVED)
    assert caught.value.field == field
    assert not gateway.requests


@pytest.mark.parametrize("resolved", [True, False], ids=["resolved", "unresolved"])
async def test_another_notify_url_is_no_conflict(resolved, new_journal):
    """``notify_url`` may change between two calls for one refund; the first body is kept."""
    gateway = sandbox()
    gateway.script(Fault.DELAY if resolved else Fault.NO_ANSWER, when=When.BEFORE)
    wires = Wires(gateway)
    async with new_journal() as journal, over(wires, gateway, journal, retry=TRUSTING, deadline=10) as session:
        await session.outcome_of(refund_request(notify_url="https://shop.example/one"))
        refund = await session.apply_refund(refund_request(notify_url="https://shop.example/two"))
    assert refund.no_refund == "R-1"
    assert set(wires.applied) == {wires.applied[0]}


@pytest.mark.parametrize(
    "other",
    [{"oid_partner": "201304121000001004"}, {"endpoints": Endpoints(apply="https://production.invalid/refund.htm")}],
    ids=["merchant", "endpoint"],
)
async def test_a_journal_refuses_another_merchant_and_another_endpoint(other, new_journal):
    """A refund made in the sandbox must never be taken for a production refund."""
    gateway = sandbox()
    async with shop(gateway, new_journal) as (session, _):
        await session.apply_refund(refund_request())
    stranger = gateway.merchant(**other)
    async with new_journal() as journal:
        session = RefundSession(stranger, transport=Wires(gateway), journal=journal, clock=boot_clock)
        with pytest.raises(ConfigurationError, match="belongs to merchant 201103171000000000"):
            await session.__aenter__()
        async with over(Wires(gateway), gateway, journal) as session:
            assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("repeated", [Repeated.REPLAY, Repeated.REJECT])
async def test_a_number_of_another_refund_is_recorded_as_a_conflict(repeated, new_journal):
    """The number was used without a journal for another amount: every call raises the conflict and sends nothing."""
    gateway = sandbox(repeated=repeated)
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request(money_refund=Decimal("9.00")))
    gateway.requests.clear()
    requests = []
    for _ in range(2):
        async with shop(gateway, new_journal) as (session, journal):
            with pytest.raises(RefundConflict, match="before a person has decided") as caught:
                await session.apply_refund(refund_request())
            assert await session.resume() == Resumed(resolved=0, still_open=0)
            entry = await journal.find("R-1")
        requests.append(gateway.requests.total())
        assert (caught.value.field, caught.value.ours, caught.value.theirs) == ("money_refund", "10.00", "9.00")
    assert entry.state is State.CONFLICT
    assert entry.ending.record["money_refund"] == "9.00"
    assert requests[0] == requests[1]
    assert gateway.times_made("R-1") == 1


# ── unresolved ────────────────────────────────────────────────────────────────────────────────────


async def test_an_unresolved_refund_is_queried_first(new_journal):
    """The refund was left unknown and then made: the next process queries it and finds it."""
    gateway = sandbox()
    gateway.script(Fault.LATE, delay=40)
    async with shop(gateway, new_journal) as (session, _):
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
    entry = await standing(new_journal)
    assert (entry.state, entry.sent_at.wall) == (State.UNRESOLVED, caught.value.sent_at)
    await anyio.sleep(30)
    gateway.requests.clear()
    async with shop(gateway, new_journal) as (session, journal):
        refund = await session.apply_refund(refund_request())
        assert recorded_refund(await journal.find("R-1")) == refund
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"query": 1}


async def test_an_unresolved_refund_is_sent_again_with_the_recorded_body(new_journal):
    """Once "no such record" is believed, exactly the recorded bytes are sent again."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    wires = Wires(gateway)
    for answered in (False, True):
        async with new_journal() as journal, over(wires, gateway, journal) as session:
            outcome = await session.outcome_of(refund_request(notify_url=f"https://shop.example/{answered}"))
        assert (outcome.refund is not None) is answered
        await anyio.sleep(900)
    assert len(wires.applied) == 2
    assert wires.applied[0] == wires.applied[1]
    assert gateway.times_made("R-1") == 1


async def test_the_grace_counts_from_the_last_send(new_journal):
    """A refund that was sent again and lost again is not sent a third time before the grace since the second send."""
    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal(1000))
    gateway.script(Fault.BAD_GATEWAY, call="apply", when=When.BEFORE)
    gateway.script(Fault.LATE, call="apply", delay=800)
    for pause in (1000, 100, 800, 0):
        async with shop(gateway, new_journal) as (session, _):
            outcome = await session.outcome_of(refund_request())
        await anyio.sleep(pause)
    assert outcome.refund is not None
    assert (gateway.requests["apply"], gateway.times_made("R-1")) == (2, 1)


async def test_a_resend_is_recorded_before_its_first_byte(new_journal):
    """After a crash at this moment, the grace counts from the resend."""
    gateway, seen = sandbox(), []
    gateway.script(Fault.BAD_GATEWAY, call="apply", when=When.BEFORE)

    async def look(exchange, call_next):
        if exchange.call is Call.APPLY:
            seen.append((wall_clock(), (await journal.find("R-1")).sent_at.wall))
        return await call_next(exchange)

    for _ in range(2):
        async with shop(gateway, new_journal, middleware=[look]) as (session, journal):
            await session.outcome_of(refund_request())
        await anyio.sleep(1000)
    assert len(seen) == 2
    assert all(sent_at > at for at, sent_at in seen)


async def test_the_grace_counts_from_the_send_of_an_earlier_process(new_journal):
    """A query before the end of the grace leaves the refund unknown, and nothing is sent."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    wires = Wires(gateway)
    async with new_journal() as journal, over(wires, gateway, journal) as session:
        with pytest.raises(RefundOutcomeUnknown) as first:
            await session.apply_refund(refund_request())
        with pytest.raises(RefundOutcomeUnknown) as second:
            await session.apply_refund(refund_request())
    assert second.value.sent_at == first.value.sent_at
    assert second.value.ask_again_at == first.value.ask_again_at
    assert len(wires.applied) == 1


# ── cancelled ────────────────────────────────────────────────────────────────────────────────────


async def test_a_refund_cancelled_during_its_send_counts_as_sent_at_the_cancellation(new_journal):
    """The request may arrive until the cancellation, so the entry has that time as ``sent_at``."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with shop(gateway, new_journal) as (session, journal):
        with anyio.move_on_after(3):
            await session.apply_refund(refund_request())
        entry = await journal.find("R-1")
        assert (entry.state, entry.sent_at.boot, entry.holder) == (State.UNRESOLVED, 3.0, None)
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_asyncio_s_own_cancellation_is_a_cancellation(new_journal, anyio_backend_name):
    """``Task.cancel`` during the send leaves the refund unresolved; the time of the cancellation is ``sent_at``."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no such cancellation")
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with shop(gateway, new_journal) as (session, journal):
        task = asyncio.create_task(session.apply_refund(refund_request()))
        await asyncio.sleep(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        entry = await journal.find("R-1")
    assert (entry.state, entry.sent_at.boot, entry.holder) == (State.UNRESOLVED, 3.0, None)


async def test_an_outcome_is_recorded_despite_cancellation(new_journal):
    """If the answer has arrived before the cancellation, the journal records the outcome."""
    gateway = sandbox(settle_after=0)
    with anyio.CancelScope() as scope:

        async def cancel(exchange, call_next):
            reply = await call_next(exchange)
            scope.cancel()
            return reply

        async with shop(gateway, new_journal, middleware=[cancel]) as (session, _):
            await session.apply_refund(refund_request())
    assert (await standing(new_journal)).state is State.DONE


class Slow(MemoryJournal):
    """A journal that needs a second for each write, even if the caller is cancelled."""

    async def begin(self, intent, now):
        await anyio.sleep(1)
        return await super().begin(intent, now)

    async def finish(self, *told):
        await anyio.sleep(1)
        return await super().finish(*told)

    async def release(self, *told):
        await anyio.sleep(1)
        await super().release(*told)


@pytest.mark.parametrize(
    ("fault", "state"),
    [(Fault.DELAY, State.ACCEPTED), (Fault.NO_ANSWER, State.UNRESOLVED)],
    ids=["answered", "not answered"],
)
async def test_a_cancelled_call_ends_when_its_journal_has_written(fault, state, caplog):
    """The cancellation waits only for the journal, and a warning says that the refund may have been made."""
    gateway, journal = sandbox(), Slow()
    gateway.script(fault, delay=0.5)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(2):
            await session.apply_refund(refund_request())
        entry = await journal.find("R-1")
        assert (entry.state, entry.holder) == (state, None)
    assert anyio.current_time() <= 3
    assert "refund R-1: cancelled, but it may have been made" in caplog.text


async def test_a_refund_cancelled_during_begin_was_not_sent():
    """If the call is cancelled during ``begin``, the next call sends the refund without a query."""
    gateway, journal = sandbox(), Slow()
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(0.5):
            await session.apply_refund(refund_request())
        assert not gateway.requests
        await session.apply_refund(refund_request())
    assert gateway.requests == {"apply": 1}


# ── two sessions for one refund ──────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def two_shops(gateway, new_journal):
    """Two sessions on one journal, as in two parts of one service."""
    async with shop(gateway, new_journal) as (session, journal), over(Wires(gateway), gateway, journal) as other:
        yield session, other, journal


async def test_two_sessions_on_one_journal_send_a_refund_once(new_journal):
    """One session sends, the other calls wait for its lease, and all return the refund."""
    gateway, refunds = sandbox(faults={Fault.DELAY: 1.0}, delay=3), []

    async def apply(session):
        refunds.append(await session.apply_refund(refund_request()))

    async with two_shops(gateway, new_journal) as (one, other, _), anyio.create_task_group() as tasks:
        for session in (one, other, one, other):
            tasks.start_soon(apply, session)
    assert len(refunds) == 4
    assert refunds == [refunds[0]] * 4
    assert gateway.requests == {"apply": 1}


class Counting(MemoryJournal):
    """Counts the calls of ``begin``."""

    intents = 0

    async def begin(self, intent, now):
        self.intents += 1
        return await super().begin(intent, now)


@pytest.mark.parametrize(("seconds", "most"), [(0.1, 5), (8, 15)])
async def test_a_call_that_waits_for_a_lease_polls_with_growing_pauses(seconds, most):
    """A short wait ends soon after the other call; a long wait polls the journal once per second."""
    gateway, journal = sandbox(faults={Fault.DELAY: 1.0}, delay=seconds), Counting()
    async with two_shops(gateway, lambda: journal) as (one, other, _), anyio.create_task_group() as tasks:
        for session in (one, other):
            tasks.start_soon(session.apply_refund, refund_request())
    assert 3 <= journal.intents <= most
    assert anyio.current_time() <= seconds + min(seconds, 1.0)


async def test_a_call_that_waits_for_a_lease_takes_over_an_unknown_refund(new_journal):
    """The first call is cancelled: the second call queries, and finds the refund of the first."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with two_shops(gateway, new_journal) as (one, other, _), anyio.create_task_group() as tasks:

        async def cancelled():
            with anyio.move_on_after(5):
                await one.apply_refund(refund_request())

        tasks.start_soon(cancelled)
        await anyio.sleep(1)
        refund = await other.apply_refund(refund_request())
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_a_refund_that_is_leased_until_the_deadline_is_unknown(new_journal):
    """Another worker has the lease beyond the deadline: unknown, and ``ask_again_at`` is the end of the lease."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with two_shops(gateway, new_journal) as (one, other, journal), anyio.create_task_group() as tasks:
        tasks.start_soon(one.outcome_of, refund_request())
        await anyio.sleep(1)
        leased_until = (await journal.find("R-1")).leased_until.wall
        body = (await journal.find("R-1")).body
        with pytest.raises(RefundOutcomeUnknown, match="holds the lease") as caught:
            await other.apply_refund(refund_request(), deadline=5)
        assert anyio.current_time() <= 6
    unknown = caught.value
    assert (unknown.attempts, unknown.queries) == (0, 0)
    assert (unknown.sent_at, unknown.ask_again_at) == (leased_until, leased_until)
    assert (unknown.request, unknown.query(), unknown.body) == (refund_request(), refund_request().query(), body)
    assert unknown.oid_partner == OID_PARTNER
    assert gateway.requests["apply"] == 1


async def test_after_its_lease_a_call_sends_nothing(new_journal):
    """A call that waits for a limiter until its lease has ended does not send: another worker may have sent."""
    gateway = sandbox()
    hours = RateLimit(1 / 3600)
    async with shop(gateway, new_journal, limiter=hours) as (session, _):
        await session.apply_refund(refund_request(1))
        with pytest.raises(RefundNotSent, match=r"another worker .* \(attempts: 1\)"):
            await session.apply_refund(refund_request(2))
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("is_made", [True, False])
async def test_a_refund_that_another_worker_took_over_is_not_reported_as_not_sent(new_journal, is_made):
    """The call sent nothing, but after its lease another worker made the refund, or left it unknown."""
    gateway = sandbox()
    async with (
        shop(gateway, new_journal, limiter=RateLimit(1 / 3600)) as (session, journal),
        anyio.create_task_group() as group,
    ):
        await session.apply_refund(refund_request(1))

        async def other_worker():
            await anyio.sleep(1800)
            if not is_made:
                gateway.faults = {Fault.RESET: 1.0}
            async with gateway.session(journal=journal, clock=boot_clock) as other:
                assert ((await other.outcome_of(refund_request(2))).refund is not None) is is_made

        group.start_soon(other_worker)
        if is_made:
            assert (await session.apply_refund(refund_request(2))).no_refund == "R-2"
        else:
            with pytest.raises(RefundOutcomeUnknown, match="another worker"):
                await session.apply_refund(refund_request(2))
    assert gateway.times_made("R-2") <= 1


@pytest.mark.parametrize("days", [0, 1])
async def test_a_call_sends_nothing_if_a_notification_arrives_while_it_waits_for_the_limiter(new_journal, days):
    """An earlier journal was lost, so the refund, or another one with its number, looks new until it is notified."""
    gateway = sandbox(settle_after=0, repeated=Repeated.AGAIN, default_order=Decimal(100))
    limiter, requests = anyio.Semaphore(0), [refund_request(), refund_request(dt_refund=EPOCH + timedelta(days=days))]
    async with gateway.session() as session:
        await session.apply_refund(requests[0])
    async with shop(gateway, new_journal, limiter=limiter) as (session, journal):

        async def notify():
            await anyio.sleep(1)
            endpoint = NotificationEndpoint(session.merchant, Handler(), journal=journal, clock=boot_clock)
            await endpoint.handle(gateway.notification(gateway.refunds[0]), HEADERS)
            limiter.release()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(notify)
            outcome = await session.outcome_of(requests[1])
    assert isinstance(outcome.error, RefundConflict) if days else outcome.refund.is_final
    assert gateway.times_made("R-1") == 1


async def test_a_send_in_the_background_that_still_reads_the_journal_counts():
    """A middleware stops waiting for its send, which goes on: the refund may be made, and is not sent again."""

    class Slow(MemoryJournal):
        async def find(self, no_refund):
            await anyio.sleep(2)
            return await super().find(no_refund)

    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal(100))

    async def detaching(exchange, call_next):
        if exchange.call is Call.QUERY:
            return await call_next(exchange)
        await anyio.sleep(1)
        tasks.start_soon(call_next, exchange)
        await anyio.sleep(1)
        raise TimeoutError

    async with anyio.create_task_group() as tasks, gateway.session(journal=Slow(), middleware=[detaching]) as session:
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


async def test_an_answer_after_a_decision_that_the_refund_was_not_made_is_a_conflict(new_journal):
    """A person decides after the lease of a suspended worker, whose request is answered later: it reports both."""
    gateway = sandbox(settle_after=0)

    async def decided(exchange, call_next):
        reply = await call_next(exchange)
        now = boot_clock().after(1e6)
        await journal.decide("R-1", decision(is_made=False, evidence="mail", who="Li", now=now), now)
        return reply

    async with shop(gateway, new_journal, middleware=[decided]) as (session, journal):
        with pytest.raises(RefundConflict, match="ours 2, recorded decided by hand by Li") as caught:
            await session.apply_refund(refund_request())
        assert (await journal.find("R-1")).state is State.REJECTED
    assert (caught.value.field, gateway.times_made("R-1")) == ("sta_refund", 1)


async def test_a_later_call_returns_or_raises_the_decision_of_a_person(new_journal):
    """The decision has its evidence, and no signature of the gateway."""
    now = boot_clock().after(1e6)
    moment = now.wall.isoformat(sep=" ", timespec="seconds")
    texts = [f"decided by hand by Li at {moment}: {evidence}" for evidence in ("statement of May", "mail")]
    lost = sandbox(faults={Fault.RESET: 1.0})
    async with shop(lost, new_journal, deadline=1.0) as (session, journal):
        for number, is_made in enumerate((True, False), start=1):
            with pytest.raises(RefundOutcomeUnknown):
                await session.apply_refund(refund_request(number))
            evidence = "statement of May" if is_made else "mail"
            await journal.decide(f"R-{number}", decision(is_made=is_made, evidence=evidence, who="Li", now=now), now)
        requests = lost.requests.copy()
        refund = await session.apply_refund(refund_request(1))
        with pytest.raises(RefundRejected) as caught:
            await session.apply_refund(refund_request(2))
    assert (refund.no_refund, refund.sta_refund, refund.evidence) == ("R-1", RefundStatus.SUCCESS, texts[0])
    error = caught.value
    assert (error.ret_code, error.ret_msg, error.verified, error.evidence) == ("decided", "", False, texts[1])
    assert lost.requests == requests


async def test_a_conflict_without_a_record_stays_a_conflict(new_journal):
    """The journal must not return a refund that the gateway never recorded."""
    conflict = RefundConflict("R-1", field="no_order", ours="O-1", theirs="O-2")

    async def conflicting(exchange, call_next):
        await call_next(exchange)
        return Reply(finding=Finding.CONFLICT, error=conflict)

    gateway = sandbox(settle_after=0)
    async with shop(gateway, new_journal, middleware=[conflicting]) as (session, journal):
        for _ in range(2):
            with pytest.raises(RefundConflict, match="before a person has decided"):
                await session.apply_refund(refund_request())
        record = gateway.notification(gateway.refunds[0])
        with pytest.raises(RefundConflict, match="before a person has decided"):
            await learn(journal, Refund.from_dict(wire.decode(record)), boot_clock())
    assert gateway.requests == {"apply": 1}


async def test_a_record_without_an_amount_from_a_middleware_is_recorded(new_journal):
    """The gateway's record may lack a field: the refund was made nevertheless."""
    gateway = sandbox(settle_after=0)

    async def shortening(exchange, call_next):
        reply = await call_next(exchange)
        record = {name: text for name, text in reply.refund.raw.items() if name != "money_refund"}
        return attrs.evolve(reply, refund=RefundRecord.from_dict(record))

    async with shop(gateway, new_journal, middleware=[shortening]) as (session, journal):
        await session.apply_refund(refund_request())
        assert (await journal.find("R-1")).state is State.DONE


@pytest.mark.parametrize(("behind", "dt_refund"), [(0, EPOCH), (3600, EPOCH), (0, EPOCH + timedelta(hours=16))])
async def test_after_a_restore_no_such_record_is_not_believed_at_once(tmp_path, behind, dt_refund):
    """The lost journal may have sent the refund just before, and LianLian may not find a new refund for 15 minutes.

    The wall clock may be behind by some seconds during the restore, and ``dt_refund`` may be the end of the day.
    """
    gateway, place, backup = sandbox(repeated=Repeated.AGAIN), tmp_path / "journal", tmp_path / "backup"
    lost = refund_request(2, dt_refund=dt_refund)

    async def lagging(exchange, call_next):
        if exchange.call is Call.APPLY or exchange.asked["no_refund"] == "R-1" or anyio.current_time() > began + 600:
            return await call_next(exchange)
        error = RefundNotFound(no_refund="R-2", oid_refundno=None, ret_code="8901", ret_msg="", verified=False)
        return Reply(finding=Finding.NOT_FOUND, error=error)

    began = anyio.current_time()
    async with shop(gateway, lambda: SqliteJournal(place)) as (session, _):
        await session.apply_refund(refund_request(1))
        with contextlib.closing(JournalFile(str(place), read_only=True)) as file:
            file.backup(backup)
        await session.apply_refund(lost)
    place.unlink()
    await anyio.sleep(60)
    restored_at = boot_clock()
    restore(backup, place, attrs.evolve(restored_at, wall=restored_at.wall - timedelta(seconds=behind)))
    async with shop(gateway, lambda: SqliteJournal(place), middleware=[lagging]) as (session, _):
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(lost)
        await anyio.sleep(900)
        assert (await session.apply_refund(lost)).no_refund == "R-2"
    assert gateway.times_made("R-2") == 1


@pytest.mark.parametrize(("behind", "dt_refund"), [(3600, EPOCH), (0, EPOCH + timedelta(hours=16))])
async def test_long_after_a_restore_a_lost_refund_is_queried_first(tmp_path, behind, dt_refund):
    """Neither the wall clock nor ``dt_refund`` proves that a refund was begun after the restore."""
    gateway, place, backup = sandbox(repeated=Repeated.AGAIN), tmp_path / "journal", tmp_path / "backup"
    lost = refund_request(2, dt_refund=dt_refund)
    async with shop(gateway, lambda: SqliteJournal(place)) as (session, _):
        await session.apply_refund(refund_request(1))
        with contextlib.closing(JournalFile(str(place), read_only=True)) as file:
            file.backup(backup)
        await session.apply_refund(lost)
    place.unlink()
    restored_at = boot_clock()
    restore(backup, place, attrs.evolve(restored_at, wall=restored_at.wall - timedelta(seconds=behind)))
    await anyio.sleep(1000)
    async with shop(gateway, lambda: SqliteJournal(place)) as (session, _):
        assert (await session.apply_refund(lost)).no_refund == "R-2"
        assert (await session.apply_refund(refund_request(3))).no_refund == "R-3"
    assert [gateway.times_made(number) for number in ("R-2", "R-3")] == [1, 1]


# ── a journal that fails ─────────────────────────────────────────────────────────────────────────


class Failing(MemoryJournal):
    """A journal whose methods ``verbs`` fail."""

    def __init__(self, *verbs):
        super().__init__()
        self.verbs = set(verbs)

    def _check(self, verb):
        if verb in self.verbs:
            raise JournalError("journal: the disk is full")

    async def find(self, no_refund):
        self._check("find")
        return await super().find(no_refund)

    async def begin(self, intent, now):
        self._check("begin")
        return await super().begin(intent, now)

    async def finish(self, *told):
        self._check("finish")
        return await super().finish(*told)

    async def release(self, *told):
        self._check("release")
        await super().release(*told)

    async def pending(self):
        self._check("pending")
        async for entry in super().pending():
            yield entry


@pytest.mark.parametrize("verb", ["find", "begin"])
async def test_nothing_is_sent_if_the_journal_cannot_write(verb):
    """A refund that cannot be recorded is not sent."""
    gateway = sandbox()
    async with gateway.session(journal=Failing(verb), clock=boot_clock) as session:
        with pytest.raises(JournalError, match="full"):
            await session.apply_refund(refund_request())
    assert not gateway.requests


async def test_nothing_is_sent_if_the_journal_was_removed(tmp_path):
    """A write to an unlinked file does not count as recorded."""
    gateway, path = sandbox(), tmp_path / "journal.sqlite"
    async with SqliteJournal(path) as journal, gateway.session(journal=journal, clock=boot_clock) as session:
        path.unlink()
        with pytest.raises(JournalError, match="removed"):
            await session.apply_refund(refund_request())
    assert not gateway.requests


async def test_a_journal_that_is_closed_during_a_call_says_that_the_refund_was_made(tmp_path):
    """The journal was closed before the session."""
    gateway, journal = sandbox(), SqliteJournal(tmp_path / "journal.sqlite")

    async def closing(exchange, call_next):
        reply = await call_next(exchange)
        await journal.__aexit__(None, None, None)
        return reply

    await journal.__aenter__()
    async with gateway.session(journal=journal, middleware=[closing], clock=boot_clock) as session:
        with pytest.raises(JournalError, match="not open") as caught:
            await session.apply_refund(refund_request())
    assert caught.value.said.no_refund == "R-1"


@pytest.mark.parametrize(
    ("fault", "verb"), [(Fault.DELAY, "finish"), (Fault.NO_ANSWER, "release")], ids=["finish", "release"]
)
async def test_if_the_outcome_cannot_be_recorded_the_next_run_finds_the_refund(fault, verb):
    """The error is raised, the refund stays unresolved, and the next run queries it."""
    gateway, journal = sandbox(), Failing(verb)
    gateway.script(fault, when=When.AFTER)
    gateway.script(Fault.RESET, call="query", times=100)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with pytest.raises(JournalError, match="full"):
            await session.apply_refund(refund_request(), deadline=20)
    assert (await journal.find("R-1")).state is State.UNRESOLVED
    journal.verbs.clear()
    await anyio.sleep(3600)
    gateway.requests.clear()
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        while (outcome := await session.outcome_of(refund_request())).refund is None:
            assert isinstance(outcome.error, RefundOutcomeUnknown)
    assert outcome.refund.no_refund == "R-1"
    assert gateway.requests["apply"] == 0
    assert gateway.times_made("R-1") == 1


# ── resume ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_connections", [1, 2, 3])
async def test_other_calls_get_a_connection_during_resume(max_connections):
    """By default, resume uses half of the connections, but at least one."""
    gateway, journal = sandbox(), MemoryJournal()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE, times=20)
    options = {"journal": journal, "clock": boot_clock, "deadline": 10, "max_connections": max_connections}
    async with gateway.session(**options) as session, anyio.create_task_group() as tasks:
        for number in range(20):
            with anyio.move_on_after(1):
                await session.apply_refund(refund_request(number))
        began = anyio.current_time()
        tasks.start_soon(session.resume)
        await anyio.sleep(1)
        await session.apply_refund(refund_request(20))
        waited = anyio.current_time() - began
        tasks.cancel_scope.cancel()
    assert (waited < 2) is (max_connections > 1)


async def test_resume_queries_all_open_refunds(new_journal):
    """Unresolved refunds are resolved, accepted ones become final, and those still open are counted."""
    gateway = sandbox(settle_after=100)
    gateway.script(Fault.NO_ANSWER, no_refund="R-2", when=When.AFTER)
    gateway.script(Fault.NO_ANSWER, no_refund="R-3", when=When.BEFORE)
    calls = []

    async def watch(exchange, call_next):
        calls.append((exchange.call, exchange.asked["no_refund"]))
        return await call_next(exchange)

    async with shop(gateway, new_journal) as (session, _):
        for number in (1, 2, 3):
            with anyio.move_on_after(5):
                await session.apply_refund(refund_request(number))
    async with shop(gateway, new_journal, middleware=[watch]) as (session, journal):
        assert await session.resume() == Resumed(resolved=1, still_open=2)
        assert [(await journal.find(f"R-{number}")).state for number in (1, 2, 3)] == [
            State.ACCEPTED,
            State.ACCEPTED,
            State.UNRESOLVED,
        ]
        assert {call for call, _ in calls} == {Call.QUERY}
        await anyio.sleep(1000)
        calls.clear()
        assert await session.resume(concurrency=1) == Resumed(resolved=3, still_open=0)
        assert (await journal.counts())[State.DONE] == 2
        assert calls.count((Call.APPLY, "R-3")) == len([call for call, _ in calls if call is Call.APPLY]) == 1
        await anyio.sleep(1000)
        assert await session.resume() == Resumed(resolved=1, still_open=0)
        assert await session.resume() == Resumed(resolved=0, still_open=0)
    assert [gateway.times_made(f"R-{number}") for number in (1, 2, 3)] == [1, 1, 1]


async def test_an_entry_of_an_older_release_is_resumed_like_the_others(new_journal):
    """An entry whose number a new refund may not have is queried like the others."""
    gateway = sandbox(settle_after=0)
    old = RefundRequest.from_record(refund_request(1).to_dict() | {"no_refund": "R-1\u200b"})
    requests = [old, refund_request(2)]
    async with shop(gateway, new_journal) as (session, _):
        for request in requests:
            gateway.script(Fault.NO_ANSWER, when=When.AFTER)
            with anyio.move_on_after(5):
                await session.apply_refund(request)
    async with shop(gateway, new_journal) as (session, _):
        assert await session.resume() == Resumed(resolved=2, still_open=0)
        assert (await session.apply_refund(old)).no_refund == "R-1\u200b"
    assert [gateway.times_made(request.no_refund) for request in requests] == [1, 1]


async def test_resume_skips_an_unreadable_entry(new_journal, caplog):
    """It stays open, the log names it, and the other refunds are resolved."""
    gateway = sandbox(settle_after=0)
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    damaged = intent("R-0", money="much")
    async with shop(gateway, new_journal) as (session, journal):
        _, entry = await journal.begin(damaged, boot_clock())
        await journal.release(entry, boot_clock())
        with anyio.move_on_after(5):
            await session.apply_refund(refund_request())
        assert await session.resume() == Resumed(resolved=1, still_open=1)
    assert "refund R-0: its journal entry cannot be read" in caplog.text


async def test_resume_counts_rejections_as_resolved(new_journal):
    """A refund that is rejected when it is sent again is resolved."""
    gateway = sandbox(default_order=None)
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    async with shop(gateway, new_journal) as (session, _):
        await session.outcome_of(refund_request())
        await anyio.sleep(1000)
        assert await session.resume() == Resumed(resolved=1, still_open=0)
    assert (await standing(new_journal)).state is State.REJECTED


async def test_resume_does_not_send_refunds_that_were_not_sent(new_journal):
    """Their caller knows it, and may have refunded in another way; only ``apply_refund`` sends them."""
    gateway = sandbox()
    wires = Wires(gateway)
    wires.closed = True
    async with new_journal() as journal, over(wires, gateway, journal) as session:
        await session.outcome_of(refund_request())
        wires.closed = False
        assert await session.resume() == Resumed(resolved=0, still_open=0)
    assert not gateway.requests


async def test_resume_counts_an_accepted_refund_as_open_if_its_query_fails(new_journal, caplog):
    """The entry does not change if the gateway does not answer, and the log reports it."""
    caplog.set_level("INFO", "lianlian_async")
    gateway = sandbox(settle_after=0.0001)
    async with shop(gateway, new_journal) as (session, journal):
        await session.apply_refund(refund_request())
        gateway.script(Fault.NO_ANSWER, call="query", times=100)
        assert await session.resume() == Resumed(resolved=0, still_open=1)
        assert (await journal.find("R-1")).state is State.ACCEPTED
    assert "refund R-1 is accepted, but its final state is not known" in caplog.text


async def test_resume_warns_about_a_conflict_of_an_accepted_refund(new_journal, caplog):
    """The gateway's record has another amount: the log has a warning, so that an alert fires."""
    gateway, other = sandbox(settle_after=0.0001), sandbox()
    async with other.session(clock=boot_clock) as elsewhere:
        await elsewhere.apply_refund(refund_request(money_refund="9.00"))
    async with new_journal() as journal:
        async with gateway.session(journal=journal, clock=boot_clock) as session:
            await session.apply_refund(refund_request())
        async with other.session(journal=journal, clock=boot_clock) as session:
            assert await session.resume() == Resumed(resolved=0, still_open=1)
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(
        "refund R-1 is accepted, but its final state is not known: refund R-1 exists with another"
    )


async def test_resume_respects_its_concurrency(new_journal):
    """``concurrency`` limits the concurrent refunds."""
    gateway = sandbox(settle_after=1)
    async with shop(gateway, new_journal) as (session, _):
        for number in range(10):
            await session.apply_refund(refund_request(number))
        await anyio.sleep(1)
        gateway.faults = {Fault.DELAY: 1.0}
        began = anyio.current_time()
        assert await session.resume(concurrency=2) == Resumed(resolved=10, still_open=0)
    assert 5 <= anyio.current_time() - began < 6  # the journal waits to fill its batches


async def test_resume_refuses_an_invalid_concurrency(new_journal):
    """With no worker, no refund would be resolved."""
    async with shop(sandbox(), new_journal) as (session, _):
        with pytest.raises(ConfigurationError, match="concurrency"):
            await session.resume(concurrency=0)


async def test_resume_without_a_journal_is_refused():
    """``ConfigurationError``: the session has no journal."""
    async with sandbox().session() as session:
        with pytest.raises(ConfigurationError, match="journal"):
            await session.resume()


@pytest.mark.parametrize(
    ("fault", "verb"),
    [
        (Fault.DELAY, "pending"),
        (Fault.DELAY, "find"),
        (Fault.DELAY, "finish"),
        (Fault.NO_ANSWER, "pending"),
        (Fault.NO_ANSWER, "begin"),
        (Fault.NO_ANSWER, "finish"),
    ],
    ids=lambda value: value if isinstance(value, str) else {Fault.DELAY: "accepted"}.get(value, "unresolved"),
)
async def test_resume_raises_the_errors_of_the_journal(fault, verb):
    """A failure of the journal is raised, whatever refunds are open."""
    gateway, journal = sandbox(settle_after=0.0001), Failing()
    gateway.script(fault, delay=0, when=When.AFTER)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(5):
            await session.apply_refund(refund_request())
        journal.verbs.add(verb)
        with pytest.raises(JournalError, match="full"):
            await session.resume()


# ── learn ────────────────────────────────────────────────────────────────────────────────────────


async def test_learn_does_not_undo_a_conflict(new_journal):
    """After a conflict was recorded, a record that agrees raises the recorded conflict again."""
    gateway = sandbox(settle_after=0)
    async with shop(gateway, new_journal) as (_, journal):
        async with gateway.session(clock=boot_clock) as other:
            news = await other.apply_refund(refund_request())
        contradiction = Refund.from_dict({**news.raw, "money_refund": "9.00"})
        fields = refund_request().to_dict()
        await journal.begin(intent("R-1", fields=fields), boot_clock())
        for told in (contradiction, news):
            with pytest.raises(RefundConflict) as caught:
                await learn(journal, told, boot_clock())
            assert caught.value.theirs == "9.00"
        assert (await journal.find("R-1")).state is State.CONFLICT


async def test_learn_resolves_an_open_refund(new_journal):
    """The reported state is recorded, and the refund keeps its own ``dt_refund``."""
    gateway = sandbox(settle_after=0)
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with shop(gateway, new_journal) as (session, journal):
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())
        news = await session.query_refund(refund_request().query())
        assert await learn(journal, news, boot_clock()) == await learn(journal, news, boot_clock()) == news
        assert recorded_refund(await journal.find("R-1")) == await session.apply_refund(refund_request()) == news
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_learn_returns_a_refund_without_an_entry_unchanged(new_journal):
    """The refund was made without this journal."""
    gateway = sandbox()
    async with gateway.session(clock=boot_clock) as session, new_journal() as journal:
        refund = await session.apply_refund(refund_request())
        assert await learn(journal, refund, boot_clock()) is refund
        assert await journal.find("R-1") is None


@pytest.mark.parametrize("is_sent", [False, True], ids=["not sent", "refused"])
async def test_learn_does_not_believe_a_record_that_may_belong_to_an_older_refund(is_sent, new_journal):
    """Our number belongs to an older refund: without dt_refund, a record of it looks like a record of ours."""
    gateway = sandbox(settle_after=0, repeated=Repeated.REJECT)
    older = refund_request(dt_refund=EPOCH - timedelta(days=300))
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(older)
    gateway.script(Fault.HTTP_500, call="query", times=1000)
    wires = Wires(gateway)
    wires.closed = not is_sent
    async with new_journal() as journal, over(wires, gateway, journal) as session:
        with pytest.raises(RefundOutcomeUnknown if is_sent else RefundNotSent):
            await session.apply_refund(refund_request())
        before = await journal.find("R-1")
        assert (before.sent_at is not None, before.refused is not None) == (is_sent, is_sent)
        whole = wire.decode(gateway.notification(gateway.refunds[0]))
        brief = Refund.from_dict({name: text for name, text in whole.items() if name != "dt_refund"})
        with pytest.raises(IncompleteRecord, match="lacks dt_refund or money_refund"):
            await learn(journal, brief, boot_clock(), "notification")
        assert await journal.find("R-1") == before
        with pytest.raises(RefundConflict, match="another dt_refund"):
            await learn(journal, Refund.from_dict(whole), boot_clock(), "notification")
        assert (await journal.find("R-1")).state is State.CONFLICT


async def test_learn_believes_a_record_with_our_whole_identity(new_journal):
    """The refund that was certainly not sent was made by another system."""
    gateway = sandbox(settle_after=0)
    wires = Wires(gateway)
    wires.closed = True
    async with gateway.session(clock=boot_clock) as other:
        refund = await other.apply_refund(refund_request())
    async with new_journal() as journal, over(wires, gateway, journal) as session:
        with pytest.raises(RefundNotSent):
            await session.apply_refund(refund_request())
        assert await learn(journal, refund, boot_clock()) == refund
        assert (await journal.find("R-1")).state is State.DONE


@pytest.mark.parametrize(("rejected", "theirs"), [(True, "rejected 5002"), (False, "2")])
async def test_learn_raises_a_conflict_for_another_final_state(rejected, theirs, new_journal):
    """The first outcome stays recorded."""
    gateway = sandbox(default_order=None, settle_after=0)
    other = sandbox(settle_after=0)
    other.fail("R-1")
    if not rejected:
        gateway.add_order("O-1", Decimal("10.00"))
    async with other.session(clock=boot_clock) as elsewhere, shop(gateway, new_journal) as (session, journal):
        await session.outcome_of(refund_request())
        news = await elsewhere.apply_refund(refund_request())
        before = await journal.find("R-1")
        with pytest.raises(RefundConflict) as caught:
            await learn(journal, news, boot_clock())
        assert await journal.find("R-1") == before
    assert (caught.value.field, caught.value.ours, caught.value.theirs) == ("sta_refund", "3", theirs)


# ── the entry ────────────────────────────────────────────────────────────────────────────────────


class Overtaken(MemoryJournal):
    """A journal in which another session makes the refund between the first ``find`` and its result."""

    def __init__(self, gateway):
        super().__init__()
        self.gateway = gateway
        self.told = None

    async def find(self, no_refund):
        found = await super().find(no_refund)
        if self.gateway is not None:
            gateway, self.gateway = self.gateway, None
            async with gateway.session(journal=self, clock=boot_clock) as other:
                self.told = await other.apply_refund(refund_request())
        return found


async def test_a_refund_that_is_resolved_between_look_and_begin_is_not_sent():
    """Another call resolved it while this call signed: this call returns that outcome."""
    gateway = sandbox()
    journal = Overtaken(gateway)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        assert await session.apply_refund(refund_request()) == journal.told
    assert gateway.requests == {"apply": 1}


async def test_a_journal_error_after_the_lease_says_that_this_call_sent_nothing():
    """The journal cannot be read, so nobody knows if another worker sent it; ``said`` is this call's own outcome."""
    gateway, journal = sandbox(), Failing()
    limited = gateway.session(journal=journal, clock=boot_clock, limiter=RateLimit(1 / 3600))
    async with limited as session, anyio.create_task_group() as group:
        await session.apply_refund(refund_request(1))

        async def fail():
            await anyio.sleep(1800)
            journal.verbs.add("find")

        group.start_soon(fail)
        with pytest.raises(JournalError) as caught:
            await session.apply_refund(refund_request(2))
    assert isinstance(caught.value.said, RefundNotSent)
    assert caught.value.said.last_error == "the journal failed: journal: the disk is full"


async def test_a_notification_during_the_queries_is_the_outcome(new_journal):
    """A call that cannot learn the outcome returns what a notification has put into the journal meanwhile."""
    gateway = sandbox(settle_after=0)
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    gateway.script(Fault.HTTP_500, call="query", times=1000)

    async def notify():
        await anyio.sleep(5)  # when the only attempt times out
        body = gateway.notification(gateway.refunds[0])
        await learn(journal, Refund.from_dict(wire.decode(body)), boot_clock(), "notification")

    async with shop(gateway, new_journal) as (session, journal), anyio.create_task_group() as tasks:
        tasks.start_soon(notify)
        refund = await session.apply_refund(refund_request(), deadline=10)
        assert refund.is_final
        begun, notified, *exchanges = facts((await journal.find("R-1")).history)
        assert (begun.what, notified.what, notified.result) == ("begun", "notification", "sta_refund 2")
        assert [fact.what for fact in exchanges] == ["apply", "query"]
    assert gateway.times_made("R-1") == 1


async def test_the_journal_shows_that_a_refund_was_sent_again(new_journal):
    """The history has the answer that was believed, and the second send."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    async with shop(gateway, new_journal) as (session, journal):
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request())
        await anyio.sleep(900)
        await session.apply_refund(refund_request())
        steps = [(fact.what, fact.result) for fact in facts((await journal.find("R-1")).history)]
    assert steps == [
        ("begun", ""),
        ("apply", "no answer in time"),
        ("query", "8901"),
        ("lease", ""),
        ("query", "8901"),
        ("resend", ""),
        ("apply", "sta_refund 0"),
    ]
