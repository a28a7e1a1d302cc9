"""Concurrent calls of one session for one refund share one flight, which belongs to no caller."""

from __future__ import annotations

import asyncio
import gc
import math
from decimal import Decimal

import anyio
import anyio.lowlevel
import httpx
import pytest

from lianlian_async import (
    ConfigurationError,
    JournalError,
    Refund,
    RefundConflict,
    RefundNotFinal,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundSession,
    RetryBudget,
    RetryPolicy,
    refund_many,
)
from lianlian_async.events import AttemptEnded
from lianlian_async.exchange import Call
from lianlian_async.flight import Flight
from lianlian_async.journal import MemoryJournal, memory
from lianlian_async.middleware import RateLimit
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support.parties import boot_clock, refund_request, sandbox, wall_clock

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.fixture(params=["no journal", "journal"])
def options(request):
    """Options of a session: with and without a journal."""
    journal = {} if request.param == "no journal" else {"journal": MemoryJournal()}
    return {"clock": boot_clock, **journal}


def carries_out_everything(**settings):
    """A sandbox that does not deduplicate: every apply call makes a refund."""
    gateway = sandbox(repeated=Repeated.AGAIN, **settings)
    gateway.add_order("O-1", 1000)
    return gateway


async def gather(*calls):
    """Return the result or the exception of each call, in order."""
    results = [None] * len(calls)

    async def one(place, call):
        try:
            results[place] = await call()
        except Exception as error:  # noqa: BLE001 - it is the result
            results[place] = error

    async with anyio.create_task_group() as tasks:
        for place, call in enumerate(calls):
            tasks.start_soon(one, place, call)
            await anyio.sleep(0.001)  # trio starts tasks in any order
    return results


async def test_three_concurrent_calls_make_one_refund(options):
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=1)
    async with gateway.session(**options) as session:
        refunds = await gather(*[lambda: session.apply_refund(refund_request())] * 3)
    assert refunds == [refunds[0]] * 3
    assert gateway.times_made("R-1") == 1
    assert gateway.requests == {"apply": 1}


async def test_an_unknown_refund_is_queried_by_the_next_call(options):
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    gateway.script(Fault.RESET, call="query", times=4)
    policy = RetryPolicy(budget=RetryBudget(capacity=3, per_second=0.01))
    async with gateway.session(retry=policy, **options) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request())
        gateway.requests.clear()
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"query": 1}
    assert gateway.times_made("R-1") == 1


async def test_a_flight_takes_one_connection_slot(options):
    """Callers that join a flight take no connection slot: another refund runs beside twenty of them."""
    gateway = sandbox(faults={Fault.DELAY: 1.0}, delay=5)
    async with gateway.session(max_connections=2, **options) as session:
        await gather(
            *[lambda: session.apply_refund(refund_request(1))] * 20, lambda: session.apply_refund(refund_request(2))
        )
        assert anyio.current_time() == pytest.approx(5, abs=0.1)


async def test_each_caller_learns_that_a_setting_prevents_the_send(options):
    """Also a caller that joined the flight: a batch stops at this error."""

    class Refusing(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            await anyio.sleep(1)  # until the others have joined
            raise ConfigurationError("HTTPS_PROXY: unusable")

    async with RefundSession(sandbox().merchant(), transport=Refusing(), **options) as session:
        outcomes = await gather(*[lambda: session.apply_refund(refund_request())] * 3)
    assert [type(each) for each in outcomes] == [ConfigurationError] * 3


@pytest.mark.parametrize("leaver", [0, 1], ids=["first", "second"])
async def test_a_cancelled_caller_does_not_end_the_flight(leaver, options, caplog):
    """Its refund goes on for the other caller, and a warning says that the refund may have been made."""
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=5)
    refunds = []

    async def cancelled():
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())

    async def patient():
        refunds.append(await session.apply_refund(refund_request()))

    callers = [patient, patient]
    callers[leaver] = cancelled
    async with gateway.session(**options) as session, anyio.create_task_group() as tasks:
        for caller in callers:
            tasks.start_soon(caller)
            await anyio.wait_all_tasks_blocked()
    assert [refund.no_refund for refund in refunds] == ["R-1"]
    assert gateway.requests == {"apply": 1}
    assert "refund R-1: cancelled, but it may have been made" in caplog.text


