"""Process any number of items with a bounded number of workers, in bounded memory."""

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing, contextmanager
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

import anyio

from .background import is_failure
from .errors import LianLianError

T = TypeVar("T")


class _Slots(Protocol):
    async def acquire(self) -> None: ...
    def release(self) -> None: ...


async def run_workers(
    items: Iterable[T] | AsyncIterable[T],
    handle: Callable[[T], Awaitable[object]],
    *,
    workers: int | _Slots,
    intake: anyio.CancelScope,
) -> None:
    """Call ``handle`` for each item. ``workers``: the maximum number of concurrent calls, or what limits them.

    The calling task takes the next item only when a worker is free. An async generator is always closed. After the
    first exception of ``items`` or ``handle``, or a cancellation of ``intake``, no further item is taken; the started
    items are finished, then the exception is raised. A cancellation that nobody requested is raised as
    ``LianLianError``. ``KeyboardInterrupt`` and ``SystemExit`` also cancel the started items.
    """
    free = anyio.Semaphore(workers, fast_acquire=True) if isinstance(workers, int) else workers
    failures: list[BaseException] = []

    @contextmanager
    def stopping() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            cancelled = anyio.get_cancelled_exc_class()
            if isinstance(error, cancelled | GeneratorExit) and not is_failure(error):
                raise
            # A task group treats a cancellation that nobody requested as its own, and would end without an error.
            failures.append(_cancelled(error) if isinstance(error, cancelled) else error)
            (group.cancel_scope if isinstance(error, KeyboardInterrupt | SystemExit) else intake).cancel()

    handled, numbers = 0, count()
    not_started = dict[int, Coroutine[Any, Any, None]]()

    def begin(item: T) -> Coroutine[Any, Any, None]:
        number = next(numbers)
        return not_started.setdefault(number, work(number, item))

    async def work(number: int, item: T) -> None:
        nonlocal handled
        del not_started[number]
        try:
            with stopping():
                await handle(item)
            handled += 1
        finally:
            free.release()

    try:
        async with anyio.create_task_group() as group:
            with stopping(), intake:
                async with aclosing(iterate(items)) as source:
                    await free.acquire()
                    async for item in source:
                        group.start_soon(begin, item)
                        await free.acquire()
    finally:
        # When asyncio's event loop ends, it also cancels tasks that have not started. Without this close, Python warns
        # that their coroutines were never awaited.
        for coroutine in not_started.values():
            coroutine.close()
    if failures:
        raise failures[0]
    if handled < next(numbers):  # asyncio's Task.cancel ended a worker; the task group ignores that
        raise _cancelled()


def _cancelled(cause: BaseException | None = None) -> LianLianError:
    error = LianLianError("a background task was cancelled from outside: a refund may be unfinished")
    error.__cause__ = cause
    return error


async def iterate(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T]:
    """Yield the items of any iterable; closing this generator closes ``items`` if it is an async generator."""
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
        return
    iterator = aiter(items)
    try:
        async for item in iterator:
            yield item
    finally:
        if isinstance(iterator, AsyncGenerator):
            await iterator.aclose()


class Handover(Generic[T]):
    """Hands items from many producers to one consumer; each producer waits until its item is taken.

    A cancellation of the consumer never loses an item. In anyio's memory object stream, an item is lost if asyncio's
    ``Task.cancel`` cancels the receiver between the delivery and the moment when the receiver resumes.
    """

    def __init__(self) -> None:
        self._offered: deque[tuple[T, anyio.Event]] = deque()
        self._changed = anyio.Event()
        self._ended = False

    async def give(self, item: T) -> None:
        """Offer ``item`` and wait until it is taken."""
        taken = anyio.Event()
        self._offered.append((item, taken))
        self._changed.set()
        await taken.wait()

    async def take(self) -> T:
        """Return the next item; raise ``EndOfStream`` after the last one."""
        while not self._offered:
            if self._ended:
                raise anyio.EndOfStream
            if self._changed.is_set():
                self._changed = anyio.Event()
            await self._changed.wait()
        item, taken = self._offered.popleft()
        taken.set()
        return item

    def end(self) -> None:
        """End the stream and drop the items that were not taken; their producers wait until they are cancelled."""
        self._ended = True
        self._offered.clear()
        self._changed.set()
