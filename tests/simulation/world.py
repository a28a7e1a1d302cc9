"""One seeded scheduler for many event loops: virtual time, a random next step, threads as steps.

Each node has its own event loop, so a single node can be suspended (its loop's time stops) or killed (none of its
steps runs again). Every step takes ``TICK`` seconds of virtual time, so a deadline can expire between any two steps;
when no step is ready, time jumps to the next timer.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import heapq
import math
import random
from collections.abc import Callable, Coroutine
from itertools import count
from types import MethodType
from typing import Any, Final
from weakref import WeakSet

from anyio._backends import _asyncio as anyio_asyncio

TICK: Final = 2e-6
"""Seconds of virtual time that one step takes."""

_DELIVER = anyio_asyncio.CancelScope._deliver_cancellation


class Step:
    """A scheduled callback of one event loop; also its asyncio handle."""

    __slots__ = ("arguments", "callback", "context", "is_cancelled", "loop", "time")

    def __init__(self, loop: NodeLoop, callback: Any, arguments: Any, context: Any, time: float = 0.0) -> None:
        self.loop = loop
        self.callback = callback
        self.arguments = arguments
        self.context = context
        self.time = time
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True
        self.callback = self.arguments = None

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.time

    def __str__(self) -> str:
        owner = getattr(self.callback, "__self__", None)
        name = owner.get_name() if isinstance(owner, asyncio.Task) else ""
        return f"{name} {getattr(self.callback, '__qualname__', type(self.callback).__name__)}".strip()


class _Nowhere:
    """Discards the steps of a dead node."""

    def append(self, step: Step) -> None: ...


class World:
    """The scheduler. The next step is a random one of the ``window`` oldest ready ones; 1 is asyncio's order."""

    def __init__(self, seed: int | str, *, window: int = 1_000_000, trace: Callable[[str], None] | None = None) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.trace = trace
        self.ready: list[Step] = []
        self.loop: NodeLoop | None = None
        """The event loop whose step ran last."""
        self.thread_of: NodeLoop | None = None
        """The event loop for which a thread is working now."""
        self.is_over = False
        self.slow_threads, self.cancelled_threads, self.interleaved_threads = 1e-4, 0.0, 0.0
        """See :class:`.plan.Plan`."""
        self.problems: list[str] = []
        """Exceptions of callbacks, which nobody awaits."""
        self._timers: list[tuple[float, int, Step | None, Callable[[], None] | None]] = []
        self._numbers = count()
        self._window = window

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Call ``event`` outside of every event loop, at the next step."""
        heapq.heappush(self._timers, (max(time, self.now), next(self._numbers), None, event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        """Call ``event`` after ``seconds``."""
        self.at(self.now + seconds, event)

    def add_timer(self, step: Step) -> None:
        """Make ``step`` ready at its time by its loop's clock."""
        heapq.heappush(self._timers, (step.time + step.loop.behind, next(self._numbers), step, None))

    def log(self, text: str) -> None:
        """Add a line to the trace."""
        if self.trace is not None:
            self.trace(f"{self.now:.6f} {text}")

    def run(self, most_steps: int, until: float = math.inf) -> str:
        """Run until ``is_over`` or the time ``until``, and return why the run ended.

        The reason is ``over``, ``deadlock`` (no step and no timer is left) or ``steps`` (too many).
        """
        ready, timers = self.ready, self._timers
        draw, window, last = self.random.random, self._window, self.steps + most_steps
        set_loop = asyncio._set_running_loop
        while not self.is_over and self.now < until:
            if timers and timers[0][0] <= self.now:
                self._come_due()
                continue
            number = len(ready)
            if not number:
                if not timers:
                    return "deadlock"
                self.now = min(max(self.now, timers[0][0]), until)
                continue
            step = ready.pop(int(draw() * (number if number < window else window)))  # noqa: FURB136 - faster than min()
            if step.is_cancelled:
                continue
            self.now += TICK
            self.steps += 1
            if self.steps > last:
                return "steps"
            if self.trace is not None:
                self.log(f"{step.loop.name}: {step}")
            if step.loop is not self.loop:  # it makes a system call each time
                self.loop = step.loop
                set_loop(step.loop)
            try:
                step.context.run(step.callback, *step.arguments)
            except Exception as error:  # noqa: BLE001 - asyncio reports it, too
                self.problems.append(f"{step.loop.name}: a callback raised {error!r}")
            except (SystemExit, KeyboardInterrupt):
                step.loop.on_interrupt()
        return "over"

    def leave_loop(self) -> None:
        """Unset asyncio's running event loop."""
        self.loop = None
        asyncio._set_running_loop(None)

    def _come_due(self) -> None:
        _, _, step, event = heapq.heappop(self._timers)
        if step is None:
            event()
        elif not step.is_cancelled:
            if step.loop.is_suspended or step.time > step.loop.time() + 1e-9:
                step.loop.delayed.append(step) if step.loop.is_suspended else self.add_timer(step)
            else:
                step.loop.queue.append(step)


