"""Batches: one outcome for each request, bounded memory and concurrency, and an early end that loses no refund."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from datetime import timedelta
from decimal import Decimal

import anyio
import anyio.lowlevel
import attrs
import httpx
import pytest

from lianlian_async import (
    BatchStopped,
    ConfigurationError,
    InvalidRequest,
    JournalError,
    LianLianError,
    RefundConflict,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundQuery,
    RefundRejected,
    RefundSession,
    RetryPolicy,
    SignatureInvalid,
    refund_many,
)
from lianlian_async.journal import MemoryJournal, State
from lianlian_async.sandbox import Fault, When
from tests.support.interruptions import Abort, stray_cancellation
from tests.support.parties import EPOCH, boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

SLOW = {"faults": {Fault.DELAY: 1.0}, "delay": 1.0}
"""A gateway that takes a second for every answer."""


class Source:
    """Yields ``count`` requests; records how many were read, and whether it was closed."""

    def __init__(self, count=10**9, *, then=None):
        self.count = count
        self.then = then
        self.taken = 0
        self.closed = False

    def __iter__(self):
        for number in range(1, self.count + 1):
            self.taken += 1
            yield refund_request(number)
        if self.then is not None:
            raise self.then

    async def unhurried(self):
        """Like ``__iter__``; after the last request it raises the given exception, or waits for ever."""
        try:
            for number in range(1, self.count + 1):
                self.taken += 1
                yield refund_request(number)
            if self.then is not None:
                raise self.then
            await anyio.sleep_forever()
        finally:
            self.closed = True


class Road(httpx.AsyncBaseTransport):
    """A transport to the sandbox that counts concurrent requests, and refuses connections for numbers in ``closed``."""

    def __init__(self, gateway, *, closed=()):
        self.inner = httpx.ASGITransport(app=gateway)
        self.closed = closed
        self.under_way = 0
        self.most = 0

    async def handle_async_request(self, request):
        body = await request.aread()
        if any(f'"no_refund":"{number}"'.encode() in body for number in self.closed):
            raise httpx.ConnectError("road closed")
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self.inner.handle_async_request(request)
        finally:
            self.under_way -= 1


def session_with(gateway, **options):
    return gateway.session(clock=boot_clock, **options)


def numbers(outcomes):
    return sorted(int(outcome.request.no_refund[2:]) for outcome in outcomes)


async def collect(batch, outcomes):
    """Append the outcomes of ``batch`` to ``outcomes``, also those before an exception."""
    async for outcome in batch:
        outcomes.append(outcome)


def distrust(gateway, key):
    """Give the gateway another key for the merchant: from now on it rejects every request for the configuration."""
    gateway.merchant_key = key.private


async def entries_of(journal, source):
    """Return the journal's entries for the requests that ``source`` yielded, by number."""
    entries = {number: await journal.find(f"R-{number}") for number in range(1, source.taken + 1)}
    return {number: entry for number, entry in entries.items() if entry is not None}


# ── one outcome for each ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["list", "generator", "async generator", "async iterator"])
async def test_requests_may_be_any_iterable(kind):
    """Each request has one outcome."""
    gateway = sandbox()
    source = Source(30, then=LookupError("the end"))
    send, receive = anyio.create_memory_object_stream(30)
    with send, receive:
        for request in map(refund_request, range(1, 31)):
            send.send_nowait(request)
        send.close()
        requests = {
            "list": [refund_request(number) for number in range(1, 31)],
            "generator": (refund_request(number) for number in range(1, 31)),
            "async generator": source.unhurried(),
            "async iterator": receive,
        }
        async with session_with(gateway) as session:
            outcomes = []
            with suppress(LookupError):
                await collect(refund_many(session, requests[kind]), outcomes)
    assert numbers(outcomes) == list(range(1, 31))
    assert all(outcome.refund.no_refund == outcome.request.no_refund for outcome in outcomes)
    assert all((outcome.error, outcome.attempts, outcome.queries) == (None, 1, 0) for outcome in outcomes)
    assert gateway.requests == {"apply": 30}


async def test_an_empty_batch_has_no_outcome():
    """No requests: no outcomes and no traffic."""
    gateway = sandbox()
    async with session_with(gateway) as session:
        assert [outcome async for outcome in refund_many(session, [])] == []
    assert not gateway.requests


