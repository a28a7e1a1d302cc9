"""Background tasks, calls that complete despite cancellation, and checks whether a cancellation was requested."""

import math
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from .errors import LianLianError

T = TypeVar("T")


def asyncio_loop() -> Any | None:
    """Return the running event loop if it is asyncio's (or uvloop's), None on trio."""
    loop: Any = anyio.lowlevel.current_token().native_token
    return loop if hasattr(loop, "create_task") else None  # isinstance would import asyncio in programs on trio


def call_soon_threadsafe() -> Callable[[Callable[[], object]], object]:
    """Return the function with which other threads schedule a callback on the running event loop."""
    loop = asyncio_loop()
    if loop is not None:
        return cast("Callable[[Callable[[], object]], object]", loop.call_soon_threadsafe)
    import trio

    return trio.lowlevel.current_trio_token().run_sync_soon


def is_cancelled() -> bool:
    """Return whether the current task was cancelled: by a scope around this call, or by asyncio's ``Task.cancel``."""
    if anyio.current_effective_deadline() == -math.inf:
        return True
    if asyncio_loop() is None:
        return False
    from asyncio import current_task

    task = current_task()
    return task is not None and task.cancelling() > 0


def is_failure(error: BaseException) -> bool:
    """Return whether ``error`` is a failure: an ``Exception``, or a cancellation that nobody requested."""
    return isinstance(error, Exception) or (isinstance(error, anyio.get_cancelled_exc_class()) and not is_cancelled())


class BackgroundTask:
    """Runs ``function`` in a task until it ends or is cancelled, on asyncio or trio, without a task group.

    ``on_end`` is called once, however the task ends, so that it can release the task's waiters. Its argument is the
    exception that ``function`` raised; None if ``function`` returned or this object cancelled it; or a
    ``LianLianError`` if another cancellation ended the task, even before its start: by asyncio's ``Task.cancel``, or at
    the end of the event loop.
    ``on_end`` must report the exception, because nothing else does, except that asyncio also raises
    ``KeyboardInterrupt`` and ``SystemExit`` out of its event loop.
    """

    def __init__(
        self, function: Callable[[], Awaitable[None]], on_end: Callable[[BaseException | None], object] = lambda _: None
    ) -> None:
        self._function = function
        self._on_end = on_end
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        self._call_soon = call_soon_threadsafe()
        loop = asyncio_loop()
        if loop is not None:
            self._task = loop.create_task(self._run())  # keep a reference: asyncio's own reference is weak
            # A callback, because the end of the event loop may cancel the task before _run starts.
            self._task.add_done_callback(self._end_task)
        else:
            import trio

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
        except BaseException as error:  # noqa: BLE001 - trio treats an exception in a system task as an internal error
            self._end(error)
        else:
            self._end(None)

    def _end_task(self, task: Any) -> None:
        self._end(_cancelled() if task.cancelled() else task.exception())

    def _end(self, error: BaseException | None) -> None:
        on_end = self._on_end
        # Break the reference cycle of the owner, these functions and this object. Only the garbage collector would free
        # the cycle, and its run over the garbage of a thousand tasks blocks the event loop for 70 ms.
        del self._function, self._on_end
        try:
            on_end(error)
        finally:
            self._ended.set()

    def cancel_soon(self) -> None:
        """Cancel the task; callable from another thread, in a finalizer, and after the end of the event loop."""
        with suppress(RuntimeError):  # or its subclass trio.RunFinishedError: the loop is closed, the task has ended
            self._call_soon(self._scope.cancel)

    @property
    def has_ended(self) -> bool:
        """Whether the task has ended."""
        return self._ended.is_set()

    async def join(self) -> None:
        """Wait until the task ends."""
        await self._ended.wait()

    async def aclose(self) -> None:
        """Cancel the task and wait until it has ended."""
        if not self.has_ended:
            self._scope.cancel()
            await complete(self._ended.wait)


def _cancelled() -> LianLianError:
    return LianLianError("a background task was cancelled from outside, for example by the end of the event loop")


async def complete(call: Callable[[], Awaitable[object]]) -> None:
    """Await ``call()`` until it completes, then raise the cancellation that interrupted it, if any.

    ``call`` must be idempotent: a shield does not stop asyncio's ``Task.cancel``, so an interrupted call is repeated.
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
    """Run ``function`` in a thread, and return its result. Even after a cancellation, wait until it has ended.

    If ``function`` has not started, a cancellation prevents its start. Otherwise ``undo`` is called with the result, in
    a thread, before the cancellation is raised.
    """
    unstarted, ended, results = [function], threading.Event(), list[T]()

    def work() -> None:
        started = unstarted.pop()
        try:
            results.append(started(*arguments))
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
            unstarted.pop()  # not started: a thread that starts later finds no function
        except IndexError:
            if results or not ended.is_set():
                # A separate limiter, so that this wait does not queue behind other threads.
                await complete(lambda: anyio.to_thread.run_sync(clean_up, limiter=anyio.CapacityLimiter(1)))
        raise
    return results.pop()
