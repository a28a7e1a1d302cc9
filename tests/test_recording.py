"""A session over a journal: every refund is on record before its first byte, and its end as soon as it is known."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from decimal import Decimal
from typing import ClassVar

import anyio
import httpx
import pytest

from lianlian_async import (
    ConfigurationError,
    Endpoints,
    JournalError,
    Refund,
    RefundConflict,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundRequest,
    RefundSession,
    RefundStatus,
    RetryPolicy,
    SigningKey,
)
from lianlian_async.exchange import Call
from lianlian_async.journal import MemoryJournal, SqliteJournal, State
from lianlian_async.middleware import RateLimit
from lianlian_async.recording import answer, digest, learn
from lianlian_async.recovery import Resumed
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support import keypairs
from tests.support.journals import intent
from tests.support.parties import EPOCH, OID_PARTNER, boot_clock, refund_request, sandbox, wall_clock

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

TRUSTING = RetryPolicy(not_found_grace=0.0)
"""For gateways that are known to deduplicate."""


@pytest.fixture(params=["memory", "sqlite"])
def new_journal(request, tmp_path):
    """Makes journals that remember the same refunds, one after the other: what each process opens."""
    memory = MemoryJournal()
    return lambda: memory if request.param == "memory" else SqliteJournal(tmp_path / "journal.sqlite")


@contextlib.asynccontextmanager
async def shop(gateway, new_journal, **options):
    """One process of a merchant's: a session over an open journal."""
    async with new_journal() as journal, gateway.session(journal=journal, clock=boot_clock, **options) as session:
        yield session, journal


class Wires(httpx.AsyncBaseTransport):
    """The way to the sandbox: keeps every body that was applied with, and is closed while ``closed`` says so."""

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
    """The entry as the next process finds it."""
    async with new_journal() as journal:
        return await journal.find(no_refund)


class SeenKey(SigningKey):
    """A merchant's key that remembers what it signed, but for the nothing that a session measures it with."""

    signed: ClassVar[list[bytes]] = []

    def sign(self, source):
        if source:
            self.signed.append(source)
        return super().sign(source)


@pytest.fixture
def merchant_key(monkeypatch):
    """The merchant's key; it has signed nothing yet."""
    monkeypatch.setattr(SeenKey, "signed", [])
    return SeenKey.load(keypairs.pair("merchant").private_pem)


# ── made ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_refund_is_on_record_before_its_first_byte(new_journal):
    """When the gateway gets to see it, the journal holds it as one that may have been sent; then its end."""
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
    assert answer(resolved) == refund


@pytest.mark.parametrize(("settle_after", "state"), [(0, State.DONE), (60, State.ACCEPTED)])
async def test_a_refund_that_is_settled_is_answered_from_the_record(settle_after, state, new_journal, merchant_key):
    """Asked for again, by another process too: the same refund, no request, no signature."""
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


async def test_a_refund_that_failed_later_is_done(new_journal):
    """Made and failed is an end, too: it is the gateway's record, not an error."""
    gateway = sandbox(settle_after=0)
    gateway.fail("R-1")
    async with shop(gateway, new_journal) as (session, _):
        assert (await session.apply_refund(refund_request())).sta_refund is RefundStatus.FAILED
        assert (await session.apply_refund(refund_request())).sta_refund is RefundStatus.FAILED
    assert gateway.requests == {"apply": 1}


# ── rejected ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("signs", [True, False], ids=["signed", "unsigned"])
async def test_a_rejection_is_recorded_and_raised_again(signs, new_journal, merchant_key):
    """For good is for good: the same error in every respect, no request, no signature."""
    gateway = sandbox(default_order=None, sign_errors=signs, merchant_key=merchant_key)
    async with shop(gateway, new_journal) as (session, _):
        with pytest.raises(RefundRejected) as first:
            await session.apply_refund(refund_request())
    gateway.add_order("O-1", Decimal("10.00"))
    async with shop(gateway, new_journal) as (session, journal):
        with pytest.raises(RefundRejected) as again:
            await session.apply_refund(refund_request())
        assert (await journal.find("R-1")).state is State.REJECTED
    assert vars(again.value) == vars(first.value)
    assert str(again.value) == str(first.value)
    assert again.value.verified is signs
    assert gateway.requests == {"apply": 1}
    assert len(merchant_key.signed) == 1