async def test_an_error_of_one_refund_does_not_affect_the_others():
    """Rejected, unknown, not sent, conflict, invalid: each is the outcome of its request; the others are made."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, no_refund="R-3", when=When.BEFORE)
    journal = MemoryJournal()
    special = {
        2: refund_request(2, money_refund=Decimal("10.01")),
        5: refund_request(1, money_refund=Decimal("1.00")),
    }
    requests = [special.get(number) or refund_request(number) for number in range(1, 9)]
    transport = Road(gateway, closed=["R-4"])
    async with RefundSession(gateway.merchant(), transport=transport, clock=boot_clock, journal=journal) as session:
        outcomes = {outcome.request: outcome async for outcome in refund_many(session, requests, concurrency=2)}
    assert list(map(type, (outcomes[request].error for request in requests))) == [
        type(None),
        RefundRejected,
        RefundOutcomeUnknown,
        RefundNotSent,
        RefundConflict,
        *[type(None)] * 3,
    ]
    assert all((outcome.refund is None) is (outcome.error is not None) for outcome in outcomes.values())
    assert [outcomes[request].attempts for request in requests] == [1, 1, 1, 4, 0, 1, 1, 1]
    assert outcomes[requests[2]].queries > 1
    assert outcomes[requests[2]].seconds > 10
    assert [gateway.times_made(f"R-{number}") for number in range(1, 9)] == [1, 0, 0, 0, 0, 1, 1, 1]


async def test_an_invalid_request_has_an_outcome():
    """A request that is refused before it is sent does not stop the others."""
    gateway = sandbox()
    async with RefundSession(
        gateway.merchant(notify_url=None), transport=httpx.ASGITransport(app=gateway), clock=boot_clock
    ) as session:
        requests = [refund_request(1), refund_request(2, notify_url="https://shop.example/refund")]
        outcomes = [outcome async for outcome in refund_many(session, requests)]
    assert {outcome.request.no_refund: type(outcome.error) for outcome in outcomes} == {
        "R-1": InvalidRequest,
        "R-2": type(None),
    }


async def test_the_same_request_twice_is_made_once():
    """With a journal, a refund that is twice in a batch is made once, and both outcomes have it."""
    gateway = sandbox(**SLOW)
    async with session_with(gateway, journal=MemoryJournal()) as session:
        outcomes = [outcome async for outcome in refund_many(session, [refund_request(1), refund_request(1)])]
    assert outcomes[0].refund == outcomes[1].refund is not None
    assert sorted(outcome.attempts for outcome in outcomes) == [0, 1]
    assert gateway.requests == {"apply": 1}


async def test_two_batches_share_a_session():
    """Two concurrent batches of the same requests on one session and journal make each refund once."""
    gateway = sandbox(**SLOW)
    told = [[], []]

    async def run(session, outcomes):
        await collect(refund_many(session, Source(20), concurrency=4), outcomes)

    async with session_with(gateway, journal=MemoryJournal()) as session, anyio.create_task_group() as tasks:
        for outcomes in told:
            tasks.start_soon(run, session, outcomes)
    assert numbers(told[0]) == numbers(told[1]) == list(range(1, 21))
    assert all(outcome.refund is not None for outcomes in told for outcome in outcomes)
    assert gateway.requests["apply"] == 20


async def test_the_journal_of_a_batch_overrides_the_sessions():
    """``journal=`` of the batch is used."""
    gateway, session_s, batch_s = sandbox(), MemoryJournal(), MemoryJournal()
    async with session_with(gateway, journal=session_s) as session:
        outcomes = [outcome async for outcome in refund_many(session, [refund_request()], journal=batch_s)]
    assert outcomes[0].refund is not None
    assert await session_s.find("R-1") is None
    assert (await batch_s.find("R-1")).state is State.ACCEPTED


async def test_a_second_run_returns_the_recorded_outcomes():
    """A finished batch that runs again with its journal sends and queries nothing."""
    gateway, journal = sandbox(), MemoryJournal()
    async with session_with(gateway, journal=journal) as session:
        first = [outcome async for outcome in refund_many(session, Source(10), concurrency=1)]
        again = [outcome async for outcome in refund_many(session, Source(10), concurrency=1)]
    assert [outcome.refund for outcome in again] == [outcome.refund for outcome in first]
    assert {outcome.attempts for outcome in again} == {0}
    assert gateway.requests == {"apply": 10}


# ── bounds ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("concurrency", "bound", "seconds"), [(1, 1, 30), (3, 3, 10), (None, 5, 7)])
async def test_a_batch_respects_its_concurrency(concurrency, bound, seconds):
    """At most ``concurrency`` refunds run concurrently, by default as many as the session has connections.

    Until an answer has verified, in the first second, at most 4 run.
    """
    gateway = sandbox(**SLOW)
    road = Road(gateway)
    async with RefundSession(gateway.merchant(), transport=road, clock=boot_clock, max_connections=5) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(30), concurrency=concurrency)]
    assert len(outcomes) == 30
    assert road.most == bound
    assert anyio.current_time() == seconds


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, "4"])
async def test_an_invalid_concurrency_is_refused_at_once(concurrency):
    """The call raises before any iteration."""
    async with session_with(sandbox()) as session:
        with pytest.raises(ConfigurationError, match="concurrency"):
            refund_many(session, [], concurrency=concurrency)


async def test_a_batch_starts_at_its_first_iteration():
    """A batch that is not iterated reads no request, and does not warn."""
    gateway, source = sandbox(), Source()
    async with session_with(gateway) as session:
        refund_many(session, source)
        await anyio.wait_all_tasks_blocked()
    assert source.taken == 0


async def test_requests_are_read_only_as_fast_as_outcomes():
    """With an hour between two outcomes, at most one more request per worker is read than outcomes."""
    gateway, source = sandbox(), Source(20)
    told = 0
    async with session_with(gateway) as session:
        async for _ in refund_many(session, source, concurrency=3):
            told += 1
            await anyio.sleep(3600)
            assert source.taken <= told + 3
    assert told == 20


async def test_a_timeout_for_an_outcome_loses_none():
    """A consumer that often times out still gets every outcome."""
    gateway = sandbox(**SLOW)
    outcomes, timeouts = [], 0
    async with (
        session_with(gateway) as session,
        aclosing(refund_many(session, Source(10), concurrency=2)) as batch,
    ):
        while True:
            try:
                with anyio.fail_after(0.25):
                    outcomes.append(await anext(batch))
            except TimeoutError:
                timeouts += 1
            except StopAsyncIteration:
                break
    assert numbers(outcomes) == list(range(1, 11))
    assert timeouts > 10


# ── an early end ─────────────────────────────────────────────────────────────────────────────────


async def leave_by_break(session, source, outcomes):
    async for outcome in refund_many(session, source, concurrency=4):
        outcomes.append(outcome)
        if len(outcomes) == 6:
            break


async def leave_by_aclose(session, source, outcomes):
    batch = refund_many(session, source, concurrency=4)
    async for outcome in batch:
        outcomes.append(outcome)
        if len(outcomes) == 6:
            await batch.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(batch)


async def leave_by_block(session, source, outcomes):
    with suppress(LookupError):
        async with aclosing(refund_many(session, source, concurrency=4)) as batch:
            async for outcome in batch:
                outcomes.append(outcome)
                if len(outcomes) == 6:
                    raise LookupError


async def leave_by_dropping(session, source, outcomes):
    batch = refund_many(session, source, concurrency=4)
    for _ in range(6):
        outcomes.append(await anext(batch))
    del batch


async def leave_by_cancellation(session, source, outcomes):
    with anyio.CancelScope() as scope:
        async for outcome in refund_many(session, source, concurrency=4):
            outcomes.append(outcome)
            if len(outcomes) == 6:
                scope.cancel()


async def leave_by_deadline(session, source, outcomes):
    with anyio.move_on_after(1.5):
        await collect(refund_many(session, source, concurrency=4), outcomes)


ways_out = pytest.mark.parametrize(
    "leave",
    [leave_by_break, leave_by_aclose, leave_by_block, leave_by_dropping, leave_by_cancellation, leave_by_deadline],
    ids=lambda leave: leave.__name__[9:],
)


@ways_out
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_an_early_end_reads_no_further_request_and_loses_none(leave, kind):
    """However the loop ends, begun refunds are in the journal, and nothing more is sent or queried."""
    gateway, journal, source, outcomes = sandbox(**SLOW), MemoryJournal(), Source(), []
    async with session_with(gateway, journal=journal) as session:
        await leave(session, source if kind == "plain" else source.unhurried(), outcomes)
        await anyio.wait_all_tasks_blocked()
        taken, requests = source.taken, dict(gateway.requests)
        await anyio.sleep(3600)
    assert (source.taken, dict(gateway.requests)) == (taken, requests)
    assert taken <= len(outcomes) + 4
    assert source.closed is (kind == "async")
    entries = await entries_of(journal, source)
    assert {entry.state for entry in entries.values()} <= {State.UNRESOLVED, State.ACCEPTED}
    assert all(entries[number].state is State.ACCEPTED for number in numbers(outcomes))
    made = {number for number in range(1, 10_000) if gateway.times_made(f"R-{number}")}
    assert set(numbers(outcomes)) <= made <= {number for number, entry in entries.items() if entry.sent_at is not None}
    assert all(entry.holder is None for entry in entries.values())


@ways_out
async def test_after_an_early_end_a_second_run_completes_the_batch(leave):
    """A second run with the same journal makes every refund once and yields its outcome."""
    gateway, journal, outcomes = sandbox(**SLOW), MemoryJournal(), []
    async with session_with(gateway, journal=journal, retry=RetryPolicy(not_found_grace=0.0)) as session:
        await leave(session, Source(20), outcomes)
        outcomes = [outcome async for outcome in refund_many(session, Source(20))]
    assert numbers(outcomes) == list(range(1, 21))
    assert all(outcome.refund is not None for outcome in outcomes)
    assert [gateway.times_made(f"R-{number}") for number in range(1, 21)] == [1] * 20


async def test_closing_a_batch_waits_for_its_requests():
    """After ``aclose`` no request is under way, and the journal has the time of the last send."""
    gateway, journal, source = sandbox(**SLOW), MemoryJournal(), Source()
    road = Road(gateway)
    async with RefundSession(gateway.merchant(), transport=road, clock=boot_clock, journal=journal) as session:
        batch = refund_many(session, source, concurrency=4)
        await anext(batch)
        await anyio.sleep(0.5)
        assert road.under_way
        await batch.aclose()
        assert not road.under_way
        entries = await entries_of(journal, source)
    assert len(entries) > 4
    assert {entry.holder for entry in entries.values()} == {None}


async def test_a_native_cancellation_ends_a_batch_before_the_session_closes(anyio_backend_name):
    """After ``Task.cancel`` of asyncio, running refunds are recorded before the session is closed."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no such cancellation")
    gateway, journal, source = sandbox(**SLOW), MemoryJournal(), Source()

    async def run():
        async with session_with(gateway, journal=journal) as session:
            async for _ in refund_many(session, source, concurrency=4):
                pass

    task = asyncio.create_task(run())
    await asyncio.sleep(1.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert anyio.current_time() == 1.5
    begun = {number: (entry.state, entry.holder) for number, entry in (await entries_of(journal, source)).items()}
    assert begun == {number: (State.ACCEPTED if number < 5 else State.UNRESOLVED, None) for number in range(1, 9)}
    assert (await journal.find("R-5")).sent_at.boot == 1.5


async def test_a_batch_that_is_closed_first_is_empty():
    """If it is iterated after ``aclose``, no request is read and nothing is sent."""
    gateway, source = sandbox(), Source()
    async with session_with(gateway) as session:
        batch = refund_many(session, source)
        await batch.aclose()
        assert [outcome async for outcome in batch] == []
    assert (source.taken, dict(gateway.requests)) == (0, {})


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_batch_that_outlives_its_event_loop_does_not_warn(backend):
    """Deleting the iterator after the end of its loop causes no warning and no error."""
    source = Source()

    async def main():
        gateway = sandbox(clock=lambda: 0.0)
        async with gateway.session() as session:
            batch = refund_many(session, source, concurrency=2)
            await anext(batch)
            return batch

    batch = anyio.run(main, backend=backend)
    taken = source.taken
    del batch
    assert source.taken == taken <= 3


# ── the requests themselves ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("count", [0, 1, 5])
async def test_an_exception_of_the_requests_is_raised_after_the_outcomes(kind, count):
    """The requests before it have their outcomes; then the exception is raised once, unchanged."""
    gateway = sandbox(**SLOW)
    failure = LookupError("line 7 of the file")
    source = Source(count, then=failure)
    outcomes = []
    async with session_with(gateway) as session:
        batch = refund_many(session, source if kind == "plain" else source.unhurried(), concurrency=2)
        with pytest.raises(LookupError) as caught:
            await collect(batch, outcomes)
        with pytest.raises(StopAsyncIteration):
            await anext(batch)
    assert caught.value is failure
    assert numbers(outcomes) == list(range(1, count + 1))
    assert all(outcome.refund is not None for outcome in outcomes)


@pytest.mark.parametrize("count", [6, 10**9], ids=["waits for a request", "waits for a worker"])
async def test_requests_may_use_cancel_scopes_of_their_own(count):
    """An async generator with its own scopes and tasks is iterated and closed in one task."""
    gateway, source = sandbox(**SLOW), Source(count)

    async def scoped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            with anyio.fail_after(3600):
                async with aclosing(source.unhurried()) as requests:
                    async for request in requests:
                        yield request

    async with (
        session_with(gateway) as session,
        aclosing(refund_many(session, scoped(), concurrency=3)) as batch,
    ):
        for _ in range(5):
            assert (await anext(batch)).refund is not None
        await anyio.sleep(0.5)
    assert source.closed


async def test_exceptions_of_the_requests_own_tasks_are_raised():
    """Tasks of the requests that fail when they are closed: their exceptions are raised as a group."""
    gateway = sandbox()

    async def fails():
        try:
            await anyio.sleep_forever()
        finally:
            raise LookupError("the file is gone")

    async def scoped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fails)
            for number in range(1, 6):
                yield refund_request(number)
            await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()

    outcomes = []
    async with session_with(gateway) as session:
        with pytest.raises(ExceptionGroup) as caught:
            await collect(refund_many(session, scoped(), concurrency=3), outcomes)
    assert caught.group_contains(LookupError, match="gone")
    assert numbers(outcomes) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("item", ["R-2", {"no_refund": "R-2"}, None])