async def test_the_last_caller_that_leaves_cancels_the_flight(options):
    """The cancellation is immediate, and the next call queries what may have been sent."""
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)

    async def cancelled(seconds):
        with anyio.move_on_after(seconds):
            await session.apply_refund(refund_request())

    async with gateway.session(**options) as session:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancelled, 1)
            tasks.start_soon(cancelled, 2)
        assert anyio.current_time() == pytest.approx(2, abs=0.1)
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_a_call_during_the_cancellation_of_a_flight_starts_its_own():
    """The second call waits until the journal of the first has written, and then queries."""
    journal = SlowToRelease()
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    refunds = []

    async def next_call():
        await anyio.sleep(1.5)
        refunds.append(await session.apply_refund(refund_request()))

    async with gateway.session(journal=journal, clock=boot_clock) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(next_call)
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())
    assert [refund.no_refund for refund in refunds] == ["R-1"]
    assert gateway.requests == {"apply": 1, "query": 1}


async def test_the_wait_for_a_cancelled_flight_counts_against_the_deadline():
    """A call whose deadline includes a wait for the journal of a cancelled call does not begin its deadline again."""
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, times=99)

    async def cancelled():
        with anyio.move_on_after(1):
            await session.apply_refund(refund_request())

    async with (
        gateway.session(journal=SlowToRelease(), clock=boot_clock) as session,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(cancelled)
        await anyio.sleep(1.2)
        assert isinstance((await session.outcome_of(refund_request(), deadline=4)).error, RefundOutcomeUnknown)
    assert anyio.current_time() <= 1.2 + 4 + 1  # the journal releases within 1 s


class SlowToRelease(MemoryJournal):
    async def release(self, *told):
        await anyio.sleep(1)
        await super().release(*told)


@pytest.mark.parametrize("order", [[3, 20], [20, 3]], ids=["short one first", "long one first"])
@pytest.mark.parametrize("apart", [0, 1], ids=["at once", "one later"])
async def test_each_caller_has_its_own_deadline(order, apart, options):
    """The caller with the short deadline gets an unknown outcome; the flight continues for the other."""
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=8)
    ends = {}

    async def call(seconds):
        try:
            await session.apply_refund(refund_request(), deadline=seconds)
            ends[seconds] = "made", anyio.current_time()
        except RefundOutcomeUnknown as error:
            ends[seconds] = type(error), anyio.current_time()

    async with gateway.session(**options) as session, anyio.create_task_group() as tasks:
        for seconds in order:
            tasks.start_soon(call, seconds)
            await anyio.sleep(apart)
    assert ends[20][0] == "made"
    ends_at = 3 + (apart if order[0] == 20 else 0)
    assert ends[3] == (RefundOutcomeUnknown, pytest.approx(ends_at, abs=0.1))
    assert gateway.times_made("R-1") == 1


async def test_deadlines_count_from_the_connection_slot(options):
    """Waiting for a slot together does not use up the callers' deadlines."""
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=4)
    async with gateway.session(max_connections=1, deadline=10, **options) as session:
        results = await gather(
            *(lambda number=number: session.apply_refund(refund_request(number)) for number in range(5)),
            lambda: session.apply_refund(refund_request(4), deadline=9),
        )
    assert [refund.no_refund for refund in results] == ["R-0", "R-1", "R-2", "R-3", "R-4", "R-4"]


async def test_a_caller_that_joins_one_without_a_deadline_has_its_own():
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=5)
    ends = []

    async def impatient():
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request(), deadline=1)
        ends.append(anyio.current_time())

    async with gateway.session(clock=boot_clock) as session:
        patient, _ = await gather(lambda: session.apply_refund(refund_request(), deadline=math.inf), impatient)
    assert patient.no_refund == "R-1"
    assert ends == [pytest.approx(1, abs=0.1)]


