"""Simulated replacements of threads, random values, garbage collection and stop watches during a run."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import anyio
import anyio.lowlevel
import anyio.to_thread
import sniffio
from anyio._backends import _asyncio as anyio_asyncio

from lianlian_async import rsa_worker

from . import keys
from .world import UNDEAD, NodeLoop, World


class _OrderedSet(dict[Any, None]):
    """A set with the order of insertion; the order of anyio's sets of tasks would depend on memory addresses."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)

    def remove(self, item: Any) -> None:
        del self[item]


async def _run_sync(
    function: Callable[..., Any],
    *arguments: Any,
    abandon_on_cancel: bool = False,
    limiter: anyio.CapacityLimiter | None = None,
) -> Any:
    """Replace ``anyio.to_thread.run_sync``: a step of the world instead of a thread."""
    await anyio.lowlevel.checkpoint()
    if limiter is None:
        return await _thread(function, arguments)
    async with limiter:
        with anyio.CancelScope(shield=not abandon_on_cancel):
            return await _thread(function, arguments)


def _thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> asyncio.Future[Any]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, NodeLoop)
    world, future = loop.world, loop.create_future()
    loop.threads += 1

    def come_back(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if loop.is_suspended:
            world.after(1.0, lambda: come_back(set_outcome, outcome))
        elif not loop.is_dead:
            loop.threads -= 1
            if not future.done():
                set_outcome(outcome)

    def work() -> None:
        if loop.is_dead:
            return
        if loop.is_suspended:
            world.after(1.0, work)
            return
        world.thread_of = loop
        try:
            outcome, set_outcome = function(*arguments), future.set_result
        except Exception as error:  # noqa: BLE001 - it is raised where the thread is awaited
            outcome, set_outcome = error, future.set_exception
        finally:
            world.thread_of = None
        seconds = world.slow_threads * world.random.random() + loop.slow_disk
        world.after(seconds, lambda: come_back(set_outcome, outcome))

    world.after(world.slow_threads * world.random.random(), work)
    waiter = asyncio.current_task()
    if waiter is not None and world.random.random() < world.cancelled_threads:
        world.after(2 * world.slow_threads * world.random.random(), lambda: loop.is_dead or waiter.cancel())
    return future


async def _wait_if_cancelled(_: object) -> None:
    """Replace anyio's ``checkpoint_if_cancelled``: wait for the cancellation instead of polling in each iteration."""
    task = asyncio.current_task()
    state = anyio_asyncio._task_states.get(task) if task is not None else None
    scope = state.cancel_scope if state is not None else None
    while scope is not None and not scope.cancel_called:
        if scope.shield:
            return
        scope = scope._parent_scope
    if scope is not None:
        await asyncio.get_running_loop().create_future()


def _go_on(world: World) -> None:
    """Let event loops run while a thread signs, as with real threads."""
    loop = world.thread_of
    if loop is not None and world.random.random() < world.interleaved_threads:
        world.thread_of, share = None, world.interleaved_threads
        world.interleaved_threads = 0.0  # one deep
        world.run(10_000, until=world.now + world.slow_threads * world.random.random())
        world.thread_of, world.interleaved_threads = loop, share


def _begin_generator(generator: Any) -> None:
    loop = asyncio._get_running_loop()
    if isinstance(loop, NodeLoop):
        loop.generators.add(generator)


def _drop_generator(generator: Any) -> None:
    """Close an abandoned async generator on its loop, unless the loop is dead."""
    loop = asyncio._get_running_loop()
    if isinstance(loop, NodeLoop) and not loop.is_dead:
        loop.create_task(generator.aclose())
    else:
        UNDEAD.append(generator)  # the garbage collector would close the awaited coroutine without an event loop


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """Let ``world`` control threads, random values, the garbage collector and stop watches while the block runs."""
    stop_watch = world.random.choice([1e-5, 2e-4, 1e-3])
    """Apparent seconds for one signature: they decide whether a thread signs, and how many signatures share a round."""
    readings = count()
    state, hooks, was_enabled = random.getstate(), sys.get_asyncgen_hooks(), gc.isenabled()
    random.seed(world.random.random())
    sys.set_asyncgen_hooks(firstiter=_begin_generator, finalizer=_drop_generator)
    logging.disable(logging.CRITICAL)
    gc.disable()
    sniffio.thread_local.name = "asyncio"  # sniffio does not need to detect the library
    try:
        with (
            mock.patch.object(anyio.to_thread, "run_sync", _run_sync),
            mock.patch.object(keys, "while_signing", partial(_go_on, world)),
            mock.patch.object(anyio_asyncio, "set", _OrderedSet, create=True),
            mock.patch.object(anyio_asyncio.AsyncIOBackend, "checkpoint_if_cancelled", classmethod(_wait_if_cancelled)),
            mock.patch.object(rsa_worker, "perf_counter", lambda: next(readings) * stop_watch),  # noqa: PT008 - a new one each time
        ):
            yield
    finally:
        if was_enabled:
            gc.enable()
        world.leave_loop()
        sniffio.thread_local.name = None
        logging.disable(logging.NOTSET)
        sys.set_asyncgen_hooks(*hooks)
        random.setstate(state)