async def test_an_item_that_is_no_request_has_an_outcome(item):
    """The outcome has ``InvalidRequest``, and the other refunds are made."""
    gateway = sandbox(**SLOW)
    outcomes = []
    async with session_with(gateway) as session:
        await collect(refund_many(session, [refund_request(1), item, refund_request(3)], concurrency=2), outcomes)
    [wrong] = [outcome for outcome in outcomes if outcome.error is not None]
    assert wrong.request is item
    assert isinstance(wrong.error, InvalidRequest)
    assert wrong.attempts == 0
    assert {outcome.refund.no_refund for outcome in outcomes if outcome is not wrong} == {"R-1", "R-3"}


@pytest.mark.parametrize("requests", [refund_request(1), "R-1", {"no_refund": "R-1"}, None, 5])
async def test_an_argument_that_is_no_iterable_of_requests_is_refused_at_once(requests):
    """A single request, a string, a mapping or None raises, and nothing is sent."""
    gateway = sandbox()
    async with session_with(gateway) as session:
        with pytest.raises(InvalidRequest, match="requests: must be an iterable of RefundRequest"):
            refund_many(session, requests)
    assert gateway.requests == {}
    with pytest.raises(ConfigurationError, match="session: must be of type RefundSession, not SandboxGateway"):
        refund_many(gateway, [refund_request(1)])
    with pytest.raises(ConfigurationError, match="journal: must be a journal, such as SqliteJournal"):
        refund_many(session, [refund_request(1)], journal="refunds.db")