@pytest.mark.parametrize("joins_at", [6, 13], ids=["during the wait", "after the wait"])
async def test_the_wait_of_a_flight_for_the_limiter_counts_for_no_caller(joins_at, options):
    """It counts neither for the first caller nor for those that join, and no caller leaves during the wait."""
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=3)
    ends = {}

    async def call(name, begins_at, deadline):
        await anyio.sleep_until(begins_at)
        outcome = await session.outcome_of(refund_request(), deadline=deadline)
        ends[name] = type(outcome.refund or outcome.error), anyio.current_time()

    limiter = RateLimit(1 / 12)  # after its first start at 0 s, the next one is at 12 s
    async with gateway.session(limiter=limiter, **options) as session, limiter, anyio.create_task_group() as tasks:
        tasks.start_soon(call, "first", 0, 10)
        tasks.start_soon(call, "second", joins_at, 10)
        tasks.start_soon(call, "short", joins_at, 1)
    made, left = (Refund, pytest.approx(15)), (RefundOutcomeUnknown, pytest.approx(max(12, joins_at) + 1))
    assert ends == {"first": made, "second": made, "short": left}
    assert gateway.times_made("R-1") == 1


async def test_each_caller_gets_its_own_exception(options):
    """The traceback of one exception raised in many tasks would grow with each of them."""
    gateway = sandbox(default_order=None, faults={Fault.DELAY: 1.0}, delay=1)
    async with gateway.session(**options) as session:
        errors = await gather(*[lambda: session.apply_refund(refund_request())] * 3)
    assert [type(error) for error in errors] == [RefundRejected] * 3
    assert len({id(error) for error in errors}) == 3
    assert len({str(error) for error in errors}) == 1
    assert errors[1].ret_code == errors[0].ret_code


async def test_each_caller_gets_the_exception_of_a_journal_that_cannot_be_copied():
    """The journal is the user's own, and raises an exception whose ``__init__`` needs more than its ``args``."""
    answer = httpx.Response(503, request=httpx.Request("GET", "https://journal.example/"))

    class Remote(MemoryJournal):
        async def begin(self, *told):
            await anyio.sleep(1)
            answer.raise_for_status()

    async with sandbox().session(journal=Remote(), clock=boot_clock) as session:
        errors = await gather(*[lambda: session.apply_refund(refund_request())] * 2)
    assert [type(error) for error in errors] == [httpx.HTTPStatusError] * 2


async def test_other_content_under_the_number_of_a_flight_is_a_conflict(options):
    """Another ``notify_url`` is no conflict."""
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=1)
    async with gateway.session(**options) as session:
        refund, conflict, same = await gather(
            lambda: session.apply_refund(refund_request()),
            lambda: session.apply_refund(refund_request(money_refund="9.00")),
            lambda: session.apply_refund(refund_request(notify_url="https://shop.example/elsewhere")),
        )
    assert refund == same
    assert isinstance(conflict, RefundConflict)
    assert (conflict.field, conflict.ours, conflict.theirs, conflict.record) == ("money_refund", "9.00", "10.00", None)
    assert gateway.times_made("R-1") == 1


async def test_other_content_under_a_number_left_unknown_is_a_conflict(options):
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    async with gateway.session(**options) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request())
        with pytest.raises(RefundConflict, match="money_refund"):
            await session.apply_refund(refund_request(money_refund="9.00"))
    assert gateway.requests["apply"] == 1


