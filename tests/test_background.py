"""A task behind an object: it runs until it ends or is cancelled, from wherever that comes."""

from __future__ import annotations

import asyncio
import gc
import threading
from contextvars import ContextVar

import anyio
import pytest

from lianlian_async.background import Background

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

    background = Background(function)
    await done.wait()
    await background.aclose()


async def test_closing_cancels_it_and_waits_until_it_has_ended():
    """When ``aclose`` returns, its clean-up is done; that holds for a caller that is cancelled itself, too."""
    for cancelled in (False, True):
        watch = Watch()
        background = Background(watch)
        await watch.begun.wait()
        with anyio.CancelScope() as scope:
            if cancelled:
                scope.cancel()
            await background.aclose()
        assert watch.ended


async def test_closed_before_it_began_it_ends_at_its_first_wait():
    """Closing at once does not have to wait for ever."""
    watch = Watch()
    await Background(watch).aclose()
    assert watch.ended


async def test_another_thread_may_cancel_it():
    """``cancel_soon`` wakes the event loop from outside."""
    watch = Watch()
    background = Background(watch)
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
    background = Background(function)
    place.reset(token)
    await background.join()
    await background.aclose()
    assert seen == ["the caller's"]


async def test_garbage_collection_leaves_it_alone():
    """Though asyncio holds its tasks only weakly, this one stays as long as its owner."""
    watch = Watch()
    background = Background(watch)
    await watch.begun.wait()
    gc.collect()
    assert not watch.ended
    await background.aclose()


async def test_without_an_event_loop_there_is_no_task(anyio_backend_name):
    """It is refused, and nothing is left behind, where no event loop runs."""
    errors = []

    def make():
        try:
            Background(Watch())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_event_loop_that_is_gone_has_taken_it_along(backend):
    """At the end of the loop it is cancelled; to cancel it after that is no error."""
    watch = Watch()

    async def main():
        background = Background(watch)
        await watch.begun.wait()
        return background

    background = anyio.run(main, backend=backend)
    assert watch.ended
    background.cancel_soon()


def test_a_loop_that_ends_before_it_began_keeps_nobody_waiting():
    """When its main task ends, asyncio cancels what is left, even a task that has not begun yet."""
    ends = []

    async def owner():
        background = Background(Watch())
        try:
            await asyncio.sleep(3600)
        finally:
            await background.aclose()
            ends.append("closed")

    async def main():
        main.owner = asyncio.create_task(owner())  # begins in the loop's last step, too late for what it starts

    asyncio.run(main())
    assert ends == ["closed"]