# ── what stops a batch ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_rejection_by_configuration_stops_the_batch(kind, stranger_keys):
    """A wrong key: running refunds have their outcomes, no further request is read, and the reason is raised."""
    gateway, outcomes = sandbox(), []
    source = Source(10_000 if kind == "plain" else 2)
    async with session_with(gateway) as session:
        distrust(gateway, stranger_keys)
        requests = source if kind == "plain" else source.unhurried()
        with pytest.raises(BatchStopped, match="1001") as caught:
            await collect(refund_many(session, requests, concurrency=3), outcomes)
    assert source.taken == len(outcomes) == gateway.requests["apply"] <= 3
    assert all(outcome.error.is_configuration for outcome in outcomes)
    assert caught.value.cause is outcomes[0].error


@pytest.mark.parametrize("ret_code", ["5006", "9104"])
async def test_an_empty_balance_stops_the_batch_and_the_same_refunds_are_made_after_the_top_up(ret_code):
    """Nothing more is sent until the balance is topped up; then the same numbers are sent, each once."""
    gateway, outcomes = sandbox(), []
    gateway.script(Fault.BUSY, ret_code=ret_code, when=When.BEFORE, call="apply")
    async with session_with(gateway) as session:
        with pytest.raises(BatchStopped, match="send the same refund again") as caught:
            await collect(refund_many(session, Source(5), concurrency=1), outcomes)
        assert (len(outcomes), gateway.requests["apply"]) == (1, 1)
        assert caught.value.cause.may_pass
        assert not caught.value.cause.is_configuration
        outcomes.clear()
        await collect(refund_many(session, Source(5), concurrency=1), outcomes)
    assert [gateway.times_made(outcome.request.no_refund) for outcome in outcomes] == [1] * 5


