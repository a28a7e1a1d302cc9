"""The lifecycle of a session: it is opened once, used in one event loop, and closed after the running calls."""

from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from enum import Enum

import anyio
import anyio.lowlevel


class _State(Enum):
    NEW = "not open: use it in `async with`"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class Lifecycle:
    """The state of a ``RefundSession``, and its running calls, of which at most ``slots`` have a slot at a time.

    Use before opening, after closing, or from another event loop is a bug in the program: it raises ``RuntimeError``.
    """

    def __init__(self, slots: int) -> None:
        self._most = slots
        self._state = _State.NEW
        self._running = 0

    def __str__(self) -> str:
        return self._state.name.lower()

    @contextmanager
    def opening(self) -> Generator[None]:
        """Set the state to open after the block, or to closed if the block raises."""
        if self._state is not _State.NEW:
            raise self._misused(f"is already {self._state.value}: create a new one for each `async with`")
        self._state = _State.OPENING
        self._event_loop = anyio.lowlevel.current_token()
        self._slots = anyio.Semaphore(self._most, fast_acquire=True)
        self._idle = anyio.Event()
        try:
            yield
        except BaseException:
            self._state = _State.CLOSED
            raise
        self._state = _State.OPEN

    async def close(self) -> None:
        """Refuse further calls and wait for the running calls; if this wait is cancelled, close at once."""
        self._state = _State.CLOSING
        try:
            while self._running:
                self._idle = anyio.Event()
                await self._idle.wait()
        finally:
            self._state = _State.CLOSED

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Count one call; :meth:`close` waits for it."""
        self.check_open()
        if anyio.lowlevel.current_token() != self._event_loop:
            raise self._misused("belongs to another event loop: open a separate one in each loop")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    @asynccontextmanager
    async def slot(self, wait: Callable[[], AbstractContextManager[None]]) -> AsyncGenerator[None]:
        """Hold one of the slots. Calls that must wait get one in order of arrival; they wait inside ``wait()``."""
        if self._slots.value:
            await self._slots.acquire()
        else:
            with wait():
                await self._slots.acquire()
        try:
            self.check_open()  # close() may have been called during the wait
            yield
        finally:
            self._slots.release()

    def check_open(self) -> None:
        """Raise ``RuntimeError`` unless the object is open."""
        if self._state is not _State.OPEN:
            raise self._misused(f"is {self._state.value}")

    def _misused(self, problem: str) -> RuntimeError:
        hint = ""
        if self._state is not _State.NEW and anyio.lowlevel.current_token() != self._event_loop:
            hint = "; in synchronous code, keep one loop in a thread: see the blocking portal in lianlian_async.contrib"
        return RuntimeError(f"this RefundSession {problem}{hint}")
