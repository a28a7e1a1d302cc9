"""Virtual time for asyncio and trio: a sleep takes no real time, and virtual time stops while a thread works.

Time advances only when no task is runnable, no I/O is ready and no thread works for a task. Then it jumps to the next
timer. Threads count if they are started by ``anyio.to_thread.run_sync`` (called as an attribute of its module),
``asyncio.to_thread``, or a backend's DNS lookup.

Not covered: peers in another process or another event loop, whose answers may arrive after a jump, and a thread that
waits for virtual time to pass, which waits forever. ``anyio.wait_all_tasks_blocked`` polls, so it may advance
asyncio's time by tenths of a second.
"""

import asyncio
import contextlib
import math
import selectors
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread

from lianlian_async.clock import Moment

if TYPE_CHECKING:
    import pytest
    import trio.testing

T = TypeVar("T")


class VirtualTime:
    """The time of one test, which starts at 0.0 seconds. ``patch`` must be undone after the test."""

    def __init__(self, patch: "pytest.MonkeyPatch") -> None:
        self.seconds = 0.0  # the time on asyncio
        self.threads = 0  # the number of threads that are working
        self._trio: trio.testing.MockClock | None = None
        self._began = datetime.now(UTC)
        self._patch = patch
        patch.setattr(anyio.to_thread, "run_sync", self._counted(anyio.to_thread.run_sync))

    def now(self) -> float:
        """Return the seconds since the start of the test. Works outside of the event loop, too."""
        return self.seconds if self._trio is None else self._trio.current_time()

    def moment(self) -> Moment:
        """Return virtual time in the form of a session's clock: pass this method as ``clock=``."""
        return Moment(self._began + timedelta(seconds=self.now()), self.now(), "virtual time")

    def backend(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return ``asyncio`` or ``trio`` with its options: the value of anyio's fixture ``anyio_backend``."""
        if name == "asyncio":
            return name, {"loop_factory": lambda: _EventLoop(self)}
        import trio.testing

        if self._trio is None:
            self._trio = trio.testing.MockClock(autojump_threshold=0)
            self._patch.setattr(trio.to_thread, "run_sync", self._counted(trio.to_thread.run_sync))  # used by DNS
        return name, {"clock": self._trio}

    def run(self, function: Callable[..., Awaitable[T]], *args: Any, backend: str = "asyncio") -> T:
        """Run an async function in virtual time from a synchronous test."""
        name, options = self.backend(backend)
        return anyio.run(function, *args, backend=name, backend_options=options)

    def count(self, change: int) -> None:
        """Count a thread that starts (1) or ends (-1)."""
        self.threads += change
        if self._trio is not None:
            self._trio.autojump_threshold = math.inf if self.threads else 0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the time while a thread works."""
        self.count(1)
        try:
            yield
        finally:
            self.count(-1)

    def _counted(self, run_sync: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def counting_run_sync(*args: Any, **options: Any) -> Any:
            with self.stopped():
                return await run_sync(*args, **options)

        return counting_run_sync


class _Selector(selectors.DefaultSelector):
    """A selector that advances the time to the next timer instead of waiting for it."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self._time.threads:  # the thread wakes the event loop when it is done
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self._time.seconds += timeout
        return ready


class _EventLoop(asyncio.SelectorEventLoop):
    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        super().__init__(_Selector(time))

    def time(self) -> float:
        return self._time.seconds

    def run_in_executor(self, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = super().run_in_executor(*args)
        self._time.count(1)
        future.add_done_callback(lambda _: self._time.count(-1))
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        with self._time.stopped():
            await super().shutdown_default_executor(*args)
