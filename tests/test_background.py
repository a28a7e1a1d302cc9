"""A task behind an object: it runs until it ends or is cancelled, from wherever that comes."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextvars import ContextVar

import anyio
import anyio.to_thread
import pytest

from lianlian_async.background import BackgroundTask, complete, run_in_thread
from lianlian_async.errors import LianLianError
from tests.support.interruptions import Abort

pytestmark = pytest.mark.anyio

place = ContextVar("place", default="nowhere")


class Watch:
    """A function that waits for ever, and the marks that it left."""

    def __init__(self):
        self.begun = anyio.Event()
        self.ended = False

    async def __call__(self):
        self.begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.ended = True


async def test_it_runs_by_itself_to_its_end():
    """It needs nobody who waits for it; closing it afterwards changes nothing."""
    done = anyio.Event()

    async def function():
        await anyio.lowlevel.checkpoint()
        done.set()

    background = BackgroundTask(function)
    await done.wait()
    await background.aclose()


async def test_closing_cancels_it_and_waits_until_it_has_ended():
    """When ``aclose`` returns, its clean-up is done; that holds for a caller that is cancelled itself, too."""
    for cancelled in (False, True):
        watch = Watch()
        background = BackgroundTask(watch)
        await watch.begun.wait()
        with anyio.CancelScope() as scope:
            if cancelled:
                scope.cancel()
            await background.aclose()
        assert watch.ended


async def test_closed_before_it_began_it_ends_at_its_first_wait():
    """Closing at once does not have to wait for ever."""
    watch = Watch()
    await BackgroundTask(watch).aclose()
    assert watch.ended


async def test_another_thread_may_cancel_it():
    """``cancel_soon`` wakes the event loop from outside."""
    watch = Watch()
    background = BackgroundTask(watch)
    await watch.begun.wait()
    thread = threading.Timer(0.05, background.cancel_soon)  # the event loop is asleep by then
    thread.start()
    with anyio.fail_after(10):
        await background.join()
    thread.join()
    assert watch.ended


async def test_it_sees_the_context_that_it_was_started_in():
    """Context variables, a trace for instance, go with it."""
    seen = []

    async def function():
        seen.append(place.get())

    token = place.set("the caller's")
    background = BackgroundTask(function)
    place.reset(token)
    await background.join()
    await background.aclose()
    assert seen == ["the caller's"]


async def test_garbage_collection_leaves_it_alone():
    """Though asyncio holds its tasks only weakly, this one stays as long as its owner."""
    watch = Watch()
    background = BackgroundTask(watch)
    await watch.begun.wait()
    gc.collect()
    assert not watch.ended
    await background.aclose()


async def test_without_an_event_loop_there_is_no_task(anyio_backend_name):
    """It is refused, and nothing is left behind, where no event loop runs."""
    errors = []

    def make():
        try:
            BackgroundTask(Watch())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("error", [None, LookupError("gone"), Abort("the end")], ids=repr)
async def test_its_owner_is_told_how_it_ended(error):
    """With what it raised, whatever kind of exception that is, or with None; before who waits for its end goes on."""
    ends = []

    async def function():
        await anyio.lowlevel.checkpoint()
        if error is not None:
            raise error

    await BackgroundTask(function, ends.append).join()
    assert ends == [error]


async def test_closed_by_its_owner_it_has_not_failed():
    """Cancelled through its own object, it ends in None."""
    ends = []
    await BackgroundTask(Watch(), ends.append).aclose()
    assert ends == [None]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_at_the_end_of_the_event_loop_its_owner_is_told_that_it_was_cancelled(backend):
    """The cancellation that the owner did not ask for is an error, as something was not completed."""
    ends = []

    async def main():
        watch = Watch()
        main.background = BackgroundTask(watch, ends.append)
        await watch.begun.wait()

    anyio.run(main, backend=backend)
    [error] = ends
    assert isinstance(error, LianLianError)
    assert "cancelled from outside" in str(error)


# ── completed although it is cancelled ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_to_be_completed_is_called_again_until_it_ends(anyio_backend):
    """``Task.cancel`` interrupts a call, which is then made again; the cancellation is raised at the end."""
    calls, may_end, called = [], asyncio.Event(), asyncio.Event()

    async def call():
        calls.append(None)
        called.set()
        await may_end.wait()

    task = asyncio.create_task(complete(call))
    for _ in range(3):
        await called.wait()
        called.clear()
        task.cancel()
    await called.wait()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(calls) == 4


async def test_a_cancelled_scope_does_not_interrupt_what_is_to_be_completed():
    """It is called once, and the scope's cancellation comes at the next wait."""
    calls = []

    async def call():
        await anyio.lowlevel.checkpoint()
        calls.append(None)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await complete(call)
    assert len(calls) == 1


class ThreadWork:
    """Blocks a thread until it may end; knows what was undone."""

    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.undone = []

    def __call__(self):
        self.begun.set()
        self.may_end.wait()
        return "a file"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 2])
async def test_a_thread_is_waited_for_and_its_result_undone(anyio_backend, times):
    """A caller that ``Task.cancel`` takes away, even twice, first sees the thread end, and what it made undone."""
    work = ThreadWork()
    task = asyncio.create_task(run_in_thread(work, limiter=anyio.CapacityLimiter(1), undo=work.undone.append))
    await anyio.to_thread.run_sync(work.begun.wait)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not task.done()
    work.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.undone == ["a file"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_thread_work_that_has_not_begun_never_begins(anyio_backend):
    """Cancelled while another has the thread, it is called off."""
    limiter, work = anyio.CapacityLimiter(1), ThreadWork()
    async with limiter:
        task = asyncio.create_task(run_in_thread(work, limiter=limiter))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not work.begun.is_set()


async def test_what_a_thread_raises_is_raised():
    """An exception of the work is the caller's, and there is nothing to undo."""
    undone = []

    def work():
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await run_in_thread(work, limiter=anyio.CapacityLimiter(1), undo=undone.append)
    assert undone == []


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_event_loop_that_is_gone_has_taken_it_along(backend):
    """At the end of the loop it is cancelled; to cancel it after that is no error."""
    watch = Watch()

    async def main():
        background = BackgroundTask(watch)
        await watch.begun.wait()
        return background

    background = anyio.run(main, backend=backend)
    assert watch.ended
    background.cancel_soon()


def test_a_loop_that_ends_before_it_began_keeps_nobody_waiting():
    """When its main task ends, asyncio cancels what is left, even a task that has not begun yet."""
    ends = []

    async def owner():
        background = BackgroundTask(Watch())
        try:
            await asyncio.sleep(3600)
        finally:
            await background.aclose()
            ends.append("closed")

    async def main():
        main.owner = asyncio.create_task(owner())  # begins in the loop's last step, too late for what it starts

    asyncio.run(main())
    assert ends == ["closed"]
