"""The worker pool: the number of items in flight, when items are taken, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import anyio
import anyio.lowlevel
import pytest

from lianlian_async import LianLianError
from lianlian_async.worker_pool import Handover, run_workers
from tests.support.interruptions import Abort, stray_cancellation

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


class Numbers:
    """Yields numbers from 0; records how many were taken, by which tasks, and whether it was closed."""

    def __init__(self, count=10**9, *, fails_at=None, rests_at=None):
        self.count = count
        self.fails_at = fails_at
        self.rests_at = rests_at
        self.taken = 0
        self.tasks = set()
        self.closed = False

    async def __call__(self):
        try:
            for number in range(self.count):
                self.tasks.add(anyio.get_current_task().id)
                if number == self.fails_at:
                    raise LookupError("no more numbers")
                if number == self.rests_at:
                    await anyio.sleep_forever()
                self.taken += 1
                yield number
        finally:
            self.closed = True

    def plain(self):
        for number in range(self.count):
            if number == self.fails_at:
                raise LookupError("no more numbers")
            self.taken += 1
            yield number


async def run(items, handle, workers=3, intake=None):
    await run_workers(items, handle, workers=workers, intake=intake or anyio.CancelScope())


# ── run_workers ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["list", "generator", "async generator", "async iterator"])
async def test_every_item_is_handled_once(kind):
    """Items of every kind of source are handled exactly once."""
    numbers = Numbers(10)
    send, receive = anyio.create_memory_object_stream[int](10)
    with send:
        for number in range(10):
            send.send_nowait(number)
    handled = []

    async def handle(number):
        await anyio.sleep(1)
        handled.append(number)

    with receive:
        await run(
            {
                "list": list(range(10)),
                "generator": numbers.plain(),
                "async generator": numbers(),
                "async iterator": receive,
            }[kind],
            handle,
        )
    assert sorted(handled) == list(range(10))


@pytest.mark.parametrize("workers", [1, 3, 20])
async def test_items_in_flight_are_limited(workers):
    """There are never more items in flight than workers, and an item is taken only when a worker is free."""
    numbers = Numbers(10 * workers)
    running = 0

    async def handle(number):
        nonlocal running
        running += 1
        assert running <= workers
        assert numbers.taken <= workers * (anyio.current_time() + 1)
        await anyio.sleep(1)
        running -= 1

    await run(numbers(), handle, workers)
    assert numbers.taken == 10 * workers
    assert anyio.current_time() == 10


async def test_items_are_taken_in_the_calling_task():
    """An async generator with its own scopes is iterated only by the caller's task."""
    numbers = Numbers(10)

    async def scoped():
        with anyio.CancelScope():
            async with anyio.create_task_group(), contextlib.aclosing(numbers()) as source:
                async for number in source:
                    yield number

    await run(scoped(), lambda number: anyio.sleep(number % 3))
    assert numbers.tasks == {anyio.get_current_task().id}
    assert numbers.closed


@pytest.mark.parametrize("rests", [True, False], ids=["waits for an item", "waits for a worker"])
async def test_cancelled_intake_finishes_begun_items(rests):
    """The items are closed, and those that were taken are handled to their end."""
    numbers = Numbers(rests_at=2 if rests else None)
    intake = anyio.CancelScope()
    handled = []

    async def handle(number):
        await anyio.sleep(10)
        handled.append((number, numbers.closed))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, numbers(), handle, 3, intake)
        await anyio.sleep(5)
        intake.cancel()
    taken = 2 if rests else 3
    assert sorted(handled) == [(number, True) for number in range(taken)]
    assert numbers.taken == taken
    assert anyio.current_time() == 10


@pytest.mark.parametrize("has_begun", [True, False])
async def test_cancelled_worker_is_an_error(has_begun, anyio_backend_name):
    """Its item was not handled, so run_workers must not end normally."""
    if anyio_backend_name != "asyncio":
        pytest.skip("only asyncio lets others cancel a single task")
    handled, before = [], asyncio.all_tasks()

    async def numbers():
        yield 0
        [worker] = asyncio.all_tasks() - before
        if has_begun:
            await anyio.sleep(1)
        worker.cancel()
        yield 1
        yield 2

    async def handle(number):
        await anyio.sleep(5)
        handled.append(number)

    with pytest.raises(LianLianError, match="cancelled from outside"):
        await run(numbers(), handle, workers=2)
    assert 0 not in handled


@pytest.mark.parametrize("plain", [True, False], ids=["generator", "async generator"])
async def test_exception_of_the_items(plain):
    """Items that were taken are handled to their end, then the exception is raised unchanged."""
    numbers = Numbers(fails_at=2)
    handled = []

    async def handle(number):
        await anyio.sleep(10)
        handled.append(number)

    with pytest.raises(LookupError, match="no more numbers"):
        await run(numbers.plain() if plain else numbers(), handle)
    assert sorted(handled) == [0, 1]


async def test_exception_of_the_handler():
    """The other begun items are finished, no more are taken, and the first exception is raised."""
    numbers = Numbers()
    handled = []

    async def handle(number):
        await anyio.sleep(1 + number)
        if number < 2:
            raise ValueError(f"number {number}")
        handled.append(number)

    with pytest.raises(ValueError, match="number 0"):
        await run(numbers(), handle)
    assert handled == [2]
    assert numbers.taken == 3
    assert numbers.closed