async def test_a_rejection_that_is_ours_to_mend_is_sent_again_after_the_cure(new_journal, stranger_keys):
    """Refused for our configuration, a refund is as good as new: signed again, with what is right by then."""
    gateway = sandbox()
    ours = gateway.merchant_key.public_key()
    gateway.add_merchant(OID_PARTNER, stranger_keys.public)
    async with shop(gateway, new_journal) as (session, _):
        with pytest.raises(RefundRejected) as caught:
            await session.apply_refund(refund_request())
    assert caught.value.is_configuration
    entry = await standing(new_journal)
    assert (entry.state, entry.sent_at) == (State.UNRESOLVED, None)
    gateway.add_merchant(OID_PARTNER, ours)
    async with shop(gateway, new_journal) as (session, _):
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 2}


async def test_what_was_certainly_not_sent_is_new_again(new_journal):
    """A road that is closed leaves nothing to ask about: next time it is simply sent."""
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
    """Nothing is sent or asked, and what is on record stays as it is."""
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
async def test_another_place_for_the_notification_is_no_other_content(resolved, new_journal):
    """Where notifications go may change between two calls for one refund: the first body stands."""
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
    """What a rehearsal on the sandbox made must never answer for production."""
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
async def test_a_number_that_the_gateway_has_for_another_refund_is_kept_as_a_conflict(repeated, new_journal):
    """Made without a journal, for other money: the conflict is raised each time, and nothing is sent or asked."""
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


async def test_an_unresolved_refund_is_asked_about_first(new_journal):
    """Left unknown and made in the meantime: the next process asks, and finds it."""
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
        assert answer(await journal.find("R-1")) == refund
    assert refund.no_refund == "R-1"
    assert gateway.requests == {"query": 1}


async def test_an_unresolved_refund_is_sent_again_with_the_body_on_record(new_journal):
    """Once its absence is believed, what goes out is byte for byte what went out before, whatever is signed today."""
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
    """Sent again and lost again, a refund is not sent a third time by the age of the first."""
    gateway = sandbox(repeated=Repeated.AGAIN, default_order=Decimal(1000))
    gateway.script(Fault.BAD_GATEWAY, call="apply", when=When.BEFORE)
    gateway.script(Fault.LATE, call="apply", delay=800)
    for pause in (1000, 100, 800, 0):
        async with shop(gateway, new_journal) as (session, _):
            outcome = await session.outcome_of(refund_request())
        await anyio.sleep(pause)
    assert outcome.refund is not None
    assert (gateway.requests["apply"], gateway.times_made("R-1")) == (2, 1)


async def test_a_refund_is_on_record_as_sent_before_it_is_sent_again(new_journal):
    """Whoever finds it after a crash at this moment has to wait for the grace from there on."""
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


async def test_absence_is_not_believed_before_the_grace_has_passed_since_the_last_process_sent(new_journal):
    """The wait counts from what the journal knows: asked too early, the refund stays unknown, and is not sent."""
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


async def test_a_refund_that_is_cancelled_while_it_is_sent_is_unresolved_from_then_on(new_journal):
    """It may arrive until the very end: the time of sending on record is that of the cancellation."""
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
    """``Task.cancel`` while it is sent leaves the refund unresolved as of that moment."""
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


async def test_what_is_known_is_written_even_if_the_caller_is_cancelled_by_then(new_journal):
    """The answer is here when the cancellation comes: the journal learns it all the same."""
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
    """Takes a second to write anything down, and never heard of cancellation."""

    async def begin(self, intent, now):
        await anyio.sleep(1)
        return await super().begin(intent, now)

    async def finish(self, entry, ending):
        await anyio.sleep(1)
        return await super().finish(entry, ending)

    async def release(self, entry, sent_at, refused=None):
        await anyio.sleep(1)
        await super().release(entry, sent_at, refused)