async def test_a_limit_of_one_refund_does_not_stop_the_batch():
    """Other refunds may be within the limit."""
    gateway, outcomes = sandbox(), []
    gateway.script(Fault.BUSY, ret_code="1016", when=When.BEFORE, call="apply")
    async with session_with(gateway) as session:
        await collect(refund_many(session, Source(5), concurrency=1), outcomes)
    assert [outcome.refund is None for outcome in outcomes] == [True, False, False, False, False]
    assert outcomes[0].error.may_pass


async def test_running_refunds_finish_when_the_batch_stops(stranger_keys):
    """Refunds that the gateway is processing get their outcomes."""
    gateway, outcomes = sandbox(), []
    gateway.script(Fault.DELAY, no_refund="R-1", delay=5)
    async with session_with(gateway) as session:
        batch = refund_many(session, Source(), concurrency=2)
        while not gateway.times_made("R-1"):
            outcomes.append(await anext(batch))
        distrust(gateway, stranger_keys)
        with pytest.raises(BatchStopped):
            await collect(batch, outcomes)
    assert outcomes[-1].request.no_refund == "R-1"
    assert outcomes[-1].refund is not None
    assert anyio.current_time() == 5


async def test_keep_going_continues_after_rejections_by_configuration(stranger_keys):
    """With ``keep_going`` such a rejection is an ordinary outcome."""
    gateway = sandbox()
    async with session_with(gateway) as session:
        distrust(gateway, stranger_keys)
        outcomes = [outcome async for outcome in refund_many(session, Source(10), keep_going=True)]
    assert numbers(outcomes) == list(range(1, 11))
    assert {outcome.error.ret_code for outcome in outcomes} == {"1001"}


