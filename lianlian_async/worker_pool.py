"""Any number of items in through a bounded number of workers, and what they find out again, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing, contextmanager
from itertools import count
from typing import Any, Generic, TypeVar

import anyio

from .background import is_failure
from .errors import LianLianError
from .settings import check_integer

__all__ = ["Handover", "checked", "iterate", "run_workers"]

T = TypeVar("T")


def checked(concurrency: int) -> int:
    """``concurrency``, if it is one; else ``ConfigurationError``."""
    return check_integer("concurrency", concurrency, least=1)


async def run_workers(
    items: Iterable[T] | AsyncIterable[T],
    handle: Callable[[T], Awaitable[None]],
    *,
    workers: int,
    intake: anyio.CancelScope,
) -> None:
    """Hand every item to ``handle``, at most ``workers`` at a time; an item is taken only when a worker is free.

    All items are taken in the calling task; an async generator of them is closed in any case. Whoever cancels
    ``intake`` stops the taking: what was begun is carried through. So does the first exception, of either side,
    which is raised then; a cancellation that nobody asked for is raised as ``LianLianError``. ``KeyboardInterrupt``
    and ``SystemExit`` also cancel what was begun.
    """
    free = anyio.Semaphore(workers, fast_acquire=True)
    failures: list[BaseException] = []

    @contextmanager
    def stopping() -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            cancelled = anyio.get_cancelled_exc_class()
            if isinstance(error, cancelled | GeneratorExit) and not is_failure(error):
                raise
            # A task group would take a cancellation that nobody asked for as its own, and end without a word.
            failures.append(_stray(error) if isinstance(error, cancelled) else error)
            (group.cancel_scope if isinstance(error, KeyboardInterrupt | SystemExit) else intake).cancel()

    handled, numbers = 0, count()
    unbegun = dict[int, Coroutine[Any, Any, None]]()

    def begin(item: T) -> Coroutine[Any, Any, None]:
        number = next(numbers)
        return unbegun.setdefault(number, work(number, item))

    async def work(number: int, item: T) -> None:
        nonlocal handled
        del unbegun[number]
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
        # An event loop of asyncio that ends cancels tasks that have not begun, too: what was to run in them would
        # complain that nobody awaited it.
        for coroutine in unbegun.values():
            coroutine.close()
    if failures:
        raise failures[0]
    if handled < next(numbers):  # asyncio's Task.cancel of a single worker ends it, and the task group says nothing
        raise LianLianError("a task was cancelled from outside: the item that it was given may not have been handled")


def _stray(cancellation: BaseException) -> LianLianError:
    error = LianLianError("a task was cancelled from within, though nobody had asked it to end")
    error.__cause__ = cancellation
    return error


async def iterate(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T]:
    """``items``, of either kind, as an async generator; closing it closes an async generator of theirs."""
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
            await _close(iterator)


async def _close(iterator: AsyncGenerator[object]) -> None:
    try:
        await iterator.aclose()
    except BaseExceptionGroup as group:  # a task group inside of it wraps the very exception that closes it
        _, others = group.split(GeneratorExit)
        if others is not None:
            raise others from None


class Handover(Generic[T]):
    """Between many who find items and a consumer: whoever gives one goes on when it is taken.

    An item is taken or it is still there, however its consumer was cancelled: with a memory object stream, one
    is lost whose receiver asyncio's own ``Task.cancel`` meets between getting it and waking up.
    """

    def __init__(self) -> None:
        self._given: deque[tuple[T, anyio.Event]] = deque()
        self._news = anyio.Event()
        self._ended = False

    async def give(self, item: T) -> None:
        """Offer ``item``, and wait until somebody has taken it."""
        taken = anyio.Event()
        self._given.append((item, taken))
        self._news.set()
        await taken.wait()

    async def take(self) -> T:
        """The next item. ``EndOfStream`` when there will be no more."""
        while not self._given:
            if self._ended:
                raise anyio.EndOfStream
            if self._news.is_set():
                self._news = anyio.Event()
            await self._news.wait()
        item, taken = self._given.popleft()
        taken.set()
        return item

    def end(self) -> None:
        """There are no more, and what nobody has taken is dropped."""
        self._ended = True
        self._given.clear()
        self._news.set()