@pytest.mark.parametrize(
    ("fault", "state"),
    [(Fault.DELAY, State.ACCEPTED), (Fault.NO_ANSWER, State.UNRESOLVED)],
    ids=["answered", "not answered"],
)
async def test_a_cancelled_call_ends_when_its_journal_has_written(fault, state):
    """The cancellation waits for the journal, and for nothing else."""
    gateway, journal = sandbox(), Slow()
    gateway.script(fault, delay=0.5)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(2):
            await session.apply_refund(refund_request())
        entry = await journal.find("R-1")
        assert (entry.state, entry.holder) == (state, None)
    assert anyio.current_time() <= 3


async def test_cancelled_while_it_is_written_down_it_was_not_sent():
    """A refund whose intent was cancelled needs not be asked about: it is sent when it is asked for again."""
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
    """Two sessions on one journal, as two parts of one service have them."""
    async with shop(gateway, new_journal) as (session, journal), over(Wires(gateway), gateway, journal) as other:
        yield session, other, journal


async def test_two_sessions_on_one_journal_send_a_refund_once(new_journal):
    """One sends, the others wait for its lease, and all have the refund."""
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
    """Knows how often it was told of an intent."""

    intents = 0

    async def begin(self, intent, now):
        self.intents += 1
        return await super().begin(intent, now)


@pytest.mark.parametrize(("seconds", "most"), [(0.1, 5), (8, 15)])
async def test_a_call_that_waits_for_a_lease_looks_soon_and_then_seldom(seconds, most):
    """A short wait ends shortly after the other call; a long one costs the journal a look each second."""
    gateway, journal = sandbox(faults={Fault.DELAY: 1.0}, delay=seconds), Counting()
    async with two_shops(gateway, lambda: journal) as (one, other, _), anyio.create_task_group() as tasks:
        for session in (one, other):
            tasks.start_soon(session.apply_refund, refund_request())
    assert 3 <= journal.intents <= most
    assert anyio.current_time() <= seconds + min(seconds, 1.0)


async def test_a_call_that_waits_for_a_lease_takes_over_what_was_left_unknown(new_journal):
    """The first call is cancelled: the second one asks, and finds what the first one sent."""
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
    """Another worker has it for longer than the call can wait: unknown, to be asked about when the lease ends."""
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


async def test_after_a_lease_that_is_over_nothing_is_sent(new_journal):
    """Whoever waited so long for a permit that another worker may be at the refund by now leaves it alone."""
    gateway = sandbox()
    hours = RateLimit(1 / 3600)
    async with shop(gateway, new_journal, limiter=hours) as (session, _):
        await session.apply_refund(refund_request(1))
        with pytest.raises(RefundNotSent, match="another worker"):
            await session.apply_refund(refund_request(2))
    assert gateway.requests == {"apply": 1}


async def test_what_another_worker_took_over_is_not_told_as_not_sent(new_journal):
    """It sent nothing itself, but after its lease another worker made the refund."""
    gateway = sandbox()
    async with (
        shop(gateway, new_journal, limiter=RateLimit(1 / 3600)) as (session, journal),
        anyio.create_task_group() as group,
    ):
        await session.apply_refund(refund_request(1))

        async def other_worker():
            await anyio.sleep(1800)
            other = gateway.session(journal=journal, clock=boot_clock)
            async with other:
                await other.apply_refund(refund_request(2))

        group.start_soon(other_worker)
        with pytest.raises(RefundOutcomeUnknown, match="another worker"):
            await session.apply_refund(refund_request(2))
    assert gateway.times_made("R-2") == 1


# ── a journal that fails ─────────────────────────────────────────────────────────────────────────


class Failing(MemoryJournal):
    """Cannot do what ``verbs`` name."""

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

    async def finish(self, entry, ending):
        self._check("finish")
        return await super().finish(entry, ending)

    async def release(self, entry, sent_at, refused=None):
        self._check("release")
        await super().release(entry, sent_at, refused)

    async def pending(self):
        self._check("pending")
        async for entry in super().pending():
            yield entry


