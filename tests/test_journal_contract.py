"""The contract of ``journal.interface``, tested on every journal."""

from __future__ import annotations

import contextlib
import json
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count

import anyio
import anyio.to_thread
import attrs
import pytest

from lianlian_async import ConfigurationError, InvalidRequest, RefundConflict
from lianlian_async.errors import JournalError
from lianlian_async.journal import Ending, Entry, MemoryJournal, SqliteJournal, Standing, State
from lianlian_async.journal.base import added, facts
from lianlian_async.journal.operations import Begin, Operation
from tests.support import journals
from tests.support.journals import ACCEPTED, MADE, REJECTED, held, intent, now

pytestmark = pytest.mark.anyio

OVER = 0.0
"""A negative lease: it has ended when it begins, as if its holder had died."""

_EVERYWHERE = [(name, backend) for name in ("memory", "sqlite") for backend in ("asyncio", "trio")]


@pytest.fixture(params=[*_EVERYWHERE, ("postgres", "asyncio"), ("model", "asyncio")], ids="-".join)
def kind_and_backend(request):
    return request.param


@pytest.fixture
def anyio_backend(kind_and_backend):
    return kind_and_backend[1]


@pytest.fixture
def kind(kind_and_backend, request):
    return journals.kind(kind_and_backend[0], request)


async def begin(journal, no_refund="R-1", **changed):
    return await journal.begin(intent(no_refund, **changed), now())


# ── begin ────────────────────────────────────────────────────────────────────────────────────────


async def test_an_unknown_number_is_new(kind):
    """The first ``begin`` of a refund returns NEW, the given content, and no ``sent_at``."""
    async with kind.make() as journal:
        wanted = intent(body=b'{"sign":"\xe4\xb8\xad"}')
        standing, entry = await journal.begin(wanted, now())
        assert standing is Standing.NEW
        assert (entry.no_refund, entry.fields) == (wanted.no_refund, wanted.fields)
        assert (entry.body, entry.sent_at, entry.ending, entry.state) == (wanted.body, None, None, State.UNRESOLVED)


@pytest.mark.parametrize("number", ["R\0", "R\ud800", 5], ids=ascii)
async def test_a_number_that_cannot_be_stored_harms_no_other_refund(kind, number):
    """A journal writes many refunds at once. A service may pass on whatever number its client asks for."""
    async with kind.make() as journal, anyio.create_task_group() as tasks:

        async def find():
            with contextlib.suppress(InvalidRequest):
                assert await journal.find(number) is None

        async def begin_one(name):
            assert (await begin(journal, name))[0] is Standing.NEW

        for each in range(5):
            tasks.start_soon(begin_one, f"R-{each}")
            tasks.start_soon(find)


async def test_a_second_call_gets_leased(kind):
    """A second call gets LEASED until the end of the lease; the entry's ``sent_at`` is the end of the lease."""
    async with kind.make() as journal:
        at = now()
        await journal.begin(intent(body=b"first", lease=60), at)
        standing, entry = await begin(journal, body=b"second")
        assert (standing, entry.body) == (Standing.LEASED, b"first")
        assert kind.is_same(entry.leased_until, at.after(60))
        assert kind.is_same(entry.sent_at, at.after(60))
        found = await journal.find("R-1")
        assert kind.is_same(found.sent_at, at.after(60))


async def test_after_the_lease_the_next_call_gets_unresolved(kind):
    """After the lease the next call gets UNRESOLVED, the body of the first call, and a ``sent_at`` up to now."""
    async with kind.make() as journal:
        await begin(journal, body=b"first", lease=OVER)
        at = now()
        standing, entry = await journal.begin(intent(body=b"second"), at)
        assert (standing, entry.body) == (Standing.UNRESOLVED, b"first")
        assert kind.is_same(entry.sent_at, at) or entry.sent_at.boot < at.boot
        assert (await begin(journal))[0] is Standing.LEASED


