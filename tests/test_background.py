"""Background tasks: they run until they end or are cancelled, by their owner, a thread or the event loop."""

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
    """A function that waits forever, and flags for its start, its clean-up and its end."""

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


async def test_task_runs_to_its_end_without_a_waiter():
    """Closing it afterwards changes nothing."""
    done = anyio.Event()

    async def function():
        await anyio.lowlevel.checkpoint()
        done.set()

    background = BackgroundTask(function)
    await done.wait()
    await background.aclose()


async def test_aclose_cancels_and_waits():
    """When ``aclose`` returns, the clean-up is done, even if its caller is cancelled."""
    for cancelled in (False, True):
        watch = Watch()
        background = BackgroundTask(watch)
        await watch.begun.wait()
        with anyio.CancelScope() as scope:
            if cancelled:
                scope.cancel()
            await background.aclose()
        assert watch.ended


async def test_closed_before_it_began():
    """The task ends at its first wait."""
    watch = Watch()
    await BackgroundTask(watch).aclose()
    assert watch.ended


async def test_cancel_from_another_thread():
    """``cancel_soon`` works in another thread and wakes the event loop."""
    watch = Watch()
    background = BackgroundTask(watch)
    await watch.begun.wait()
    thread = threading.Timer(0.05, background.cancel_soon)  # the event loop is asleep by then
    thread.start()
    with anyio.fail_after(10):
        await background.join()
    thread.join()
    assert watch.ended


async def test_context_variables_are_inherited():
    """The task sees the context variables of its creator, for example a trace."""
    seen = []

    async def function():
        seen.append(place.get())

    token = place.set("the caller's")
    background = BackgroundTask(function)
    place.reset(token)
    await background.join()
    await background.aclose()
    assert seen == ["the caller's"]


async def test_garbage_collection_does_not_end_the_task():
    """The event loop of asyncio holds tasks only weakly; this one lives as long as its owner."""
    watch = Watch()
    background = BackgroundTask(watch)
    await watch.begun.wait()
    gc.collect()
    assert not watch.ended
    await background.aclose()


async def test_without_an_event_loop(anyio_backend_name):
    """Creation fails, and nothing is left behind."""
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
async def test_on_end_gets_the_exception(error):
    """``on_end`` gets the raised exception of any kind, or None, before waiters continue."""
    ends = []

    async def function():
        await anyio.lowlevel.checkpoint()
        if error is not None:
            raise error

    await BackgroundTask(function, ends.append).join()
    assert ends == [error]


async def test_on_end_gets_none_after_aclose():
    """Cancellation by the owner is no failure."""
    ends = []
    await BackgroundTask(Watch(), ends.append).aclose()
    assert ends == [None]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_on_end_gets_an_error_at_the_end_of_the_loop(backend):
    """A cancellation that the owner did not request is an error, since work is incomplete."""
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
async def test_complete_repeats_an_interrupted_call(anyio_backend):
    """``Task.cancel`` interrupts a call, which is then repeated; the cancellation is raised at the end."""
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


async def test_complete_is_shielded_from_cancelled_scopes():
    """The call is made once; the scope's cancellation arrives at the next wait."""
    calls = []

    async def call():
        await anyio.lowlevel.checkpoint()
        calls.append(None)

    with anyio.CancelScope() as scope:
        scope.cancel()
        await complete(call)
    assert len(calls) == 1


class ThreadWork:
    """Blocks a thread until the test releases it, and records the undone results."""

    def __init__(self):
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.undone = []

    def __call__(self):
        self.begun.set()
        self.may_end.wait()
        return "a file"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 2])
async def test_cancelled_caller_waits_for_the_thread_and_undoes_its_result(anyio_backend, times):
    """Also if ``Task.cancel`` is called twice."""
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
async def test_cancelled_work_that_has_not_begun_is_not_run(anyio_backend):
    """It is cancelled while another call uses the thread."""
    limiter, work = anyio.CapacityLimiter(1), ThreadWork()
    async with limiter:
        task = asyncio.create_task(run_in_thread(work, limiter=limiter))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not work.begun.is_set()


async def test_exception_of_a_thread_is_raised():
    """There is nothing to undo."""
    undone = []

    def work():
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await run_in_thread(work, limiter=anyio.CapacityLimiter(1), undo=undone.append)
    assert undone == []


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_end_of_the_event_loop_cancels_the_task(backend):
    """Cancelling it afterwards is no error."""
    watch = Watch()

    async def main():
        background = BackgroundTask(watch)
        await watch.begun.wait()
        return background

    background = anyio.run(main, backend=backend)
    assert watch.ended
    background.cancel_soon()


def test_loop_that_ends_before_the_task_began():
    """When its main task ends, asyncio cancels every other task, even one that has not begun."""
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