async def test_a_rejection_of_one_request_does_not_stop_the_batch():
    """A missing order concerns one refund only."""
    gateway = sandbox(default_order=None)
    gateway.add_order("O-7", Decimal("10.00"))
    async with session_with(gateway) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(10))]
    assert [outcome.request.no_refund for outcome in outcomes if outcome.refund] == ["R-7"]
    assert {outcome.error.ret_code for outcome in outcomes if outcome.error} == {"5002"}


class FullDisk(MemoryJournal):
    """A journal that fails after a number of refunds."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    async def begin(self, intent, now):
        if not self.room:
            raise JournalError("journal: the disk is full")
        self.room -= 1
        return await super().begin(intent, now)


async def test_a_journal_that_cannot_write_stops_the_batch():
    """No refund is sent without a record; begun refunds have their outcomes, then the journal's error is raised."""
    gateway, journal, source, outcomes = sandbox(**SLOW), FullDisk(5), Source(100), []
    async with session_with(gateway, journal=journal) as session:
        with pytest.raises(JournalError, match="full"):
            await collect(refund_many(session, source, concurrency=2), outcomes)
    assert source.taken == len(outcomes) <= 5 + 2
    assert gateway.requests == {"apply": 5}
    assert sum(outcome.refund is not None for outcome in outcomes) == 5


async def test_a_batch_on_a_session_that_is_not_open_raises():
    """It sends nothing, and raises the error of the session."""
    gateway = sandbox()
    session = session_with(gateway)
    with pytest.raises(RuntimeError, match="is not open: use it"):
        refund_many(session, Source())
    async with session:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        refund_many(session, Source())
    assert not gateway.requests


# ── unknown refunds ──────────────────────────────────────────────────────────────────────────────


async def test_wait_unknown_queries_again_at_ask_again_at():
    """After all other refunds: found, or sent again and made; one outcome with the sums of both calls."""
    gateway = sandbox()
    gateway.script(Fault.LATE, no_refund="R-2", delay=100)
    gateway.script(Fault.NO_ANSWER, no_refund="R-3", when=When.BEFORE)
    async with session_with(gateway) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(6), concurrency=2, wait_unknown=True)]
    assert [outcome.request.no_refund for outcome in outcomes[:4]] == ["R-1", "R-4", "R-5", "R-6"]
    late, again = sorted(outcomes[4:], key=lambda outcome: outcome.request.no_refund)
    assert (late.refund.no_refund, late.attempts) == ("R-2", 1)
    assert (again.refund.no_refund, again.attempts) == ("R-3", 2)
    assert late.queries > 3 < again.queries
    assert 10 < late.seconds < 60
    assert anyio.current_time() >= 900
    assert [gateway.times_made(f"R-{number}") for number in range(1, 7)] == [1] * 6


@pytest.mark.parametrize("hours", [-24, 24], ids=["back", "forward"])
async def test_wait_unknown_ignores_steps_of_the_wall_clock(hours):
    """The wait until ``ask_again_at`` is measured on the boot clock."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, no_refund="R-1", when=When.BEFORE)

    def clock():
        now = boot_clock()
        return attrs.evolve(now, wall=now.wall + timedelta(hours=hours if now.boot > 60 else 0))

    async def requests():
        yield refund_request(1)
        await anyio.sleep(100)

    async with gateway.session(clock=clock) as session:
        [outcome] = [outcome async for outcome in refund_many(session, requests(), wait_unknown=True)]
    assert outcome.refund.no_refund == "R-1"
    assert 900 < anyio.current_time() < 1000


async def test_by_default_an_unknown_refund_is_an_outcome():
    """Without ``wait_unknown`` it is yielded at its deadline."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    async with session_with(gateway) as session:
        (outcome,) = [outcome async for outcome in refund_many(session, [refund_request()])]
    assert isinstance(outcome.error, RefundOutcomeUnknown)
    assert anyio.current_time() < 60


async def test_an_unknown_refund_is_queried_even_after_its_ask_again_at():
    """With one worker, the queries for the first refund last beyond the ``ask_again_at`` of the second."""
    gateway = sandbox()
    for number in (1, 2):
        gateway.script(Fault.RESET, call="apply", no_refund=f"R-{number}")
    gateway.script(Fault.RESET, call="query", times=1000)
    async with session_with(gateway) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(2), concurrency=1, wait_unknown=True)]
    assert [type(outcome.error) for outcome in outcomes] == [RefundOutcomeUnknown] * 2
    assert [outcome.attempts for outcome in outcomes] == [1, 1]
    assert [gateway.times_made("R-1"), gateway.times_made("R-2")] == [1, 1]


