"""Work that outlives its caller: a task behind an object, and calls that are completed although they are cancelled."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from .errors import LianLianError
from .event_loop import asyncio_loop

__all__ = ["BackgroundTask", "complete", "run_in_thread"]

T = TypeVar("T")


class BackgroundTask:
    """Runs ``function`` in a task of its own, on asyncio or trio, from now on until it ends or is cancelled.

    anyio has only task groups, whose scope is a block of code; an iterator that its consumer may drop at any
    point has no such block.

    ``on_end`` is called once, however the task ends, to release whoever waits for it: with what ``function`` raised, or
    with None if it returned or was cancelled by this object. The end of the event loop or asyncio's ``Task.cancel``,
    even of a task that has not begun, gives it a ``LianLianError`` that says so. asyncio itself raises
    ``KeyboardInterrupt`` and ``SystemExit`` out of its event loop; everything else is ``on_end``'s to report.
    """

    def __init__(
        self, function: Callable[[], Awaitable[None]], on_end: Callable[[BaseException | None], object] = lambda _: None
    ) -> None:
        self._function = function
        self._on_end = on_end
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        loop = asyncio_loop()
        if loop is not None:
            self._call_soon = loop.call_soon_threadsafe
            self._task = loop.create_task(self._run())  # asyncio itself holds tasks only weakly
            # Not at the end of the task's own code: a loop that ends may cancel a task before that has begun.
            self._task.add_done_callback(self._end_task)
        else:
            import trio

            self._call_soon = trio.lowlevel.current_trio_token().run_sync_soon
            trio.lowlevel.spawn_system_task(self._run_in_trio, context=copy_context())

    async def _run(self) -> None:
        with self._scope:
            await self._function()

    async def _run_in_trio(self) -> None:
        try:
            await self._run()
        except anyio.get_cancelled_exc_class():
            self._end(_cancelled())
            raise
        except BaseException as error:  # noqa: BLE001 - trio takes an exception of a system task for a bug of its own
            self._end(error)
        else:
            self._end(None)

    def _end_task(self, task: Any) -> None:
        self._end(_cancelled() if task.cancelled() else task.exception())

    def _end(self, error: BaseException | None) -> None:
        try:
            self._on_end(error)
        finally:
            self._ended.set()

    def cancel_soon(self) -> None:
        """Cancel it from anywhere: another thread, a finalizer, after the event loop is gone."""
        with suppress(RuntimeError):  # the loop is closed (trio.RunFinishedError is one too), and the task with it
            self._call_soon(self._scope.cancel)

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._ended.is_set()

    async def join(self) -> None:
        """Wait until it has ended by itself."""
        await self._ended.wait()

    async def aclose(self) -> None:
        """Cancel it and wait until it has ended."""
        if not self.has_ended:
            self._scope.cancel()
            await complete(self._ended.wait)


def _cancelled() -> LianLianError:
    return LianLianError(
        "its task was cancelled from outside: by the end of the event loop, or by asyncio's Task.cancel"
    )


async def complete(call: Callable[[], Awaitable[object]]) -> None:
    """Await ``call()`` to its end, then raise the cancellation that came meanwhile, if any did.

    A shield does not stop asyncio's ``Task.cancel``, so an interrupted ``call()`` is made again: it must be idempotent.
    """
    cancellation: BaseException | None = None
    while True:
        try:
            with anyio.CancelScope(shield=True):
                await call()
        except anyio.get_cancelled_exc_class() as error:
            cancellation = error
        else:
            break
    if cancellation is not None:
        raise cancellation


async def run_in_thread(
    function: Callable[..., T],
    *arguments: Any,
    limiter: anyio.CapacityLimiter,
    undo: Callable[[T], object] = lambda _: None,
) -> T:
    """Run ``function`` in a thread, and never leave it behind there.

    A caller that is cancelled waits until ``function`` has ended; its result is then given to ``undo``, in a thread,
    before the cancellation is raised. A function that has not begun is not run at all.
    """
    unbegun, ended, results = [function], threading.Event(), list[T]()

    def work() -> None:
        begun = unbegun.pop()
        try:
            results.append(begun(*arguments))
        finally:
            ended.set()

    def clean_up() -> None:
        ended.wait()
        while results:
            undo(results.pop())

    try:
        await anyio.to_thread.run_sync(work, limiter=limiter)
    except BaseException:
        try:
            unbegun.pop()  # called off: the thread that still comes for it finds nothing
        except IndexError:
            if results or not ended.is_set():
                # With a limiter of its own: this wait must not queue behind other threads.
                await complete(lambda: anyio.to_thread.run_sync(clean_up, limiter=anyio.CapacityLimiter(1)))
        raise
    return results.pop()