@pytest.mark.parametrize("tasks", [2, 1200])
async def test_only_one_of_many_concurrent_calls_gets_new(kind, tasks):
    """If many tasks begin the same refunds concurrently, one task gets NEW for each refund; the others get LEASED."""
    found = []

    async def one(number):
        found.append((number, (await begin(journal, f"R-{number}"))[0]))

    async with kind.make() as journal, anyio.create_task_group() as group:
        for task in range(tasks):
            group.start_soon(one, task % (tasks // 2))
    assert sorted(found) == sorted((n, s) for n in range(tasks // 2) for s in (Standing.NEW, Standing.LEASED))


# ── release ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_refund_released_as_not_sent_is_new_again(kind):
    """After ``release(…, None)`` the next call gets NEW, and its own body is recorded."""
    async with kind.make() as journal:
        _, entry = await begin(journal, body=b"first")
        await journal.release(entry, None)
        assert (await journal.find("R-1")).sent_at is None
        standing, entry = await begin(journal, body=b"second")
        assert (standing, entry.body, entry.sent_at) == (Standing.NEW, b"second", None)
        assert (await journal.find("R-1")).body == b"second"
        assert (await begin(journal))[0] is Standing.LEASED


async def test_a_refund_released_as_unknown_is_unresolved(kind):
    """After ``release(…, sent_at)`` the next call gets UNRESOLVED with that ``sent_at``, and the body that was sent."""
    async with kind.make() as journal:
        _, entry = await begin(journal, body=b"first")
        sent_at = now(-3600)
        await journal.release(entry, sent_at)
        standing, entry = await begin(journal, body=b"second")
        assert (standing, entry.body) == (Standing.UNRESOLVED, b"first")
        assert kind.is_same(entry.sent_at, sent_at)


async def test_a_refund_can_begin_again_and_finish_concurrently(kind):
    """A ``finish`` concurrent with another ``begin`` is recorded, also after the journal is reopened."""
    async with kind.make() as journal:
        await journal.release((await begin(journal))[1], None)
        async with anyio.create_task_group() as group:
            group.start_soon(begin, journal)
            group.start_soon(journal.finish, held(), MADE)
        assert (await journal.find("R-1")).ending == MADE
    async with kind.make() as journal:
        entry = await journal.find("R-1")
        assert (entry.ending, entry.state, entry.body) == (MADE, State.DONE, b"")
        assert (await begin(journal))[0] is Standing.FINISHED
        assert (await journal.counts())[State.DONE] == 1


async def test_a_late_release_changes_nothing(kind):
    """A late release does not end the lease of the next call."""
    async with kind.make() as journal:
        _, late = await begin(journal, lease=OVER)
        _, entry = await begin(journal)
        await journal.release(late, None)
        assert (await begin(journal))[0] is Standing.LEASED
        await journal.release(entry, now())
        await journal.release(entry, None)
        assert (await begin(journal))[0] is Standing.UNRESOLVED


async def test_release_changes_no_resolved_refund(kind):
    """Neither the lease holder nor another call can remove a recorded outcome with ``release``."""
    async with kind.make() as journal:
        _, entry = await begin(journal)
        resolved = await journal.finish(held("R-1"), MADE)
        for each in (entry, resolved, attrs.evolve(entry, no_refund="R-2")):
            await journal.release(each, None)
        found = await journal.find("R-1")
        assert (found.ending, found.body, found.holder) == (MADE, b"", None)
        assert await journal.find("R-2") is None


# ── finish ───────────────────────────────────────────────────────────────────────────────────────


EMPTY = Ending(state=State.CONFLICT, record={})


@pytest.mark.parametrize("ending", [MADE, ACCEPTED, REJECTED, EMPTY], ids=lambda ending: ending.state)
async def test_a_resolved_refund_gets_finished(kind, ending):
    """After the outcome is recorded, every ``begin`` returns FINISHED with that ending and an empty body."""
    async with kind.make() as journal:
        await begin(journal)
        resolved = await journal.finish(held("R-1"), ending)
        assert (resolved.ending, resolved.state, resolved.body, resolved.holder) == (ending, ending.state, b"", None)
        standing, entry = await begin(journal, body=b"second")
        assert (standing, entry.ending, entry.body) == (Standing.FINISHED, ending, b"")
        assert (await journal.find("R-1")).ending == ending


@pytest.mark.parametrize("first", [MADE, ACCEPTED, REJECTED], ids=lambda ending: ending.state)
@pytest.mark.parametrize("then", [MADE, ACCEPTED, REJECTED], ids=lambda ending: ending.state)
async def test_the_first_ending_wins(kind, first, then):
    """A second ending changes nothing, except that an ACCEPTED refund becomes final."""
    async with kind.make() as journal:
        await begin(journal)
        await journal.finish(held("R-1"), first)
        then = attrs.evolve(then, record={**then.record, "settle_date": "20260102"})
        stands = then if (first, then.state) == (ACCEPTED, State.DONE) else first
        assert (await journal.finish(held("R-1"), then)).ending == stands
        assert (await journal.find("R-1")).ending == stands


async def test_an_ending_after_the_lease_is_recorded(kind):
    """A call whose lease has ended still records its outcome; the ending of the next lease holder comes second."""
    async with kind.make() as journal:
        await begin(journal, lease=OVER)
        await begin(journal)
        await journal.finish(held("R-1"), MADE)
        assert (await journal.finish(held("R-1"), REJECTED)).ending == MADE


async def test_a_refund_that_was_never_sent_may_be_resolved(kind):
    """An ending is recorded also for a refund that was released as not sent."""
    async with kind.make() as journal:
        _, entry = await begin(journal)
        await journal.release(entry, None)
        await journal.finish(held("R-1"), MADE)
        assert (await begin(journal))[0] is Standing.FINISHED


async def test_an_entry_that_the_journal_lost_is_written_again(kind):
    """A journal that lost its last commits still records the gateway's answers and what may have been sent."""
    lost = held("R-8")
    async with kind.make() as journal:
        assert (await journal.finish(held("R-9"), MADE)).ending == MADE
        assert (await begin(journal, "R-9"))[0] is Standing.FINISHED
        await journal.release(attrs.evolve(lost, holder="gone"), lost.sent_at)
        assert (await begin(journal, "R-8"))[0] is Standing.UNRESOLVED
    async with kind.make() as journal:
        entry = await journal.find("R-9")
        assert (entry.ending, entry.fields) == (MADE, held("R-9").fields)


# ── resend ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_resend_sets_sent_at_to_the_end_of_the_lease(kind):
    """If the lease holder dies after ``resend``, the entry shows that the refund may have been sent again."""
    refused = {"ret_code": "1002", "ret_msg": "", "verified": "yes"}
    async with kind.make() as journal:
        _, entry = await begin(journal, body=b"first")
        await journal.release(entry, now(-3600), refused)
        _, entry = await begin(journal)
        assert entry.refused == refused
        assert kind.is_same((await journal.find("R-1")).sent_at, entry.sent_at)
        await journal.resend(entry)
        found = await journal.find("R-1")
        assert kind.is_same(found.sent_at, entry.leased_until)
        assert (found.refused, found.body) == (None, b"first")
        assert (await begin(journal))[0] is Standing.LEASED


async def test_resend_fails_after_the_lease_was_taken_or_the_refund_resolved(kind):
    """``resend`` raises if another call has taken the lease or resolved the refund."""
    async with kind.make() as journal:
        _, late = await begin(journal, lease=OVER)
        await begin(journal)
        with pytest.raises(JournalError, match="has taken its lease"):
            await journal.resend(late)
        await journal.finish(held("R-1"), MADE)
        with pytest.raises(JournalError, match="has taken its lease"):
            await journal.resend(late)


# ── owner and canaries ───────────────────────────────────────────────────────────────────────────


async def test_a_journal_belongs_to_its_first_merchant_and_endpoint(kind):
    """The owner is recorded once; another merchant or endpoint is refused, also after the journal is reopened."""
    async with kind.make() as journal:
        number = journal.id
        await journal.bind("201304121000001004", "https://sandbox.invalid/refund.htm")
        await journal.bind("201304121000001004", "https://sandbox.invalid/refund.htm")
    async with kind.make() as journal:
        assert journal.id == number
        for other in (("201304121000001004", "https://other.invalid/"), ("2", "https://sandbox.invalid/refund.htm")):
            with pytest.raises(ConfigurationError, match="use another journal for this session"):
                await journal.bind(*other)
        await journal.bind("201304121000001004", "https://sandbox.invalid/refund.htm")


async def test_the_canaries_are_refunds_that_were_made(kind):
    """``canaries`` returns the newest and the oldest refund that was made, final or not, and some between them."""
    async with kind.make() as journal:
        assert await journal.canaries() == []
        endings = [REJECTED, MADE, *[ACCEPTED, MADE, BY_HAND] * 10, ACCEPTED, REJECTED, None]
        for number, ending in enumerate(endings):
            await begin(journal, f"R-{number}", lease=3600 + 61 * number)
            if ending is not None:
                await journal.finish(held(f"R-{number}"), ending)
        canaries = [int(entry.no_refund[2:]) for entry in await journal.canaries()]
        assert (canaries[0], canaries[-1]) == (32, 1)
        assert canaries == sorted(set(canaries), reverse=True)
        assert {endings[number].state for number in canaries} <= {State.ACCEPTED, State.DONE}
        assert not any("evidence" in endings[number].record for number in canaries)
        for distance in (4, 8, 16):  # the gaps may grow with the age, but there is a canary of about each age
            assert any(32 - distance <= number < 32 - distance / 4 for number in canaries)


async def test_unresolved_is_no_ending(kind):
    """An ``Ending`` with the state UNRESOLVED cannot be created."""
    with pytest.raises(ValueError, match="state"):
        Ending(state=State.UNRESOLVED, record={})


# ── conflict ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changed", "field", "ours", "theirs"),
    [
        ({"money": "0.02"}, "money_refund", "0.02", "200.01"),
        ({"fields": {"no_refund": "R-1", "money_refund": "200.01"}}, "no_order", "nothing", "订单-1"),
    ],
)
async def test_other_content_under_the_same_number_is_a_conflict(kind, changed, field, ours, theirs):
    """``RefundConflict`` names the first field that differs and both values; the entry does not change."""
    async with kind.make() as journal:
        _, entry = await begin(journal)
        for prepare in (journal.find("R-1"), journal.release(entry, None), journal.finish(held("R-1"), MADE)):
            await prepare
            before = await journal.find("R-1")
            with pytest.raises(RefundConflict) as caught:
                await begin(journal, **changed)
            assert (caught.value.field, caught.value.ours, caught.value.theirs) == (field, ours, theirs)
            assert kind.is_same((await journal.find("R-1")).sent_at, before.sent_at)
            assert (await journal.find("R-1")).ending == before.ending


# ── acting ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_final_refund_is_final_until_acted(kind):
    """After ``begin_acting``, also after a restart: new refunds, accepted refunds, and those that the journal lost."""
    async with kind.make() as journal:
        await begin(journal, "R-1")
        await begin(journal, "R-2")
        await journal.finish(held("R-2"), ACCEPTED)
        await journal.begin_acting()
        await journal.begin_acting()
    async with kind.make() as journal:
        for number in ("R-1", "R-2", "R-3"):
            assert (await journal.finish(held(number), MADE)).state is State.FINAL
            assert (await journal.finish(held(number), MADE)).state is State.FINAL
        assert (await journal.counts())[State.FINAL] == 3
        assert [entry.no_refund async for entry in journal.pending()] == ["R-1", "R-2", "R-3"]
        assert await journal.canaries()
        assert (await begin(journal, "R-1"))[1].ending.record == MADE.record
        for _ in range(2):
            await journal.acted("R-1", now())
            assert (await journal.find("R-1")).ending == MADE
            assert (await journal.counts())[State.FINAL] == 2


async def test_begin_acting_leaves_done_refunds_done(kind):
    """A refund that was DONE before ``begin_acting`` stays DONE."""
    async with kind.make() as journal:
        await begin(journal)
        await journal.finish(held("R-1"), MADE)
        await journal.begin_acting()
        assert (await journal.finish(held("R-1"), MADE)).ending == MADE
        assert [entry async for entry in journal.pending()] == []


@pytest.mark.parametrize("ending", [None, ACCEPTED, REJECTED], ids=["unresolved", "accepted", "rejected"])
async def test_acted_changes_only_final_refunds(kind, ending):
    """For any other refund, and for one without an entry, ``acted`` changes nothing."""
    async with kind.make() as journal:
        await journal.begin_acting()
        await begin(journal)
        if ending is not None:
            await journal.finish(held("R-1"), ending)
        for number in ("R-1", "R-2"):
            await journal.acted(number, now())
        assert (await journal.find("R-1")).ending == ending
        assert await journal.find("R-2") is None


async def test_begin_acting_switches_all_processes(kind):
    """A journal that was open before another process called ``begin_acting`` also records FINAL."""
    async with kind.make() as journal:
        inbox = await journal.inbox()
        async with contextlib.AsyncExitStack() as others:
            is_shared = not isinstance(journal, SqliteJournal)
            other = await others.enter_async_context(kind.make()) if is_shared else journal
            await begin(other)
            await journal.begin_acting()
            assert (await other.finish(held("R-1"), MADE)).state is State.FINAL
        assert (await inbox.finish(held("R-1"), MADE)).state is State.DONE  # acting applies only to the journal itself


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


async def test_pending_yields_open_refunds_oldest_first(kind):
    """``pending`` yields the unresolved and the accepted refunds in the order of their first ``begin``."""
    async with kind.make() as journal:
        for number, ending in enumerate((None, MADE, ACCEPTED, REJECTED, None)):
            await begin(journal, f"R-{number}")
            if ending is not None:
                await journal.finish(held(f"R-{number}"), ending)
        assert [(entry.no_refund, entry.state) async for entry in journal.pending()] == [
            ("R-0", State.UNRESOLVED),
            ("R-2", State.ACCEPTED),
            ("R-4", State.UNRESOLVED),
        ]


async def test_pending_yields_each_of_many_refunds_once(kind):
    """``pending`` yields each of 1,200 refunds once while they finish, and ends although other refunds begin."""
    async with kind.make() as journal:
        async with anyio.create_task_group() as group:
            for number in range(1200):
                group.start_soon(begin, journal, f"R-{number}")
        seen = []
        async for entry in journal.pending():
            seen.append(entry.no_refund)
            if len(seen) % 100 == 0:
                await journal.finish(entry, MADE)
                await begin(journal, f"later-{len(seen)}")
        assert sorted(seen) == sorted(f"R-{number}" for number in range(1200))


async def test_entries_yields_all_refunds_oldest_first(kind):
    """``entries`` yields each of 600 refunds in any state, with its ending, and ends although other refunds begin."""
    async with kind.make() as journal:
        for number, ending in enumerate((None, MADE, ACCEPTED, REJECTED)):
            await begin(journal, f"R-{number}")
            if ending is not None:
                await journal.finish(held(f"R-{number}"), ending)
        async with anyio.create_task_group() as group:
            for number in range(4, 600):
                group.start_soon(begin, journal, f"R-{number}")
        seen = []
        async for entry in journal.entries():
            seen.append(entry)
            await begin(journal, "later")
        assert [entry.ending for entry in seen[:4]] == [None, MADE, ACCEPTED, REJECTED]
        assert sorted(entry.no_refund for entry in seen) == sorted(f"R-{number}" for number in range(600))


async def test_counts_has_every_state(kind):
    """``counts`` returns the number of refunds in every state, including 0."""
    async with kind.make() as journal:
        assert await journal.counts() == dict.fromkeys(State, 0)
        for number, ending in enumerate((None, MADE, ACCEPTED, MADE, REJECTED, MADE, MADE)):
            await begin(journal, f"R-{number}")
            if ending is not None:
                await journal.finish(held(f"R-{number}"), ending)
        assert await journal.counts() == dict(zip(State, (1, 1, 0, 4, 1, 0), strict=True))
        assert await journal.find("R-9") is None


async def test_a_reopened_journal_has_all_entries(kind):
    """Resolved and released refunds are in the journal after it is closed and reopened."""
    async with kind.make() as journal:
        await begin(journal, "R-1")
        resolved = await journal.finish(held("R-1"), MADE)
        _, entry = await begin(journal, "R-2")
        await journal.release(entry, None)
    async with kind.make() as journal:
        again = await journal.find("R-1")
        assert attrs.evolve(again, sent_at=resolved.sent_at) == resolved
        assert kind.is_same(again.sent_at, resolved.sent_at)
        assert (await begin(journal, "R-2"))[0] is Standing.NEW
        assert (await begin(journal, "R-3"))[0] is Standing.NEW
        assert [entry.no_refund async for entry in journal.pending()] == ["R-2", "R-3"]


async def test_a_journal_in_another_event_loop_raises(kind, anyio_backend_name):
    """Otherwise the call would wait for ever: the other loop's task is not woken. A memory journal has no task."""

    async def find():
        with anyio.fail_after(10):
            await journal.find("R-1")

    async with kind.make() as journal:
        if not isinstance(journal, MemoryJournal):
            with pytest.raises(RuntimeError, match="was opened in another event loop: open it in the loop that uses"):
                await anyio.to_thread.run_sync(partial(anyio.run, find, backend=anyio_backend_name))
        assert await journal.find("R-1") is None


async def test_two_threads_never_get_the_same_lease_of_a_memory_journal(anyio_backend_name):
    """A ``begin`` in another thread waits until the first one has stored its entry."""
    journal, standings = MemoryJournal(), []

    async def begin_there():
        standings.append((await begin(journal))[0])

    thread = threading.Thread(target=partial(anyio.run, begin_there, backend=anyio_backend_name))

    class Interrupted(Begin):
        def __call__(self, entry, is_acting):
            result = super().__call__(entry, is_acting)
            thread.start()
            thread.join(0.1)  # without the lock the other thread ends now, and it gets the lease, too
            return result

    interrupted = Interrupted(intent(), now())
    await journal.record(Operation("R-1", interrupted))
    standings.append(interrupted.standing)
    await anyio.to_thread.run_sync(thread.join)
    assert standings == [Standing.NEW, Standing.LEASED]


async def test_a_memory_journal_is_read_while_another_thread_records(anyio_backend_name, monkeypatch):
    """``counts`` and ``canaries`` do not fail if a refund is added while they read the entries."""
    journal, minutes = MemoryJournal(), count()

    async def add():
        minute = next(minutes)
        _, entry = await journal.begin(intent(f"R-{minute}"), now(60 * minute))
        await journal.finish(entry, MADE)

    def state(entry, original=Entry.state.fget):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=partial(anyio.run, add, backend=anyio_backend_name))
            thread.start()
            thread.join()
        return original(entry)

    await add()
    await add()
    monkeypatch.setattr(Entry, "state", property(state))
    assert (await journal.counts())[State.DONE] == 2
    assert [entry.no_refund for entry in await journal.canaries()][-2:] == ["R-1", "R-0"]


async def test_repr_of_a_memory_journal_shows_its_size():
    """The ``repr`` shows the number of refunds."""
    journal = MemoryJournal()
    await begin(journal)
    assert repr(journal) == "<MemoryJournal 1 refunds>"


# ── cancellation ─────────────────────────────────────────────────────────────────────────────────


async def test_a_cancelled_begin_is_rolled_back(kind):
    """A ``begin`` that is cancelled at any point leaves the refund as it was: NEW or UNRESOLVED."""
    async with kind.make() as journal:
        sent_at = now(-3600)
        for moment in range(8):
            _, entry = await begin(journal, f"known-{moment}")
            await journal.release(entry, sent_at)
            for number in (f"new-{moment}", f"known-{moment}"):
                await _cancelled_after(moment, begin, journal, number)
        for moment in range(8):
            standing, entry = await begin(journal, f"new-{moment}")
            assert (standing, entry.sent_at) == (Standing.NEW, None)
            standing, entry = await begin(journal, f"known-{moment}")
            assert standing is Standing.UNRESOLVED
            assert kind.is_same(entry.sent_at, sent_at)


async def test_finish_and_release_are_recorded_despite_cancellation(kind):
    """``finish`` and ``release`` are recorded, at whatever point their caller is cancelled."""
    async with kind.make() as journal:
        for moment in range(8):
            await begin(journal, f"made-{moment}")
            await _cancelled_after(moment, journal.finish, held(f"made-{moment}"), MADE)
            _, entry = await begin(journal, f"let-go-{moment}")
            await _cancelled_after(moment, journal.release, entry, None)
        for moment in range(8):
            assert (await begin(journal, f"made-{moment}"))[0] is Standing.FINISHED
            assert (await begin(journal, f"let-go-{moment}"))[0] is Standing.NEW


async def _cancelled_after(moments, function, *arguments):
    """Call it and cancel it after that many checkpoints. If it returns before, undo it."""
    result = None

    async def call():
        nonlocal result
        result = await function(*arguments)

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        for _ in range(moments + 1):
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    if function is begin and result is not None:
        _, entry = result
        await arguments[0].release(entry, entry.sent_at)


# ── the inbox ────────────────────────────────────────────────────────────────────────────────────


async def test_the_inbox_is_a_journal_of_its_own(kind):
    """The inbox and its journal are separate, even for the same refund numbers."""
    async with kind.make() as journal:
        inbox = await journal.inbox()
        await begin(inbox)
        assert await journal.find("R-1") is None
        assert (await begin(journal, money="1.00"))[0] is Standing.NEW
        assert (await begin(inbox))[0] is Standing.LEASED


async def test_there_is_one_inbox(kind):
    """All calls of ``inbox``, also concurrent ones, return the same journal."""
    async with kind.make() as journal:
        found = []

        async def ask():
            found.append(await journal.inbox())

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ask)
        assert len(found) == 3
        assert all(one is found[0] for one in found)


async def test_the_inbox_opens_and_closes_with_its_journal(kind):
    """The entries of the inbox are there after its journal is reopened."""
    async with kind.make() as journal:
        await begin(await journal.inbox(), lease=OVER)
    async with kind.make() as journal:
        assert [entry.no_refund async for entry in (await journal.inbox()).pending()] == ["R-1"]


# ── history ──────────────────────────────────────────────────────────────────────────────────────


def told(entry):
    """Return the events of an entry's history."""
    return [(fact.what, fact.result, fact.times) for fact in facts(entry.history)]


async def test_history_has_each_step_of_a_refund(kind):
    """Every call adds its facts to those of earlier calls, and the history survives a restart."""
    async with kind.make() as journal:
        await journal.begin_acting()
        _, entry = await begin(journal, lease=OVER)
        await journal.resend(entry, added(entry.history, now(), "resend"))
        await journal.release(entry, now(), history=added(entry.history, now(), "query", "no answer in time"))
        _, entry = await begin(journal)
        await journal.finish(entry, ACCEPTED, added(entry.history, now(), "apply", "sta_refund 1"))
        await journal.finish(entry, MADE, added((await journal.find("R-1")).history, now(), "notification"))
        await journal.acted("R-1", now(60))
    async with kind.make() as journal:
        entry = await journal.find("R-1")
        assert [what for what, _, _ in told(entry)] == [
            *("begun", "resend", "query", "lease", "apply", "notification", "acted")
        ]
        assert told(entry)[2] == ("query", "no answer in time", 1)
        first, *_, last = facts(entry.history)
        assert 60 <= last.at - first.at <= 120


async def test_history_is_bounded(kind):
    """Equal events in a row count as one; of many others, the first three and the latest six stay."""
    async with kind.make() as journal:
        _, entry = await begin(journal)
        history = entry.history
        for number in (1, 1, 1, *range(2, 12)):
            history = added(history, now(), "query", f"{number}\n" + 50 * "x")
        await journal.release(entry, now(), history=history)
        found = told(await journal.find("R-1"))
        assert [(result[:2].strip(), times) for _, result, times in found] == [
            ("", 1), ("1", 3), ("2", 1), *((str(number), 1) for number in range(6, 12)),
        ]  # fmt: skip
        assert max(len(result) for _, result, _ in found) <= 32
        assert len((await journal.find("R-1")).history) < 500


async def test_history_keeps_the_facts_of_concurrent_calls(kind):
    """A call that did not see the latest facts adds its own to them."""
    async with kind.make() as journal:
        _, late = await begin(journal, lease=OVER)
        _, entry = await begin(journal)
        await journal.finish(late, MADE, added(late.history, now(), "apply", "sta_refund 2"))
        assert told(await journal.find("R-1")) == [("begun", "", 1), ("lease", "", 1), ("apply", "sta_refund 2", 1)]
        assert (await journal.finish(entry, MADE, added("", now(), "query"))).ending == MADE
        assert len(told(await journal.find("R-1"))) == 3


# ── decisions ────────────────────────────────────────────────────────────────────────────────────

BY_HAND = Ending(state=State.DONE, record={"sta_refund": "2", "evidence": "a bank statement"})
NOT_MADE = Ending(state=State.REJECTED, record={"ret_code": "decided", "verified": "no", "evidence": "a letter"})
CONFLICT = Ending(state=State.CONFLICT, record={"ret_code": "0000", "money_refund": "9.00"})
UNSIGNED = Ending(state=State.REJECTED, record={"ret_code": "5007", "verified": "no"})
SIGNED = Ending(state=State.REJECTED, record={"ret_code": "5007", "verified": "yes"})


@pytest.mark.parametrize("decided", [BY_HAND, NOT_MADE], ids=["made", "not made"])
@pytest.mark.parametrize(
    "ending", [None, ACCEPTED, CONFLICT, UNSIGNED], ids=["unresolved", "accepted", "conflict", "5007"]
)
async def test_a_decision_is_final(kind, ending, decided):
    """A decision becomes the outcome, keeps the earlier record, and no later outcome replaces it."""
    async with kind.make() as journal:
        _, entry = await begin(journal)
        await (journal.release(entry, now()) if ending is None else journal.finish(entry, ending))
        if ending is UNSIGNED and decided is NOT_MADE:
            with pytest.raises(JournalError, match="R-1: it is rejected already; nothing was changed"):
                await journal.decide("R-1", decided, now())
            return
        stored = await journal.decide("R-1", decided, now())
        assert (stored.state, stored.body, told(stored)[-1][0]) == (decided.state, b"", "decided")
    async with kind.make() as journal:
        assert (await journal.find("R-1")).ending == stored.ending
        record = dict(stored.ending.record)
        assert ("recorded" in record) is (ending is not None)
        assert ending is None or json.loads(record.pop("recorded")) == ending.record
        assert record == decided.record
        assert (await begin(journal))[0] is Standing.FINISHED
        assert (await journal.finish(held("R-1"), MADE)).ending == stored.ending
        assert await journal.canaries() == []
        for other in (BY_HAND, NOT_MADE):
            with pytest.raises(JournalError, match="nothing was changed"):
                await journal.decide("R-1", other, now())


async def test_a_decision_that_it_was_made_waits_for_the_handler(kind):
    """After ``begin_acting``, a refund that was decided as made is FINAL until ``acted``."""
    async with kind.make() as journal:
        await journal.begin_acting()
        await journal.release((await begin(journal))[1], now())
        assert (await journal.decide("R-1", BY_HAND, now())).state is State.FINAL
        await journal.acted("R-1", now())
        assert (await journal.find("R-1")).state is State.DONE


@pytest.mark.parametrize("ending", [MADE, SIGNED], ids=["made", "rejected"])
async def test_a_signed_final_outcome_cannot_be_decided(kind, ending):
    """A decision never replaces an outcome that the gateway has signed, nor a final one."""
    async with kind.make() as journal:
        await journal.finish((await begin(journal))[1], ending)
        for decided in (BY_HAND, NOT_MADE):
            with pytest.raises(JournalError, match=r"R-1: .* already.*nothing was changed"):
                await journal.decide("R-1", decided, now())
        assert (await journal.find("R-1")).ending == ending


async def test_a_leased_refund_cannot_be_decided(kind):
    """While a call has the lease, a decision is refused; so is one for a number without an entry."""
    async with kind.make() as journal:
        await begin(journal)
        with pytest.raises(JournalError, match="R-1: another call or worker has its lease and may be sending it"):
            await journal.decide("R-1", BY_HAND, now())
        with pytest.raises(JournalError, match="refund R-2: it is not in this journal"):
            await journal.decide("R-2", BY_HAND, now())
        assert (await journal.find("R-1")).ending is None


# ── an entry that the journal may have lost ──────────────────────────────────────────────────────

LOST_AT = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "dt_refund", "grace", "query_first", "is_sent"),
    [
        (899, "20260102195959", 900.0, True, True),  # created before the loss: a call may have sent it
        (899, "20260102200000", 900.0, True, False),
        (899, "20990101000000", 900.0, True, False),
        (900, "20260102201500", 900.0, False, False),
        (900, "20260102201459", 900.0, True, False),  # created before the end of the grace
        (10**6, "20200101000000", 900.0, True, False),
        (0, "20260102195959", 0.0, True, False),
        (0, "20260102200000", 0.0, False, False),
        (0, "20200101000000", None, False, False),  # an inbox sends nothing
    ],
)
def test_a_refund_that_a_journal_may_have_lost_is_queried_first(seconds, dt_refund, grace, query_first, is_sent):
    """During the grace after a loss every refund; later each one whose ``dt_refund`` is before the grace's end."""
    begin = Begin(intent(fields={"no_refund": "R-1", "dt_refund": dt_refund}, grace=grace), now())
    begin.allow_for_failover(LOST_AT, LOST_AT + timedelta(seconds=seconds))
    assert (begin.query_first, begin.sent_at) == (query_first, begin.now if is_sent else None)


# ── a begin that has waited ──────────────────────────────────────────────────────────────────────


def test_the_wait_for_the_database_is_a_part_of_the_lease():
    """The caller counts its lease from its call, so the entry must not promise a longer one."""
    called_at = now()
    begin = Begin(intent("R-1", lease=30.0), called_at)
    begin.postpone(called_at.boot + 5)
    entry = begin(None, False)
    assert begin.now == called_at.after(5)
    assert entry.leased_until == called_at.after(30)
