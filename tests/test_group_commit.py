"""Group commit: many tasks share transactions, and an error or cancellation of one does not affect the others."""

from __future__ import annotations

import asyncio
import random
from functools import partial

import anyio
import pytest

from lianlian_async.journal import JournalError, SqliteJournal, SqliteReader, Standing, State
from lianlian_async.journal.operations import Begin
from tests.support.journals import MADE, held, intent, now

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


async def test_operations_of_many_tasks_share_transactions(path):
    """A thousand tasks that begin and finish concurrently share a few transactions."""
    commits = []

    async def one(journal, number):
        await journal.begin(intent(f"R-{number}"), now())
        await journal.finish(held(f"R-{number}"), MADE)

    async with SqliteJournal(path) as journal:
        journal._file._connection.set_trace_callback(commits.append)
        async with anyio.create_task_group() as group:
            for number in range(1000):
                group.start_soon(one, journal, number)
        assert (await journal.counts())[State.DONE] == 1000
    assert commits.count("COMMIT") < 20


async def test_a_failed_operation_does_not_affect_the_others(path):
    """An operation that raises, even by a bug of its caller, does not affect the others in its transaction."""
    found = []

    async def one(number):
        found.append((await journal.begin(intent(f"R-{number}"), now()))[0])

    async def wrong():
        with pytest.raises(AttributeError, match="NoneType"):
            await journal.begin(intent("R-0"), None)

    async with SqliteJournal(path) as journal:
        await one(0)
        async with anyio.create_task_group() as group:
            for function in (partial(one, 1), wrong, partial(one, 2)):
                group.start_soon(function)
    assert found == [Standing.NEW] * 3


async def test_closing_waits_for_queued_operations(path):
    """Every operation that was queued before the end of the ``async with`` is recorded and gets its result."""
    asked, answers = [], []

    async def one(number):
        asked.append(number)
        answers.append((await journal.begin(intent(f"R-{number}"), now()))[0])

    async with anyio.create_task_group() as group, SqliteJournal(path) as journal:
        for number in range(20):
            group.start_soon(one, number)
        while len(asked) < 20:
            await anyio.lowlevel.checkpoint()
    assert answers == [Standing.NEW] * 20


async def test_cancelled_tasks_do_not_affect_other_results(path):
    """Half of the tasks are cancelled at random moments: the others get their own results, and no lease remains."""
    chance = random.Random(1)
    scopes, answers = [anyio.CancelScope() for _ in range(500)], []

    async def one(number, scope):
        with scope:
            _, entry = await journal.begin(intent(f"R-{number}"), now())
            with anyio.CancelScope(shield=True):
                resolved = await journal.finish(held(f"R-{number}"), MADE)
            answers.append((number, entry.no_refund, resolved.no_refund))

    async with SqliteJournal(path) as journal:
        async with anyio.create_task_group() as group:
            for number, scope in enumerate(scopes):
                group.start_soon(one, number, scope)
            chance.shuffle(scopes)
            for turn, scope in enumerate(scopes[::2]):
                scope.cancel()
                if turn % 10 == 0:
                    await anyio.sleep(chance.choice((0, 0, 0.001)))
        assert len(answers) >= 250
        finished = {number for number, *_ in answers}
        assert answers == [(number, f"R-{number}", f"R-{number}") for number, *_ in answers]
        for number in range(500):
            standing, _ = await journal.begin(intent(f"R-{number}"), now())
            assert standing is (Standing.FINISHED if number in finished else Standing.NEW)


async def test_cancelling_the_async_with_loses_nothing(path):
    """If the whole ``async with`` is cancelled, queued operations are still recorded, and the journal closes."""
    with anyio.CancelScope() as scope:
        async with SqliteJournal(path) as journal:
            await journal.begin(intent(), now())
            scope.cancel()
            await journal.finish(held("R-1"), MADE)
    async with SqliteJournal(path) as journal:
        assert (await journal.find("R-1")).ending == MADE


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_task_cancel_ends_only_its_own_call(path):
    """``Task.cancel``, which no shield stops, ends only the call of its own task, also during the close."""

    async def work(journal, number):
        standing, _ = await journal.begin(intent(f"R-{number}"), now())
        await journal.finish(held(f"R-{number}"), MADE)
        return standing

    async with SqliteJournal(path) as journal:
        tasks = [asyncio.create_task(work(journal, number)) for number in range(200)]
        for round_, task in enumerate(tasks[::2]):
            await asyncio.sleep(0.0001 * (round_ % 3))
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[1::2] == [Standing.NEW] * 100
        for number in range(0, 200, 2):
            standing, _ = await journal.begin(intent(f"R-{number}"), now())
            assert standing in (Standing.NEW, Standing.FINISHED)

    async def opened():
        async with SqliteJournal(path):
            opening.set()
            await asyncio.sleep(0)

    for _ in range(5):
        opening = asyncio.Event()
        closing = asyncio.create_task(opened())
        await opening.wait()
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
    async with SqliteJournal(path) as journal:
        assert await journal.find("R-1")


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("is_writing", [False, True])
async def test_after_its_task_is_cancelled_every_caller_gets_a_journal_error(anyio_backend, path, is_writing):
    """Waiting and later callers get a ``JournalError``; after reopening, the recorded entries are there."""
    async with SqliteJournal(path) as journal:
        await journal.begin(intent("R-1"), now())
        asking = asyncio.gather(
            journal.begin(intent("R-2"), now()), journal.begin(intent("R-4"), now()), return_exceptions=True
        )
        await asyncio.sleep(0)
        while is_writing and not journal._writing:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
        journal._background._task.cancel()
        for error in await asking:
            assert isinstance(error, JournalError)
            assert "it records nothing more" in str(error)
        for verb in (journal.finish(held("R-1"), MADE), journal.begin(intent("R-3"), now())):
            with pytest.raises(JournalError, match="open it again"):
                await verb
    async with SqliteJournal(path) as journal:
        assert (await journal.find("R-1")).state is State.UNRESOLVED
        assert await journal.find("R-3") is None


def test_when_all_tasks_are_cancelled_the_journal_closes(path):
    """As at the end of a program: every task ends, and the file is unlocked."""

    async def hold(opened):
        async with SqliteJournal(path) as journal:
            await journal.begin(intent("R-1"), now())
            opened.set()
            await anyio.sleep_forever()

    async def main():
        opened = asyncio.Event()
        holder = asyncio.create_task(hold(opened))
        await opened.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert holder.done()
        async with SqliteJournal(path) as journal:
            assert (await journal.begin(intent("R-1"), now()))[0] is Standing.UNRESOLVED

    asyncio.run(main())


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("cancelled_after", range(12))
async def test_task_cancel_at_any_step_leaves_the_file_unlocked(anyio_backend, path, cancelled_after):
    """Opening and closing are undone or completed, wherever ``Task.cancel`` interrupts them."""

    async def hold():
        async with SqliteJournal(path) as journal:
            await journal.begin(intent(), now())
        async with SqliteReader(path) as reader:
            await reader.counts()

    task = asyncio.create_task(hold())
    for _ in range(cancelled_after):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with SqliteJournal(path) as journal:
        await journal.find("R-1")


async def test_a_begin_after_its_rollback_records_nothing():
    """A begin that is retried may be applied after its ``take_back``."""
    begin = Begin(intent(), now())
    assert begin.take_back(None, False) is None
    with pytest.raises(JournalError, match="not begun, because its call was cancelled"):
        begin(None, False)