async def test_a_caller_that_leaves_before_the_send_can_resolve_later():
    """The flight has not sent yet; its unknown outcome can be resolved like any other."""
    gateway, journal = carries_out_everything(), Stuck()
    unknown = []

    async def impatient():
        with pytest.raises(RefundOutcomeUnknown, match="ended before the gateway answered") as caught:
            await session.apply_refund(refund_request(), deadline=2)
        unknown.append(caught.value)

    async with gateway.session(journal=journal, clock=boot_clock) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(session.apply_refund, refund_request())
        tasks.start_soon(impatient)
    assert (unknown[0].attempts, unknown[0].body) == (0, b"")
    async with gateway.session(clock=boot_clock) as session:
        assert (await session.resolve(unknown[0])).no_refund == "R-1"
    assert gateway.requests == {"apply": 1, "query": 1}


class Stuck(MemoryJournal):
    async def begin(self, intent, now):
        await anyio.sleep(5)
        return await super().begin(intent, now)


async def test_cancelling_all_tasks_of_a_loop_leaves_no_caller_waiting(options, anyio_backend_name):
    """Asyncio may cancel the flight's task, too: its caller gets an unknown outcome, the next call a new flight."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no such cancellation")
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    others = asyncio.all_tasks()
    async with gateway.session(**options) as session:
        call = asyncio.create_task(session.apply_refund(refund_request()))
        await asyncio.sleep(1)
        for task in asyncio.all_tasks() - {*others, call}:
            task.cancel()
        with pytest.raises(RefundOutcomeUnknown):
            await call
        never_begun = asyncio.create_task(session.apply_refund(refund_request(2)))
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {*others, never_begun}:
            task.cancel()
        with pytest.raises(RefundOutcomeUnknown):
            await never_begun
        assert (await session.apply_refund(refund_request())).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


@pytest.mark.parametrize("stray", [asyncio.CancelledError, SystemExit])
async def test_an_exception_from_below_ends_the_flight(stray, options, anyio_backend_name):
    """A stray cancellation leaves the refund unknown; ``SystemExit`` and ``KeyboardInterrupt`` are raised unchanged."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no stray cancellation")
    gateway = carries_out_everything()

    async def broken(exchange, call_next):
        await call_next(exchange)
        raise stray

    async with gateway.session(middleware=[broken], **options) as session:
        expected = RefundOutcomeUnknown if stray is asyncio.CancelledError else stray
        with pytest.raises(expected) as caught:
            await session.apply_refund(refund_request())
        assert (await session.outcome_of(refund_request())).attempts == 0 if stray is asyncio.CancelledError else True
    assert caught.type is expected
    assert gateway.times_made("R-1") == 1


@pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks need Python 3.12")
async def test_a_refund_is_resolved_in_an_eager_task(options, anyio_backend_name):
    """The flight's task runs before ``create_task`` returns, but already has the deadline of its first caller."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no eager tasks")
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    async with gateway.session(**options) as session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
        await anyio.sleep(900)
        assert (await session.resolve(caught.value)).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


# ── a session without a journal ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("repeat", ["apply_refund", "apply_and_wait", "refund_many"])
async def test_a_repeated_call_returns_a_refund_that_was_made(repeat):
    """Also after a call has returned it; of another content, a call raises ``RefundConflict``. Nothing is sent."""
    gateway = carries_out_everything(settle_after=0)
    async with gateway.session(clock=boot_clock) as session:
        made = await session.apply_refund(refund_request())
        if repeat == "refund_many":
            requests = [refund_request(), refund_request(no_order="O-2")]
            outcomes = {one.request.no_order: one async for one in refund_many(session, requests, concurrency=1)}
            assert (outcomes["O-1"].refund, outcomes["O-1"].attempts) == (made, 0)
            assert isinstance(outcomes["O-2"].error, RefundConflict)
        else:
            assert (await getattr(session, repeat)(refund_request())).oid_refundno == made.oid_refundno
    assert (gateway.requests["apply"], gateway.times_made("R-1")) == (1, 1)


async def test_a_session_remembers_the_last_refunds_that_were_made(monkeypatch):
    """Older ones take no memory; nor does a refund that was rejected: it may be sent again."""
    monkeypatch.setattr(memory, "MOST_MADE", 2)
    gateway = sandbox(settle_after=0)
    gateway.add_order("O-4", 1)
    async with gateway.session(clock=boot_clock) as session:
        for number in (1, 2, 3):
            await session.apply_refund(refund_request(number))
        for number in (4, 4):
            assert isinstance((await session.outcome_of(refund_request(number))).error, RefundRejected)
        assert repr(session._open_refunds) == "<OpenRefunds 2 refunds>"
        attempts = [(await session.outcome_of(refund_request(number))).attempts for number in (3, 2, 1)]
    assert attempts == [0, 0, 1]


async def test_a_session_that_is_opened_again_keeps_an_outcome_that_nobody_got():
    """A call that the closing session refuses does not get the outcome: the next call, after a reopening, does."""
    gateway = carries_out_everything()

    def at_the_answer(event):
        if isinstance(event, AttemptEnded):
            scope.cancel()

    async def refused():
        with pytest.raises(RuntimeError, match="closing"):
            await session.apply_refund(refund_request(1))

    session = gateway.session(clock=boot_clock, listeners=[at_the_answer], max_connections=1)
    async with anyio.create_task_group() as tasks, session:
        with anyio.CancelScope() as scope:
            await session.apply_refund(refund_request(1))
        assert scope.cancelled_caught
        gateway.script(Fault.DELAY, call="apply", delay=5)
        tasks.start_soon(session.outcome_of, refund_request(2))
        await anyio.sleep(0.1)
        tasks.start_soon(refused)
        await anyio.sleep(0.1)
    async with session:
        assert (await session.apply_refund(refund_request(1))).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


@pytest.mark.parametrize("step", [None, 0, 1, 2, 3])
async def test_a_call_that_is_cancelled_after_the_answer_makes_no_second_refund(step):
    """Without a journal, too, the next call returns the outcome that the cancelled call did not get."""
    gateway = carries_out_everything()

    async def cancel():
        for _ in range(step):
            await anyio.lowlevel.checkpoint()
        scope.cancel()

    def at_the_answer(event):
        if isinstance(event, AttemptEnded):
            scope.cancel() if step is None else tasks.start_soon(cancel)

    async with (
        gateway.session(clock=boot_clock, listeners=[at_the_answer]) as session,
        anyio.create_task_group() as tasks,
    ):
        with anyio.CancelScope() as scope:
            await session.apply_refund(refund_request())
        if scope.cancelled_caught:
            other = await session.outcome_of(refund_request(money_refund="9.99"))
            assert isinstance(other.error, RefundConflict)
            await session.apply_refund(refund_request())
    assert gateway.times_made("R-1") == 1


@pytest.mark.parametrize("call", ["apply_refund", "apply_and_wait"])
async def test_a_call_during_a_wait_makes_no_second_refund(call):
    gateway = carries_out_everything(settle_after=100)
    async with gateway.session(clock=boot_clock) as session, anyio.create_task_group() as tasks:
        tasks.start_soon(session.apply_and_wait, refund_request())
        await anyio.sleep(50)
        await getattr(session, call)(refund_request())
    assert gateway.times_made("R-1") == 1


async def test_a_wait_that_is_cancelled_makes_no_second_refund():
    """The next call returns the outcome that the cancelled call did not get."""
    gateway = carries_out_everything(settle_after=100)
    async with gateway.session(clock=boot_clock) as session:
        with anyio.move_on_after(50):
            await session.apply_and_wait(refund_request())
        with pytest.raises(RefundConflict):
            await session.apply_and_wait(refund_request(money_refund="9.99"))
        with pytest.raises(RefundNotFinal):
            await session.apply_and_wait(refund_request(), deadline=10)
    assert gateway.times_made("R-1") == 1


async def test_a_wait_that_ends_before_another_call_gets_a_slot_makes_no_second_refund():
    """The other call, which began during the wait, returns the refund of the wait."""
    gateway = carries_out_everything(settle_after=100, delay=60)
    gateway.script(Fault.DELAY, call="apply", no_refund="R-2")
    made = dict[str, Refund]()

    async def wait():
        made["wait"] = await session.apply_and_wait(refund_request())

    async def apply():
        made["apply"] = await session.apply_refund(refund_request())

    async with (
        gateway.session(clock=boot_clock, max_connections=1, deadline=200) as session,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(wait)
        await anyio.sleep(50)
        tasks.start_soon(session.apply_refund, refund_request(2))
        await anyio.sleep(1)
        tasks.start_soon(apply)
        await anyio.sleep(1)
        session.notified(Refund.from_dict({**refund_request().to_dict(), "sta_refund": "2"}))
        await anyio.sleep(1)
        assert list(made) == ["wait"]
    assert gateway.times_made("R-1") == 1
    assert list(made) == ["wait", "apply"]


@pytest.mark.parametrize("step", range(3))
async def test_a_call_between_two_callers_of_an_ended_flight_makes_no_second_refund(step):
    """It begins after one caller was cancelled, and before the other caller got the outcome."""
    gateway = carries_out_everything()

    async def call(scope):
        with scope:
            await session.apply_refund(refund_request())
            scopes.clear()

    async def cancel():
        for _ in range(step):
            await anyio.lowlevel.checkpoint()
        cancelled.cancel()
        await anyio.lowlevel.checkpoint()
        if scopes:  # no call got the outcome yet
            await session.apply_refund(refund_request())

    def at_the_answer(event):
        if isinstance(event, AttemptEnded):
            tasks.start_soon(cancel)

    async with (
        gateway.session(clock=boot_clock, listeners=[at_the_answer]) as session,
        anyio.create_task_group() as tasks,
    ):
        cancelled = anyio.CancelScope()
        scopes = [cancelled, anyio.CancelScope()]
        for scope in tuple(scopes):
            tasks.start_soon(call, scope)
    assert gateway.times_made("R-1") == 1


async def test_a_session_with_too_many_unknown_refunds_begins_no_new_one(monkeypatch):
    """No open refund is dropped: the unknown ones can still be queried and resolved."""
    monkeypatch.setattr(memory, "MOST_OPEN", 2)
    gateway = sandbox()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER, times=2)
    async with gateway.session(clock=boot_clock) as session:
        for number in (1, 2):
            with anyio.move_on_after(1):
                await session.apply_refund(refund_request(number))
        with pytest.raises(JournalError, match="2 refunds of this session are unresolved") as caught:
            await session.apply_refund(refund_request(3))
        assert caught.value.said is None
        assert gateway.requests == {"apply": 2}
        await session.apply_refund(refund_request(1))
        await session.apply_refund(refund_request(3))
    assert gateway.requests == {"apply": 3, "query": 1}


async def test_a_session_keeps_one_canary_a_minute(monkeypatch):
    """Of many refunds that were made, the session keeps one a minute, and not more than a day of them."""
    monkeypatch.setattr(memory, "_MOST_CANARIES", 5)
    gateway = sandbox(default_order=Decimal(100_000))
    async with gateway.session(clock=boot_clock) as session:
        for number in range(20):
            await session.apply_refund(refund_request(number))
            await anyio.sleep(31)
        assert [entry.no_refund for entry in await session._open_refunds.canaries()] == [
            f"R-{number}" for number in (18, 16, 14, 12, 10)
        ]


@pytest.mark.parametrize("deadline", [float("inf"), 1e12, 86_401])
async def test_a_deadline_is_a_day_at_most_with_a_journal(deadline):
    """A longer deadline would need too long a lease; without a journal any deadline is accepted."""
    gateway = sandbox()
    async with gateway.session(clock=boot_clock) as session:
        assert (await session.apply_refund(refund_request(), deadline=deadline)).no_refund == "R-1"
    async with gateway.session(journal=MemoryJournal(), clock=boot_clock) as session:
        with pytest.raises(ConfigurationError, match="at most 86400 seconds"):
            await session.apply_refund(refund_request(2), deadline=deadline)
        assert (await session.apply_refund(refund_request(2), deadline=86_400)).no_refund == "R-2"


# ── two journals ─────────────────────────────────────────────────────────────────────────────────


async def test_a_call_with_a_journal_queries_what_the_session_left_unknown_without_one():
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    gateway.script(Fault.RESET, call="query", times=4)
    policy = RetryPolicy(budget=RetryBudget(capacity=3, per_second=0.01))
    async with gateway.session(clock=boot_clock, retry=policy) as session:
        with pytest.raises(RefundOutcomeUnknown) as caught:
            await session.apply_refund(refund_request())
        for earlier in (None, caught.value):
            outcome = await session.outcome_of(refund_request(), journal=MemoryJournal(), earlier=earlier)
            assert outcome.refund.no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


async def test_calls_with_different_journals_share_no_flight():
    """The second call waits for the first one, then records its own outcome in its own journal."""
    gateway, journal = carries_out_everything(), MemoryJournal()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    gateway.script(Fault.RESET, call="query", times=4)
    policy = RetryPolicy(budget=RetryBudget(capacity=3, per_second=0.01))
    async with gateway.session(clock=boot_clock, retry=policy) as session:
        first, second = await gather(
            lambda: session.outcome_of(refund_request()),
            lambda: session.outcome_of(refund_request(), journal=journal),
        )
    assert type(first.error) is RefundOutcomeUnknown
    assert second.refund.no_refund == "R-1"
    assert (await journal.find("R-1")).state.is_made
    assert gateway.times_made("R-1") == 1


async def test_a_call_waits_for_a_flight_with_another_journal_until_its_own_deadline():
    """Then the outcome is unknown: the flight may still make the refund."""
    gateway = carries_out_everything(faults={Fault.DELAY: 1.0}, delay=5)
    ends = []

    async def impatient():
        outcome = await session.outcome_of(refund_request(), journal=MemoryJournal(), deadline=1)
        ends.append((type(outcome.error), anyio.current_time()))

    async with gateway.session(clock=boot_clock) as session:
        patient, _ = await gather(lambda: session.apply_refund(refund_request(), deadline=math.inf), impatient)
    assert patient.no_refund == "R-1"
    assert ends == [(RefundOutcomeUnknown, pytest.approx(1, abs=0.1))]


# ── query first ──────────────────────────────────────────────────────────────────────────────────


async def test_query_first_finds_a_refund_that_the_journal_lost():
    """A lost or copied journal does not have the refund, but the gateway has it."""
    gateway = carries_out_everything()
    async with gateway.session(clock=boot_clock) as session:
        await session.apply_refund(refund_request())
    async with gateway.session(journal=MemoryJournal(), query_first=True, clock=boot_clock) as session:
        outcomes = [await session.outcome_of(refund_request(number)) for number in (1, 2)]
        assert [outcome.refund.no_refund for outcome in outcomes] == ["R-1", "R-2"]
        assert [(outcome.attempts, outcome.queries) for outcome in outcomes] == [
            (0, 1),
            (1, 2),
        ]  # R-1 proves the first answer
    assert gateway.times_made("R-1") == 1


async def test_query_first_leaves_the_only_attempt_for_the_send():
    """``attempts`` counts the sends of a call, and the query before the first one is no send."""
    gateway, once = carries_out_everything(), RetryPolicy(attempts=1)
    async with gateway.session(query_first=True, retry=once, clock=boot_clock) as session:
        assert (await session.outcome_of(refund_request())).attempts == 1
    assert gateway.times_made("R-1") == 1


async def test_without_an_attempt_left_no_resend_is_recorded(options):
    """A request that may have been sent is not sent again, and its history does not claim that."""
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    policy = RetryPolicy(attempts=1, not_found_grace=1)
    async with gateway.session(retry=policy, **options) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request(), deadline=60)
        entry = await session.journal.find("R-1") if session.journal else None
    assert entry is None or "resend" not in entry.history
    assert gateway.requests["apply"] == 1


async def test_query_first_sends_nothing_without_an_answer():
    gateway = carries_out_everything()
    gateway.script(Fault.RESET, call="query", times=100)
    async with gateway.session(query_first=True, clock=boot_clock) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(refund_request())
    assert "apply" not in gateway.requests


async def test_two_callers_of_a_refund_that_was_not_sent_both_get_not_sent(options):
    """Both callers get ``RefundNotSent``, and no call sends again."""
    gateway = sandbox()

    async def closed(exchange, call_next):
        await anyio.sleep(1)
        raise OSError("the road is closed")

    policy = RetryPolicy(attempts=1)
    async with gateway.session(middleware=[closed], retry=policy, **options) as session:
        errors = await gather(*[lambda: session.apply_refund(refund_request())] * 2)
    assert [type(error) for error in errors] == [RefundNotSent] * 2


async def test_a_caller_that_leaves_tells_until_when_its_flight_may_send(options):
    """Another process measures the grace from ``sent_at``, so it must not be earlier than a later send."""
    sent = []

    async def slow(exchange, call_next):
        if exchange.call is Call.APPLY:
            await anyio.sleep(2)
            sent.append(wall_clock())
        return await call_next(exchange)

    async with sandbox().session(middleware=[slow], **options) as session:
        left, made = await gather(
            lambda: session.apply_refund(refund_request(), deadline=1),
            lambda: session.apply_refund(refund_request(), deadline=20),
        )
    assert made.no_refund == "R-1"
    assert type(left) is RefundOutcomeUnknown
    assert sent[0] <= left.sent_at < left.ask_again_at


async def test_a_flight_sends_nothing_after_the_time_that_a_caller_was_told(options):
    """A wait for the limiter extends the flight's deadline, but others may rely on the ``sent_at`` of the caller."""
    gateway = carries_out_everything()

    async def closed_at_first(exchange, call_next):
        if exchange.attempt > 1:  # the second attempt starts after 2 s, because of the limiter
            return await call_next(exchange)
        await anyio.sleep(0.6)
        raise OSError("the road is closed")

    limits = {"limiter": RateLimit(0.5), "middleware": [closed_at_first]}
    async with gateway.session(**limits, **options) as session:
        stayed, left = await gather(
            lambda: session.apply_refund(refund_request(), deadline=1.5),
            lambda: session.apply_refund(refund_request(), deadline=0.5),
        )
    assert [type(error) for error in (left, stayed)] == [RefundOutcomeUnknown, RefundNotSent]
    assert gateway.times_made("R-1") == 0