async def test_a_batch_that_stops_does_not_wait_for_unknown_refunds(stranger_keys):
    """Refunds that were unknown before the stop are yielded at once."""
    gateway, outcomes = sandbox(), []
    gateway.script(Fault.NO_ANSWER, no_refund="R-1", when=When.BEFORE)
    async with session_with(gateway) as session:
        batch = refund_many(session, Source(50), concurrency=2, wait_unknown=True)
        for second in range(40):
            outcomes.append(await anext(batch))
            await anyio.sleep(second + 1 - anyio.current_time())
        distrust(gateway, stranger_keys)
        with pytest.raises(BatchStopped):
            await collect(batch, outcomes)
    assert numbers(outcomes) == list(range(1, len(outcomes) + 1))
    assert isinstance(outcomes[-1].error, RefundOutcomeUnknown)
    assert outcomes[-1].request.no_refund == "R-1"
    assert anyio.current_time() < 100


async def test_a_batch_that_stops_while_it_resolves_yields_the_rest_as_unknown():
    """A resend is rejected for the configuration: refunds whose ``ask_again_at`` is later are yielded now."""
    gateway, outcomes = sandbox(), []
    gateway.script(Fault.NO_ANSWER, no_refund="R-1", when=When.BEFORE)
    gateway.script(Fault.BUSY, no_refund="R-1", when=When.BEFORE, call="apply", ret_code="1001")
    gateway.script(Fault.NO_ANSWER, no_refund="R-2", when=When.BEFORE)

    async def requests():
        yield refund_request(1)
        await anyio.sleep(800)
        yield refund_request(2)

    async with session_with(gateway) as session:
        with pytest.raises(BatchStopped, match="1001"):
            await collect(refund_many(session, requests(), wait_unknown=True), outcomes)
    assert [type(outcome.error) for outcome in outcomes] == [RefundRejected, RefundOutcomeUnknown]
    assert numbers(outcomes) == [1, 2]
    assert 900 < anyio.current_time() < 1000


async def test_a_session_that_closes_before_the_last_queries_loses_no_outcome():
    """Unknown refunds that cannot be queried again are yielded as unknown, then the error is raised."""
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, when=When.BEFORE)
    async with session_with(gateway) as session:
        batch = refund_many(session, [refund_request()], wait_unknown=True)
        with anyio.move_on_after(60):
            await anext(batch)
    outcome = await anext(batch)
    assert isinstance(outcome.error, RefundOutcomeUnknown)
    with pytest.raises(RuntimeError, match="closed"):
        await anext(batch)


# ── ends that are errors ─────────────────────────────────────────────────────────────────────────


async def ended(outcomes):
    """Return the numbers of the yielded outcomes, and the error that ended the iteration."""
    told, error = [], None
    try:
        await collect(outcomes, told)
    except BaseException as raised:  # noqa: BLE001 - which kind it is, the test says
        error = raised
    return [outcome.request.no_refund for outcome in told], error


async def test_a_base_exception_of_a_middleware_ends_the_iteration():
    """It is raised after the outcomes of all begun refunds."""

    async def middleware(exchange, forward):
        if exchange.asked["no_refund"] == "R-3":
            raise Abort("the end")
        return await forward(exchange)

    async with sandbox(**SLOW).session(max_connections=5, middleware=[middleware]) as session:
        numbers, error = await ended(refund_many(session, Source(30)))
    assert isinstance(error, Abort)
    assert sorted(numbers) == ["R-1", "R-2", "R-4"]


async def test_requests_that_raise_a_cancellation_end_the_iteration_with_an_error():
    """A stray cancellation from the requests does not count as their end."""

    async def source():
        for number in range(1, 4):
            yield refund_request(number)
        await stray_cancellation()

    async with sandbox().session() as session:
        numbers, error = await ended(refund_many(session, source()))
    assert sorted(numbers) == ["R-1", "R-2", "R-3"]
    assert isinstance(error, LianLianError)
    assert "cancelled from outside" in str(error)


async def test_system_exit_in_a_middleware_ends_the_batch(anyio_backend_name):
    """``SystemExit`` does not wait for other refunds; on asyncio it also ends the event loop."""
    if anyio_backend_name == "asyncio":
        pytest.skip("asyncio raises it out of the event loop: see test_process_ends")

    async def middleware(exchange, forward):
        if exchange.asked["no_refund"] == "R-3":
            raise SystemExit(7)
        return await forward(exchange)

    async with sandbox(**SLOW).session(max_connections=5, middleware=[middleware]) as session:
        numbers, error = await ended(refund_many(session, Source(30)))
    assert isinstance(error, SystemExit)
    assert numbers == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_batch_whose_task_is_cancelled_ends_with_an_error(anyio_backend):
    """``Task.cancel`` on every task except the consumer's does not count as the end of the batch."""
    async with sandbox(faults={Fault.NO_ANSWER: 1.0}).session() as session:
        outcomes = refund_many(session, Source(30))
        consumer = asyncio.create_task(ended(outcomes))
        await anyio.wait_all_tasks_blocked()
        outcomes._background._task.cancel()
        numbers, error = await consumer
    assert numbers == []
    assert isinstance(error, LianLianError)
    assert "cancelled from outside" in str(error)