@pytest.mark.parametrize("verb", ["find", "begin"])
async def test_a_journal_that_cannot_write_lets_nothing_be_sent(verb):
    """What is not on record is not sent."""
    gateway = sandbox()
    async with gateway.session(journal=Failing(verb), clock=boot_clock) as session:
        with pytest.raises(JournalError, match="full"):
            await session.apply_refund(refund_request())
    assert not gateway.requests


async def test_a_journal_that_was_removed_lets_nothing_be_sent(tmp_path):
    """Writing to a file that nobody will ever read again does not count as being on record."""
    gateway, path = sandbox(), tmp_path / "journal.sqlite"
    async with SqliteJournal(path) as journal, gateway.session(journal=journal, clock=boot_clock) as session:
        path.unlink()
        with pytest.raises(JournalError, match="removed"):
            await session.apply_refund(refund_request())
    assert not gateway.requests


@pytest.mark.parametrize(
    ("fault", "verb"), [(Fault.DELAY, "finish"), (Fault.NO_ANSWER, "release")], ids=["finish", "release"]
)
async def test_a_journal_that_fails_afterwards_is_heard_of_and_the_next_run_finds_the_refund(fault, verb):
    """The end cannot be written: that is raised, the refund stays unresolved, and is asked about when it can be."""
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


async def test_resuming_asks_about_everything_that_is_open(new_journal):
    """Unresolved refunds are resolved, accepted ones become final, and open ones are counted."""
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
    """A number that no new refund may have was accepted once: it is asked about, and ends no resumption."""
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


async def test_an_entry_that_cannot_be_read_ends_no_resumption(new_journal, caplog):
    """It stays open, the log names it, and the others are resolved."""
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


async def test_resuming_settles_rejections_too(new_journal):
    """Refused when it is sent again, a refund has an end like any other."""
    gateway = sandbox(default_order=None)
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    async with shop(gateway, new_journal) as (session, _):
        await session.outcome_of(refund_request())
        await anyio.sleep(1000)
        assert await session.resume() == Resumed(resolved=1, still_open=0)
    assert (await standing(new_journal)).state is State.REJECTED


async def test_resuming_leaves_alone_what_was_certainly_not_sent(new_journal):
    """Whoever was told "not sent" may have refunded by other means: only who asks for it again has it sent."""
    gateway = sandbox()
    wires = Wires(gateway)
    wires.closed = True
    async with new_journal() as journal, over(wires, gateway, journal) as session:
        await session.outcome_of(refund_request())
        wires.closed = False
        assert await session.resume() == Resumed(resolved=0, still_open=0)
    assert not gateway.requests


async def test_resuming_counts_an_accepted_refund_that_cannot_be_asked_about_as_open(new_journal, caplog):
    """A gateway that does not answer leaves it as it was, and the log says so."""
    caplog.set_level("INFO", "lianlian_async")
    gateway = sandbox(settle_after=0.0001)
    async with shop(gateway, new_journal) as (session, journal):
        await session.apply_refund(refund_request())
        gateway.script(Fault.NO_ANSWER, call="query", times=100)
        assert await session.resume() == Resumed(resolved=0, still_open=1)
        assert (await journal.find("R-1")).state is State.ACCEPTED
    assert "refund R-1 is accepted, but its final state is not known" in caplog.text


async def test_resuming_asks_no_more_at_a_time_than_it_may(new_journal):
    """``concurrency`` bounds what is under way."""
    gateway = sandbox(settle_after=1)
    async with shop(gateway, new_journal) as (session, _):
        for number in range(10):
            await session.apply_refund(refund_request(number))
        await anyio.sleep(1)
        gateway.faults = {Fault.DELAY: 1.0}
        began = anyio.current_time()
        assert await session.resume(concurrency=2) == Resumed(resolved=10, still_open=0)
    assert 5 <= anyio.current_time() - began < 6  # a journal lets its batches gather meanwhile


