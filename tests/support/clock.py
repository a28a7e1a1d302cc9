"""Virtual time for asyncio and trio: a sleep takes no real time, and time does not advance while a thread works.

Time advances only when no task is runnable, no I/O is ready and no thread works for a task.
Then it jumps to the next timer. Threads that are started through ``anyio.to_thread.run_sync`` (as an attribute
of its module) or by a backend's own name lookup are counted, and time stands still while one of them is running.

Not covered: peers in another process or another event loop (their answers may arrive after a jump), and a
thread job that waits for virtual time to pass (it waits forever). ``anyio.wait_all_tasks_blocked`` may
move asyncio's time by tenths of a second: it polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio.to_thread
import pytest
import trio
import trio.testing


class _ThreadJobs:
    """Counts running thread jobs; calls ``on_change`` when the first job starts and when the last job ends."""

    def __init__(self, on_change: Callable[[bool], None] = lambda _: None) -> None:
        self.out = 0
        self._on_change = on_change

    @contextlib.contextmanager
    def one_more(self) -> Iterator[None]:
        self.out += 1
        if self.out == 1:
            self._on_change(True)
        try:
            yield
        finally:
            self.out -= 1
            if not self.out:
                self._on_change(False)

    def counted(self, run_sync: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Return ``run_sync`` with its calls counted."""

        async def counting_run_sync(*args: Any, **options: Any) -> Any:
            with self.one_more():
                return await run_sync(*args, **options)

        return counting_run_sync


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that advances virtual time to the next timer instead of waiting for it."""

    def __init__(self, jobs: _ThreadJobs) -> None:
        super().__init__()
        self.now = 0.0
        self._jobs = jobs

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        if self._jobs.out:  # its thread wakes the loop when it is done
            return super().select(None)
        ready = super().select(0)
        if not ready:
            self.now += timeout
        return ready


class _VirtualEventLoop(asyncio.SelectorEventLoop):
    def __init__(self, jobs: _ThreadJobs) -> None:
        self._jobs = jobs
        self._jumping = _JumpingSelector(jobs)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        with self._jobs.one_more():
            return await super().getaddrinfo(*args, **options)

    async def shutdown_default_executor(self, *args: Any) -> None:
        with self._jobs.one_more():
            await super().shutdown_default_executor(*args)


def virtual_backend(name: str, patch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Return the anyio backend ``name`` and its options for virtual time, which starts at 0.0."""
    if name == "asyncio":
        jobs = _ThreadJobs()
        options: dict[str, Any] = {"loop_factory": lambda: _VirtualEventLoop(jobs)}
    else:
        clock = trio.testing.MockClock(autojump_threshold=0)

        def stand_still(out: bool) -> None:
            clock.autojump_threshold = math.inf if out else 0

        jobs = _ThreadJobs(stand_still)
        options = {"clock": clock}
        patch.setattr(trio.to_thread, "run_sync", jobs.counted(trio.to_thread.run_sync))  # name lookup
    patch.setattr(anyio.to_thread, "run_sync", jobs.counted(anyio.to_thread.run_sync))
    return name, options
