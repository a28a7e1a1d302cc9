"""Nodes: services, batches and resumers of the real package. Each life of a node has its own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from lianlian_async import (
    Merchant,
    RefundOutcomeUnknown,
    RefundSession,
    RetryPolicy,
    refund_many,
)
from lianlian_async.background import BackgroundTask
from lianlian_async.errors import BatchStopped, JournalError, LianLianError
from lianlian_async.merchant import Endpoints
from lianlian_async.models import Refund, RefundRequest

from .clocks import Machine
from .network import FromBelowError, NodeTransport
from .notifications import Service
from .plan import GRACE
from .world import NodeLoop

if TYPE_CHECKING:
    from .run import Run

ENDS_WITHIN = 120.0
"""Seconds (of its loop) within which a program must end after it was told to."""


@attrs.define(eq=False)
class Node:
    """One node and its lives."""

    run: Run
    index: int
    machine: Machine
    numbers: list[str]
    """The refunds that this node makes."""
    lives: int = 0
    loop: NodeLoop = attrs.field(init=False)
    is_running: bool = False
    is_done: bool = False
    """Whether the last life ended with nothing left to do."""
    stopped: float = 0.0
    """Seconds for which the process was stopped or suspended."""
    service: Service | None = None
    """The service that receives the node's notifications."""
    calls: dict[int, tuple[str, float]] = attrs.field(factory=dict)
    """The running calls: refund, and start of the call (by the loop's clock)."""
    _was_open: bool = False
    """Whether this life opened its session."""
    _main: asyncio.Task[None] = attrs.field(init=False)
    _tasks: list[asyncio.Task[None]] = attrs.field(factory=list)

    # ── lives ────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Begin a life."""
        if self.is_running or self.is_done or self.run.world.is_over:
            return
        self.lives += 1
        self.is_running = True
        self.calls.clear()
        self._was_open = False
        self.service = None
        self.loop = NodeLoop(self.run.world, f"node {self.index}.{self.lives}")
        self.loop.on_interrupt = self.interrupt
        asyncio._set_running_loop(self.loop)  # the first task needs a running loop, as in asyncio.run
        self._main = self.loop.create_task(self._live(), name="main")
        self.run.world.leave_loop()
        self._main.add_done_callback(self._end)

    def stop(self, seconds: float) -> None:
        """Stop the process for ``seconds``; the clocks keep running."""
        self._suspend(seconds, self.lives, clock_stood_still=False)

    def suspend(self, seconds: float) -> None:
        """Suspend the machine for ``seconds``; the event loop's clock stops."""
        self._suspend(seconds, self.lives, clock_stood_still=True)

    def _suspend(self, seconds: float, life: int, *, clock_stood_still: bool) -> None:
        if not self.is_running or life != self.lives or self.loop.is_suspended:
            return
        loop, self.stopped = self.loop, self.stopped + seconds
        loop.suspend()
        self.run.world.after(seconds, lambda: loop.wake(clock_stood_still=clock_stood_still))

    def kill(self, seconds: float, life: int | None = None) -> None:
        """End the current life (only if it is ``life``) at once, and begin another one after ``seconds``."""
        if not self.is_running or life not in (None, self.lives):
            return
        self.run.world.log(f"{self.loop.name} is killed")
        self.run.ends += 1
        self.is_running = False
        for number, _ in self.calls.values():
            self.run.lost_call(number)
        self.loop.kill()
        self.run.world.after(seconds, self.start)

    def interrupt(self) -> None:
        """End the current life like SIGINT: cancel the main task."""
        if self.is_running:
            self.run.ends += 1
            self._main.cancel()

    def interrupt_all(self) -> None:
        """End the current life like a second SIGINT: cancel every task."""
        if self.is_running:
            for task in list(self.loop.tasks):
                task.cancel()

    def cancel_any(self) -> None:
        """Cancel one random task of this node."""
        if self.is_running and self.loop.tasks:
            dice, kinds = self.run.world.random, dict[str, list[asyncio.Task[None]]]()
            for each in self.loop.tasks:  # each kind of task has the same probability
                kinds.setdefault(_kind(each), []).append(each)
            task = dice.choice(dice.choice(list(kinds.values())))
            self.run.world.log(f"{self.loop.name}: {task.get_name()} is cancelled")
            task.cancel()

    def _end(self, main: asyncio.Task[None]) -> None:
        """End the loop after the main task, as ``asyncio.run`` does."""
        error = None if main.cancelled() else main.exception()
        expected = (LianLianError, FromBelowError, asyncio.CancelledError, BaseExceptionGroup)
        if error is not None and not isinstance(error, expected):
            self.run.oracle.violate(f"{self.loop.name} ended in {error!r}")
        for task in list(self.loop.tasks):
            if task is not main:
                task.cancel()
        self._wait_for_end(self.loop, self.loop.time() + ENDS_WITHIN, is_clean=error is None and not main.cancelled())

    def _wait_for_end(self, loop: NodeLoop, until: float, *, is_clean: bool) -> None:
        run = self.run
        if loop.is_dead:
            return
        if loop.is_suspended:
            until = loop.time() + ENDS_WITHIN  # its threads continue only after the suspension
        if (loop.tasks or loop.threads) and loop.time() < until:
            run.world.after(0.5, lambda: self._wait_for_end(loop, until, is_clean=is_clean))
            return
        if loop.tasks or loop.threads:
            left = ", ".join(task.get_name() for task in loop.tasks) or f"{loop.threads} threads"
            run.oracle.violate(f"{loop.name} does not end: {left}")
        self.is_running = False
        for number, _ in self.calls.values():
            run.lost_call(number)
        loop.kill()
        self.is_done = is_clean and not self.has_work()
        if self.is_done:
            run.check_over()
        else:
            run.ends += not is_clean and self._was_open
            run.world.after((60 if self._was_open else 900) * run.world.random.random(), self.start)

    async def _live(self) -> None:
        run, plan = self.run, self.run.plan
        loop = self.loop
        life = self.lives
        transport = NodeTransport(
            run.network,
            partial(run.check_record, loop=loop),
            stop=lambda seconds, stands_still: self._suspend(seconds, life, clock_stood_still=stands_still),
            kill=lambda seconds: self.kill(seconds, life),
        )
        async with AsyncExitStack() as stack:
            journal = run.store.journal(loop, self.machine.clock)
            if journal is not None:
                await stack.enter_async_context(journal)
            session = RefundSession(
                run.merchant,
                transport=transport,
                retry=RetryPolicy(not_found_grace=GRACE),
                deadline=plan.deadline,
                max_connections=plan.max_connections,
                journal=journal,
                query_first=plan.query_first,
                clock=self.machine.clock,
            )
            await stack.enter_async_context(session)
            self._was_open = True
            if plan.notifies:
                self.service = await stack.enter_async_context(Service(self, session))
            await self._work(session)
        flights, free = session._flights._flights, session._life._slots.value
        if transport.out or session._life._running or flights or free != plan.max_connections:
            run.oracle.violate(
                f"{loop.name}: {transport.out} requests, {session._life._running} calls, {flights}, {free} slots"
            )

    # ── what it does ─────────────────────────────────────────────────────────────────────────────

    def _open(self) -> list[str]:
        return [number for number in self.numbers if not self.run.is_known(number)]

    def has_work(self) -> bool:
        """Whether refunds are left to do."""
        return bool(self._open() or self.run.acting.unacted(self.numbers))

    async def _work(self, session: RefundSession) -> None:
        run, plan, loop = self.run, self.run.plan, self.loop
        tasks = []
        if plan.program in ("service", "both"):
            for number in self.numbers:
                if not run.is_known(number) or run.dice.random() < 0.1:
                    names = [f"caller {number}.{caller}" for caller in range(plan.callers)]
                    tasks += [loop.create_task(self._call(session, number), name=name) for name in names]
        # A batch cannot resolve the unknown refunds of an earlier life.
        left = [number for number in run.unknown if plan.program == "batch" and not self._is_remembered(number)]
        tasks += [loop.create_task(self._call(session, number), name=f"caller {number}") for number in left]
        if plan.program in ("batch", "both"):
            tasks.append(loop.create_task(self._batch(session), name="batch"))
        if session.journal is not None:
            tasks.append(loop.create_task(self._resume(session), name="resumer"))
        if self.service is not None:
            tasks.append(loop.create_task(self.service.sweep(), name="sweeper"))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, session: RefundSession, number: str) -> None:
        run, dice = self.run, self.run.dice
        request = run.requests[number]
        await asyncio.sleep(run.plan.spread * dice.random())
        while True:
            unknown = run.unknown.get(number)
            if not run.may_begin(number):
                return
            if unknown is not None and (run.plan.journal == "none" or dice.random() < 0.2):
                how = await self._told(request, lambda unknown=unknown: session.resolve(unknown))
            else:
                how = await self._told(request, lambda: session.apply_refund(request))
            if how != "open" or run.is_known(number):
                return
            await asyncio.sleep(self._pause(run.unknown.get(number)))

    async def _told(self, request: RefundRequest, call: Callable[[], Awaitable[Refund]]) -> str:
        """Make one call, and report its outcome to the oracle."""
        run, number = self.run, request.no_refund
        key, began, stopped = next(run.keys), self.loop.time(), self.stopped
        self.calls[key] = number, began
        error: BaseException | None = None
        refund = None
        try:
            refund = await call()
        except LianLianError as problem:
            error = problem
            self.reopen(problem)
        except BaseException:
            if not self.loop.is_dead:
                self.calls.pop(key, None)
                run.lost_call(number)
            raise
        del self.calls[key]
        seconds = self.loop.time() - began - (self.stopped - stopped)
        if seconds > run.longest_call:
            run.oracle.violate(f"{self.loop.name}: a call for {number} took {seconds:.0f} s")
        return run.told(request, refund, error, self.loop)

    async def _batch(self, session: RefundSession) -> None:
        run = self.run
        while numbers := [number for number in self._open() if run.may_begin(number) and self._is_remembered(number)]:
            wait = run.dice.random() < 0.3
            begun: dict[str, int] = {}
            ended = 0
            try:
                batch = refund_many(session, self._begin_each(numbers, begun), wait_unknown=wait)
                async with aclosing(batch) as outcomes:
                    async for outcome in outcomes:
                        ended += 1
                        self.calls.pop(begun[outcome.request.no_refund])
                        run.told(outcome.request, outcome.refund, outcome.error, self.loop)
                if ended != len(begun):
                    run.oracle.violate(
                        f"{self.loop.name}: a batch of {len(begun)} ended after {ended}, without an error"
                    )
            except (BatchStopped, JournalError) as error:
                run.world.log(f"{self.loop.name}: the batch stopped: {error!r}")
                self.reopen(error)
            finally:
                if not self.loop.is_dead:
                    for number, key in begun.items():
                        if self.calls.pop(key, None) is not None:
                            run.lost_call(number)
            await asyncio.sleep(self._pause(None))

    def _begin_each(self, numbers: list[str], begun: dict[str, int]) -> Iterator[RefundRequest]:
        """Yield the requests of ``numbers`` that may still be made, and register each as a running call.

        Without a journal, skip those of running calls: such a call may end before the batch begins its own.
        """
        for number in numbers:
            is_free = self.run.plan.journal != "none" or all(number != running for running, _ in self.calls.values())
            if is_free and self.run.may_begin(number) and self._is_remembered(number):
                begun[number] = next(self.run.keys)
                self.calls[begun[number]] = number, self.loop.time()
                yield self.run.requests[number]

    def _is_remembered(self, number: str) -> bool:
        """Whether an unknown refund may be applied for: with a journal, or by the session that left it unknown."""
        return self.run.plan.journal != "none" or self.run.left_unknown_in.get(number, self.loop) is self.loop

    async def _resume(self, session: RefundSession) -> None:
        run, dice = self.run, self.run.dice
        while self._open():
            await asyncio.sleep(dice.choice([5.0, 600.0, 2000.0]) * dice.random())
            try:
                await session.resume()
            except JournalError as error:
                run.world.log(f"{self.loop.name}: resume: {error}")
                self.reopen(error)

    def reopen(self, error: LianLianError) -> None:
        """End this life if its journal must be opened again, as ``error`` says; the next life does."""
        if isinstance(error, JournalError) and "open it again" in str(error):
            self._main.cancel()

    def _pause(self, unknown: RefundOutcomeUnknown | None) -> float:
        """Return the seconds until the next call: until ``ask_again_at``, or random."""
        dice = self.run.dice
        if unknown is not None and dice.random() < 0.8:
            wait = (unknown.ask_again_at - self.machine.clock().wall).total_seconds()
            return min(max(0.0, wait), 3600.0) + dice.random()
        return dice.choice([1.0, 300.0, 1200.0]) * dice.random()


def _kind(task: asyncio.Task[None]) -> str:
    """Return the name of the function that ``task`` runs, also inside a background task."""
    coroutine: Any = task.get_coro()
    background = None if coroutine.cr_frame is None else coroutine.cr_frame.f_locals.get("self")
    if not isinstance(background, BackgroundTask):
        return str(coroutine.__qualname__)
    return str(getattr(background._function, "__qualname__", "partial"))


def merchant(private_key: object, gateway_key: object) -> Merchant:
    """Return the merchant of all refunds."""
    return Merchant(
        oid_partner="201103171000000000",
        private_key=private_key,
        gateway_public_keys=[gateway_key],
        endpoints=Endpoints(apply="https://gateway.example/apply", query="https://gateway.example/query"),
        notify_url="https://shop.example/notify",
    )
