"""Any number of items through a bounded number of workers, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

import anyio

__all__ = ["drain", "iterate"]

T = TypeVar("T")


async def drain(items: AsyncGenerator[T], handle: Callable[[T], Awaitable[None]], *, workers: int) -> None:
    """Hand every item to ``handle``, at most ``workers`` at a time; an item is taken only when a worker is free.

    An exception of either cancels the other workers and is raised as task groups raise it. ``items`` is closed.
    """
    turn = anyio.Lock(fast_acquire=True)

    async def worker() -> None:
        while True:
            async with turn:
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
            await handle(item)

    async with aclosing(items), anyio.create_task_group() as group:
        for _ in range(workers):
            group.start_soon(worker)


async def iterate(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T]:
    """``items``, of either kind, as an async generator; closing it closes theirs."""
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