# ── answers that do not verify ───────────────────────────────────────────────────────────────────


def distrusting(gateway, stranger_keys, **options):
    """A session with a wrong key of the gateway."""
    merchant = gateway.merchant(gateway_public_keys=stranger_keys.public)
    return RefundSession(merchant, transport=httpx.ASGITransport(app=gateway), clock=boot_clock, **options)


@pytest.mark.parametrize("options", [{}, {"wait_unknown": True}, {"keep_going": True}, {"concurrency": 1}])
async def test_a_wrong_gateway_key_stops_a_batch_early(stranger_keys, options):
    """Four of 60 refunds are made and yielded as unknown, and the error names the key."""
    gateway, source, outcomes = sandbox(), Source(60), []
    async with distrusting(gateway, stranger_keys) as session:
        with pytest.raises(BatchStopped, match="gateway_public_keys") as caught:
            await collect(refund_many(session, source, **options), outcomes)
    assert isinstance(caught.value.cause, SignatureInvalid)
    assert numbers(outcomes) == [1, 2, 3, 4]
    assert all(isinstance(outcome.error, RefundOutcomeUnknown) for outcome in outcomes)
    assert (source.taken, gateway.requests["apply"]) == (4, 4)


async def test_a_gateway_that_signs_nothing_stops_a_batch_early():
    """0000 without a signature proves nothing."""
    gateway, outcomes = sandbox(faults={Fault.NO_SIGNATURE: 1.0}), []
    async with session_with(gateway) as session:
        with pytest.raises(BatchStopped, match="has no signature") as caught:
            await collect(refund_many(session, Source(60)), outcomes)
    assert len(outcomes) == 4
    assert caught.value.last_exchange.status == 200


async def test_a_key_rotation_during_a_batch_stops_it(stranger_keys):
    """Four refunds in a row stop it, although earlier answers verified."""
    gateway, outcomes = sandbox(), []
    async with session_with(gateway, max_connections=2) as session:
        batch = refund_many(session, Source(60))
        while len(outcomes) < 20:
            outcomes.append(await anext(batch))
        gateway.gateway_key = stranger_keys.private
        with pytest.raises(BatchStopped, match="gateway_public_keys"):
            await collect(batch, outcomes)
    assert sum(outcome.error is not None for outcome in outcomes) in (4, 5)
    assert len(outcomes) < 30


async def test_rejections_without_signature_say_nothing_about_the_key():
    """Only unsigned rejections do not stop the batch, but few refunds run concurrently."""
    gateway = sandbox(sign_errors=False, default_order=None, **SLOW)
    road = Road(gateway)
    async with RefundSession(gateway.merchant(), transport=road, clock=boot_clock) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(30))]
    assert all(isinstance(outcome.error, RefundRejected) for outcome in outcomes)
    assert (len(outcomes), road.most) == (30, 4)


async def test_one_refund_with_forged_answers_does_not_stop_the_others():
    """It is unknown; the others are made, one after the other."""
    gateway = sandbox()
    gateway.script(Fault.WRONG_SIGNATURE, no_refund="R-1", times=1000)
    async with session_with(gateway) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(9), concurrency=1)]
    assert [outcome.error is None for outcome in outcomes] == [False] + 8 * [True]


async def test_failures_count_only_in_a_row():
    """Every answer that verifies resets the count."""
    gateway = sandbox()
    for number in range(1, 20, 2):
        gateway.script(Fault.WRONG_SIGNATURE, no_refund=f"R-{number}", times=1000)
    async with session_with(gateway) as session:
        outcomes = [outcome async for outcome in refund_many(session, Source(19), concurrency=1)]
    assert sum(outcome.error is None for outcome in outcomes) == 9


async def test_a_query_by_the_gateways_number_counts_too(stranger_keys):
    """The watch records the number of the query, of either kind, and keeps the last four."""
    gateway = sandbox(sign_errors=True)
    async with distrusting(gateway, stranger_keys) as session:
        for number in range(6):
            with pytest.raises(SignatureInvalid):
                await session.query_refund(RefundQuery(dt_refund=EPOCH, oid_refundno=f"{number:016}"))
        assert "4 refunds in a row" in str(session.signatures.failure())


async def test_a_journal_of_another_merchant_ends_the_batch_before_anything_is_sent():
    """Every refund would raise this error, so the iteration raises it once."""
    gateway, journal = sandbox(), MemoryJournal()
    await journal.bind("201304121000001004", "https://production.invalid/refund.htm")
    async with session_with(gateway) as session:
        outcomes = refund_many(session, map(refund_request, range(100)), journal=journal)
        with pytest.raises(ConfigurationError, match="belongs to merchant 201304121000001004"):
            await anext(outcomes)
    assert not gateway.requests
