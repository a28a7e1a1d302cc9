"""A task that outlives the function which started it, but not its owner: what an iterator needs behind it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context

import anyio

from .event_loop import asyncio_loop

__all__ = ["Background"]


class Background:
    """Runs ``function`` in a task of its own, on asyncio or trio, from now on until it ends or is cancelled.

    anyio has only task groups, whose scope is a block of code; an iterator that its consumer may drop at any
    point has no such block. ``function`` has to deal with its own exceptions.
    """

    def __init__(self, function: Callable[[], Awaitable[None]]) -> None:
        self._function = function
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        loop = asyncio_loop()
        if loop is not None:
            self._call_soon = loop.call_soon_threadsafe
            self._task = loop.create_task(self._run())  # asyncio itself holds tasks only weakly
            # Not at the end of the task's own code: a loop that ends may cancel a task before that has begun.
            self._task.add_done_callback(lambda _: self._ended.set())
        else:
            import trio

            self._call_soon = trio.lowlevel.current_trio_token().run_sync_soon
            trio.lowlevel.spawn_system_task(self._run, context=copy_context())

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._function()
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
        self._scope.cancel()
        with anyio.CancelScope(shield=True):
            await self._ended.wait()