async def test_a_call_after_the_end_of_a_flight_starts_a_new_one(options):
    """The caller that started the flight has left before: later calls do not get the old result, but query."""
    gateway = carries_out_everything()
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER)
    gateway.script(Fault.NO_ANSWER, call="query", times=20)
    async with gateway.session(**options) as session:
        short, long = await gather(
            lambda: session.apply_refund(refund_request(), deadline=5),
            lambda: session.apply_refund(refund_request(), deadline=20),
        )
        assert [type(each) for each in (short, long)] == [RefundOutcomeUnknown] * 2
        assert (await session.apply_refund(refund_request(), deadline=600)).no_refund == "R-1"
    assert gateway.times_made("R-1") == 1


def flights():
    return [each for each in gc.get_objects() if type(each) is Flight]


async def test_finished_flight_leaves_no_reference_cycle():
    """Reference counting frees it: a garbage collection of many flights would stall the event loop."""
    async with sandbox().session() as session:
        await session.apply_refund(refund_request(money_refund="0.01"))
        gc.collect()
        before = flights()  # an error that pytest keeps may hold one of an earlier test
        gc.disable()
        try:
            await session.apply_refund(refund_request(no_refund="R-2", money_refund="0.01"))
            await anyio.lowlevel.checkpoint()
            assert [each for each in flights() if each not in before] == []
        finally:
            gc.enable()