class NodeLoop(asyncio.AbstractEventLoop):
    """The event loop of one node."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.behind = 0.0
        """Seconds by which this loop's clock is behind the world's; it stops while the machine is suspended."""
        self.queue: Any = world.ready
        """The queue of ready steps: the world's, or a separate one while the loop is suspended."""
        self.delayed: list[Step] = []
        self.is_suspended = False
        self.is_dead = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        """All tasks that are not done, oldest first."""
        self.generators = WeakSet[Any]()
        """The async generators that have started."""
        self.threads = 0
        """The number of running thread jobs."""
        self.slow_disk = 0.0
        """Extra seconds for each thread job."""
        self.on_interrupt: Callable[[], None] = lambda: None
        self._suspended_at = 0.0
        self._task_numbers = count(1)

    def __repr__(self) -> str:
        return f"<NodeLoop {self.name}>"

    # ── what asyncio asks for ────────────────────────────────────────────────────────────────────

    def time(self) -> float:
        return self.world.now - self.behind

    def get_debug(self) -> bool:
        return False

    def get_task_factory(self) -> None:
        return None

    def is_running(self) -> bool:
        return not self.is_dead

    def is_closed(self) -> bool:
        return self.is_dead

    def call_soon(self, callback: Any, *arguments: Any, context: Any = None) -> Any:
        if callback.__class__ is MethodType and callback.__func__ is _DELIVER:
            # anyio repeats this call in each iteration until the cancelled task ends; virtual time must pass.
            return self.call_later(1e-4 * 2000 ** self.world.random.random(), callback, *arguments, context=context)
        step = Step(self, callback, arguments, context or contextvars.copy_context())
        self.queue.append(step)
        return step

    def call_soon_threadsafe(self, callback: Any, *arguments: Any, context: Any = None) -> Any:
        if self.is_dead:
            raise RuntimeError("Event loop is closed")
        return self.call_soon(callback, *arguments, context=context)

    def call_later(self, delay: float, callback: Any, *arguments: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *arguments, context=context)

    def call_at(self, when: float, callback: Any, *arguments: Any, context: Any = None) -> Any:
        step = Step(self, callback, arguments, context or contextvars.copy_context(), when)
        self.world.add_timer(step)
        return step

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, Any], *, name: Any = None, context: Any = None) -> Any:
        name = name or f"task {next(self._task_numbers)} {coro.__qualname__}"
        task = asyncio.Task(coro, loop=self, name=str(name), context=context)
        self.tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.is_dead:
            self.world.problems.append(f"{self.name}: {context.get('message')}: {context.get('exception')!r}")

    # ── what the world does to it ────────────────────────────────────────────────────────────────

    def suspend(self) -> None:
        """Stop all steps and the clock until :meth:`wake`."""
        self.is_suspended, self._suspended_at = True, self.world.now
        self.queue = [step for step in self.world.ready if step.loop is self]
        self.world.ready[:] = [step for step in self.world.ready if step.loop is not self]

    def wake(self, *, clock_stood_still: bool) -> None:
        """Continue. ``clock_stood_still``: the machine was suspended; otherwise only the process was stopped."""
        if self.is_dead or not self.is_suspended:
            return
        if clock_stood_still:
            self.behind += self.world.now - self._suspended_at
        self.is_suspended = False
        self.world.ready += self.queue
        self.queue = self.world.ready
        for step in self.delayed:
            self.world.add_timer(step)
        self.delayed = []

    def kill(self) -> None:
        """Never run a step of this loop again. Exceptions from closing its coroutines are ignored."""
        self.is_dead = True
        self.world.leave_loop()
        self.queue = _Nowhere()
        self.world.ready[:] = [step for step in self.world.ready if step.loop is not self]
        for task in list(self.tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _drop(task.get_coro())
        self.tasks.clear()
        # Before Python 3.13, closing a coroutine does not close the async generator that it awaits.
        UNDEAD.extend(generator for generator in self.generators if generator.ag_await is not None)


UNDEAD: Final[list[Any]] = []
"""Coroutines and async generators that could not be closed; this reference keeps the garbage collector silent."""
ctypes.pythonapi.Py_IncRef(ctypes.py_object(UNDEAD))  # also when the interpreter ends


def _drop(coroutine: Any) -> None:
    for _ in range(20):
        try:
            coroutine.close()
        except BaseException:  # noqa: BLE001 - it awaits in `finally`, or fails there: nobody cares any more
            continue
        return
    UNDEAD.append(coroutine)