async def test_cancellation_leaves_nothing_running():
    """A cancelled run_workers leaves nothing running and nothing open."""
    numbers = Numbers()
    cancelled = []

    async def handle(number):
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(number)

    with anyio.move_on_after(1):
        await run(numbers(), handle)
    assert sorted(cancelled) == [0, 1, 2]
    assert numbers.closed


@pytest.mark.parametrize("where", ["work", "items"])
async def test_unrequested_cancellation_is_an_error(where):
    """It ends the intake, begun items are finished, and it is raised as an error."""
    handled = []

    async def items():
        for number in range(5):
            yield number
        if where == "items":
            await stray_cancellation()

    async def handle(number):
        await anyio.sleep(1 + number)
        if where == "work" and number == 0:
            await stray_cancellation()
        handled.append(number)

    with pytest.raises(LianLianError, match="cancelled from outside") as caught:
        await run(items(), handle)
    assert isinstance(caught.value.__cause__, anyio.get_cancelled_exc_class())
    assert sorted(handled) == ([1, 2] if where == "work" else [0, 1, 2, 3, 4])


@pytest.mark.parametrize("error", [Abort(), SystemExit(7), KeyboardInterrupt()], ids=repr)
async def test_base_exceptions_are_raised_unchanged(error):
    """KeyboardInterrupt and SystemExit also cancel the begun items."""
    handled = []

    async def handle(number):
        await anyio.sleep(1 + number)
        if number == 0:
            raise error
        handled.append(number)

    with pytest.raises(type(error)) as caught:
        await run(Numbers()(), handle)
    assert caught.value is error
    assert handled == ([1, 2] if isinstance(error, Abort) else [])
    assert anyio.current_time() == (3 if isinstance(error, Abort) else 1)


def test_an_item_that_has_not_started_when_the_loop_ends():
    """The end of an asyncio loop cancels the item's task before its first step. Python warns about no coroutine."""
    taken, begun = [], []

    async def items():
        for number in itertools.count():
            taken.append(number)
            yield number
            await asyncio.sleep(0)

    async def handle(item):
        begun.append(item)
        await asyncio.sleep(60)

    async def main():
        task = asyncio.ensure_future(run_workers(items(), handle, workers=100, intake=anyio.CancelScope()))
        while not begun:  # noqa: ASYNC110 - one step of the event loop at a time
            await asyncio.sleep(0)
        return task

    assert asyncio.run(main()).cancelled()
    assert taken == [*begun, len(begun)]


# ── hand-off ─────────────────────────────────────────────────────────────────────────────────────


async def test_producer_waits_until_its_item_is_taken():
    """Producer and consumer wait for each other, and items keep their order."""
    handoff = Handover()
    went_on = []

    async def give(item):
        await handoff.give(item)
        went_on.append((item, anyio.current_time()))

    taken = []
    async with anyio.create_task_group() as tasks:
        for item in range(3):
            tasks.start_soon(give, item)
            await anyio.wait_all_tasks_blocked()
        await anyio.sleep(1 - anyio.current_time())
        for second in range(1, 4):
            taken.append(await handoff.take())
            await anyio.sleep(second + 1 - anyio.current_time())
        tasks.start_soon(give, 3)
        taken.append(await handoff.take())
    assert taken == [0, 1, 2, 3]
    assert went_on == [(0, 1), (1, 2), (2, 3), (3, 4)]


async def test_cancelled_consumer_loses_no_item():
    """A consumer that is cancelled at any moment has the item, or leaves it to the next one."""
    handoff = Handover()

    async def give_all():
        for item in range(50):
            await anyio.sleep(1)
            await handoff.give(item)
        handoff.end()

    taken = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(give_all)
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                with anyio.move_on_after(0.25):  # every fourth deadline comes together with an item
                    taken.append(await handoff.take())
    assert taken == list(range(50))


async def test_task_cancel_of_the_consumer_loses_no_item(anyio_backend_name):
    """If ``Task.cancel`` happens in the same step of the event loop as ``give``, the next consumer gets the item."""
    if anyio_backend_name != "asyncio":
        pytest.skip("trio has no such cancellation")
    handoff = Handover()
    for item in range(3):
        taker = asyncio.create_task(handoff.take())
        await asyncio.sleep(0)
        giver = asyncio.create_task(handoff.give(item))
        await asyncio.sleep(0)  # given: the taker is to wake up in the next step
        taker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taker
        assert await handoff.take() == item
        await giver


async def test_end_drops_items():
    """Every waiting consumer learns of the end; an item that was not taken is dropped, and its producer waits."""
    handoff = Handover()
    ends = []

    async def take():
        with pytest.raises(anyio.EndOfStream):
            await handoff.take()
        ends.append(anyio.current_time())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        tasks.start_soon(take)
        await anyio.sleep(1)
        handoff.end()
    assert ends == [1, 1]
    other = Handover()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other.give, "an item")
        await anyio.sleep(1)
        other.end()
        with pytest.raises(anyio.EndOfStream):
            await other.take()
        tasks.cancel_scope.cancel()