async def test_resuming_with_a_concurrency_that_is_none_is_refused(new_journal):
    """Nobody at work would mean nothing found."""
    async with shop(sandbox(), new_journal) as (session, _):
        with pytest.raises(ConfigurationError, match="concurrency"):
            await session.resume(concurrency=0)


async def test_resuming_without_a_journal_is_refused():
    """There is nothing to resume from."""
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
async def test_resuming_raises_what_the_journal_raises(fault, verb):
    """A journal that fails is heard of as such, whatever is open."""
    gateway, journal = sandbox(settle_after=0.0001), Failing()
    gateway.script(fault, delay=0, when=When.AFTER)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        with anyio.move_on_after(5):
            await session.apply_refund(refund_request())
        journal.verbs.add(verb)
        with pytest.raises(JournalError, match="full"):
            await session.resume()


# ── what the gateway tells unasked ───────────────────────────────────────────────────────────────


async def test_news_does_not_undo_a_conflict(new_journal):
    """Once another refund was told of under the number, a record that agrees raises the conflict on record again."""
    gateway = sandbox(settle_after=0)
    async with shop(gateway, new_journal) as (_, journal):
        async with gateway.session(clock=boot_clock) as other:
            news = await other.apply_refund(refund_request())
        contradiction = Refund.from_dict({**news.raw, "money_refund": "9.00"})
        fields = refund_request().to_dict()
        await journal.begin(intent("R-1", digest=digest(fields), fields=fields), boot_clock())
        for told in (contradiction, news):
            with pytest.raises(RefundConflict) as caught:
                await learn(journal, told)
            assert caught.value.theirs == "9.00"
        assert (await journal.find("R-1")).state is State.CONFLICT


async def test_what_the_gateway_tells_of_a_refund_settles_it(new_journal):
    """News of a refund that is open: its end is on record, and its own ``dt_refund`` stands."""
    gateway = sandbox(settle_after=0)
    gateway.script(Fault.NO_ANSWER, when=When.AFTER)
    async with shop(gateway, new_journal) as (session, journal):
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())
        news = await session.query_refund(refund_request().query())
        assert await learn(journal, news) == await learn(journal, news) == news
        assert answer(await journal.find("R-1")) == await session.apply_refund(refund_request()) == news
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_news_of_a_refund_that_is_not_on_record_is_passed_on(new_journal):
    """Made without this journal, a refund is no business of its."""
    gateway = sandbox()
    async with gateway.session(clock=boot_clock) as session, new_journal() as journal:
        refund = await session.apply_refund(refund_request())
        assert await learn(journal, refund) is refund
        assert await journal.find("R-1") is None


@pytest.mark.parametrize(("rejected", "theirs"), [(True, "rejected 5002"), (False, "2")])
async def test_news_that_contradicts_the_record_is_a_conflict(rejected, theirs, new_journal):
    """The first end stays on record; who tells another one is contradicted."""
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
            await learn(journal, news)
        assert await journal.find("R-1") == before
    assert (caught.value.field, caught.value.ours, caught.value.theirs) == ("sta_refund", "3", theirs)


# ── the record itself ────────────────────────────────────────────────────────────────────────────


async def test_an_entry_that_is_not_settled_has_no_answer(new_journal):
    """Nothing is made up for a refund whose end is not known."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    async with shop(gateway, new_journal) as (session, journal):
        await session.outcome_of(refund_request())
        entry = await journal.find("R-1")
    with pytest.raises(LookupError, match="R-1"):
        answer(entry)


class Overtaken(MemoryJournal):
    """Between the first look for a refund and its answer, another session has the same refund made."""

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


async def test_a_refund_that_is_settled_between_look_and_intent_is_not_sent():
    """Another call came to the end while this one signed: its answer is the answer."""
    gateway = sandbox()
    journal = Overtaken(gateway)
    async with gateway.session(journal=journal, clock=boot_clock) as session:
        assert await session.apply_refund(refund_request()) == journal.told
    assert gateway.requests == {"apply": 1}


async def test_a_journal_that_fails_after_a_lease_tells_that_this_call_sent_nothing():
    """Whether another worker took the refund over cannot be read, and the error says what is known."""
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
