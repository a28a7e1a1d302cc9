"""The lifecycle of a session: open, use in one event loop, close after the running calls; it may be opened again."""

from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Literal

import anyio
import anyio.lowlevel


class Lifecycle:
    """The state of a ``RefundSession``, and its running calls; at most ``slots`` of them have a connection slot.

    Use before opening, after closing, or from another event loop is a bug in the program: it raises ``RuntimeError``.
    """

    def __init__(self, slots: int) -> None:
        self._most = slots
        self._state: Literal["not open", "opening", "open", "closing", "closed"] = "not open"

    def __str__(self) -> str:
        return self._state

    @contextmanager
    def opening(self) -> Generator[None]:
        """Set the state to open after the block, or to closed if the block raises."""
        if self._state not in ("not open", "closed"):
            raise self._misused(f"is {self._state}: enter it only once at a time")
        self._state = "opening"
        self._event_loop = anyio.lowlevel.current_token()
        self._slots = anyio.Semaphore(self._most, fast_acquire=True)
        self._idle = anyio.Event()
        self._running = set[object]()  # a call that outlives a cancelled close() does not count when opened again
        try:
            yield
        except BaseException:
            self._state = "closed"
            raise
        self._state = "open"

    async def close(self) -> None:
        """Refuse further calls and wait for the running calls; if this wait is cancelled, close at once."""
        self._state = "closing"
        try:
            while self._running:
                self._idle = anyio.Event()
                await self._idle.wait()
        finally:
            self._state = "closed"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Count one call; :meth:`close` waits for it."""
        self.check_open()
        if anyio.lowlevel.current_token() != self._event_loop:
            raise self._misused("belongs to another event loop: open a separate one in each loop")
        running, call = self._running, object()
        running.add(call)
        try:
            yield
        finally:
            running.remove(call)
            if not running:
                self._idle.set()

    @asynccontextmanager
    async def slot(self, wait: Callable[[], AbstractContextManager[None]]) -> AsyncGenerator[None]:
        """Hold one of the slots. Calls that must wait get one in order of arrival; they wait inside ``wait()``."""
        slots = self._slots
        if slots.value:
            await slots.acquire()
        else:
            with wait():
                await slots.acquire()
        try:
            self.check_open()  # close() may have been called during the wait
            yield
        finally:
            slots.release()

    def check_open(self) -> None:
        """Raise ``RuntimeError`` unless the object is open."""
        if self._state != "open":
            raise self._misused(f"is {self._state}")

    def _misused(self, problem: str) -> RuntimeError:
        if self._state == "not open":
            problem += ": use it in `async with`"
        elif anyio.lowlevel.current_token() != self._event_loop:
            problem += "; in synchronous code, keep one loop in a thread"
            problem += ": see the blocking portal in lianlian_async.contrib"
        return RuntimeError(f"this RefundSession {problem}")
