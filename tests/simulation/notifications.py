"""Notifications: the gateway sends them, a node's endpoint receives them and calls its handler; all of it may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from lianlian_async import NotificationEndpoint
from lianlian_async.errors import JournalError
from lianlian_async.journal import State
from lianlian_async.models import Refund
from lianlian_async.session import RefundSession

from .network import FromBelowError
from .world import NodeLoop

if TYPE_CHECKING:
    from .gateway import Booked
    from .node import Node
    from .run import Run

RESEND: Final = 120.0
"""Seconds after which an unacknowledged notification is sent again."""
MOST_DELIVERIES: Final = 31
ANSWER_WITHIN: Final = 5.0
HANDLER_SECONDS: Final = 4.0
LONGEST_GAP: Final = 10.0
"""Maximum of virtual seconds between claiming a refund and calling its handler, except while the process is stopped."""


@attrs.define(eq=False)
class Delivery:
    """One notification in transit."""

    booked: Booked
    body: bytes
    is_forged: bool = False
    is_acknowledged: bool = False


@attrs.define(eq=False)
class Acting:
    """The gateway's side of notifications, and the checks that each final refund is handled correctly (*acted on*)."""

    run: Run
    returned_at: dict[str, float] = attrs.field(factory=dict)
    """The time at which a handler last returned for each refund."""
    running: dict[str, tuple[NodeLoop, float]] = attrs.field(factory=dict)
    """The running handlers: their loop, and the total stop time of its process when they began."""

    # ── the gateway's side ───────────────────────────────────────────────────────────────────────

    def meets(self, kind: str) -> bool:
        """Whether this fault occurs now."""
        run = self.run
        return kind in run.plan.notices and not run.gateway.is_calm and run.world.random.random() < 0.3

    def announce(self, booked: Booked) -> None:
        """Send notifications of ``booked`` when it is final: often before the apply call is answered."""
        if not self.run.plan.notifies or self.meets("never"):
            return
        dice = self.run.world.random
        seconds = 0.1 * dice.random() + (3 * 3600 * dice.random() ** 2 if self.meets("late") else 0.0)
        self.run.world.at(booked.final_at + seconds, lambda: self._deliver(booked, 1))

    def _deliver(self, booked: Booked, times: int) -> None:
        run, dice = self.run, self.run.world.random
        delivery = self._notification(booked, None)
        if self.meets("forged"):
            self._send(self._notification(booked, dice.choice(["no_signature", "bad_signature"])))
        if self.meets("twice"):
            copy = self._notification(booked, None)
            run.world.after(dice.choice([0.0, 1.0, 400.0]) * dice.random(), lambda: self._send(copy))
        if not self.meets("lost"):
            self._send(delivery)
        if times < MOST_DELIVERIES:
            run.world.after(RESEND, lambda: delivery.is_acknowledged or self._deliver(booked, times + 1))

    def _notification(self, booked: Booked, fault: str | None) -> Delivery:
        gateway = self.run.gateway
        fields = gateway.record(booked)
        if fault is None and self.meets("short"):  # the endpoint must query a missing field
            del fields[self.run.world.random.choice(["sta_refund", "money_refund"])]
        return Delivery(booked, gateway.signed(fields, fault)[2], is_forged=fault is not None)

    def _send(self, delivery: Delivery) -> None:
        node = self.run.world.random.choice(self.run.nodes)
        if node.is_running and node.service is not None:
            node.loop.call_soon(node.service.begin, delivery, self.run.world.now)

    # ── the invariants ───────────────────────────────────────────────────────────────────────────

    def answered(self, delivery: Delivery, status: int, sent_at: float) -> None:
        """Check the response to a notification."""
        run, number = self.run, delivery.booked.fields["no_refund"]
        run.world.log(f"notification of {number} is answered {status}")
        if status != 200:
            return
        if delivery.is_forged:
            run.oracle.violate(f"{number}: a forged notification was acknowledged")
        kept = run.store.kept(number)
        if kept is None or (not run.plan.inbox and kept is not State.DONE):
            self._violate_unless_lost(number, f"{number}: acknowledged; but its state in the inbox is {kept}")
        if run.world.now <= sent_at + ANSWER_WITHIN and not self.meets("answer_lost"):
            delivery.is_acknowledged = True

    def begins(self, refund: Refund, node: Node) -> None:
        """Check the call of a handler."""
        run, number = self.run, str(refund.no_refund)
        run.world.log(f"{node.loop.name}: the handler is told of {number}: {refund.sta_refund}")
        booked = [each for each in run.gateway.books.get(number, ()) if each.final_at <= run.world.now]
        told = str(refund.sta_refund), str(refund.money_refund)
        if told not in [(each.final, each.fields["money_refund"]) for each in booked]:
            run.oracle.violate(f"{number}: the handler was told {told}, which is not on the books")
        is_long_ago = self.returned_at.get(number, run.world.now) < run.world.now - LONGEST_GAP - node.stopped
        if is_long_ago and run.store.kept(number) is State.DONE:
            run.oracle.violate(f"{number}: the handler was called again after the journal recorded its return")
        loop, stopped = self.running.get(number, (node.loop, -1.0))
        other = next((each for each in run.nodes if each.is_running and each.loop is loop), None)
        if other is not None and other.stopped == stopped and run.plan.journal != "postgres":
            run.oracle.violate(f"{number}: two handlers run concurrently, on {loop.name} and {node.loop.name}")
        self.running[number] = node.loop, node.stopped

    def returns(self, number: str) -> None:
        """Note that a handler returned without an error."""
        self.returned_at[number] = self.run.world.now

    def ends(self, number: str, loop: NodeLoop) -> None:
        """Note that a handler ended, with or without an error."""
        if self.running.get(number, (None, 0.0))[0] is loop:
            del self.running[number]

    def unacted(self, numbers: Sequence[str]) -> list[str]:
        """Return those of ``numbers`` that were made and still need a handler's call."""
        return [number for number in numbers if self._is_due(number)] if self.run.plan.notifies else []

    def _is_due(self, number: str) -> bool:
        run = self.run
        if run.oracle.told.get(number) != "made" or len(run.gateway.books[number]) > 1:
            return False
        if number in run.oracle.lost_endings:
            return False
        entry, kept = run.store.entry(number), run.store.kept(number)
        return number not in self.returned_at or kept is not State.DONE or entry is None or entry.state is State.FINAL

    def _violate_unless_lost(self, number: str, what: str) -> None:
        if not any(event.kind == "failover" for event in self.run.plan.events):
            self.run.oracle.violate(what)


class Service:
    """The endpoint of one life of a node with its session and journal, and the web server in front of it."""

    def __init__(self, node: Node, session: RefundSession) -> None:
        self._node = node
        self._run = node.run
        self._life = node.lives
        self._loop = node.loop
        self._endpoint = NotificationEndpoint(
            self._run.merchant,
            self._on_refund,
            journal=session.journal,
            session=session,
            inbox=self._run.plan.inbox,
            handler_seconds=HANDLER_SECONDS,
            clock=node.machine.clock,
        )
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._is_open = False

    async def __aenter__(self) -> Service:
        await self._endpoint.__aenter__()
        self._is_open = True
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._is_open = False
        for task in self._tasks:
            task.cancel()
        try:
            if self._tasks:  # without tasks, gather creates an event loop when this coroutine of a dead node is closed
                await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            await self._endpoint.__aexit__(*error)

    def begin(self, delivery: Delivery, sent_at: float) -> None:
        """Accept a connection with a notification while the server runs."""
        if self._is_open:
            task = self._loop.create_task(self._serve(delivery, sent_at), name="notification")
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)

    async def _serve(self, delivery: Delivery, sent_at: float) -> None:
        try:
            ack = await self._endpoint.handle(delivery.body, {})
        except FromBelowError:
            return  # of the handler
        self._run.acting.answered(delivery, ack.status, sent_at)

    async def _on_refund(self, refund: Refund) -> None:
        acting, dice, number = self._run.acting, self._run.world.random, str(refund.no_refund)
        acting.begins(refund, self._node)
        try:
            if acting.meets("slow"):
                await asyncio.sleep(1.2 * HANDLER_SECONDS * dice.random())
            if acting.meets("hangs"):
                await asyncio.sleep(1e6)
            if acting.meets("raises"):
                raise RuntimeError("the handler fails")
            if acting.meets("cancelled_itself"):
                raise asyncio.CancelledError
            if acting.meets("base_exception"):
                self._run.world.after(60 * dice.random(), self._restart)  # the inbox must be opened again
                raise FromBelowError
            if acting.meets("killed"):
                self._run.world.after(0.01 * dice.random(), lambda: self._node.kill(60.0, self._life))
                await asyncio.sleep(0.02 * dice.random() * dice.choice([0, 1]))
            if acting.meets("disk"):
                self._run.store.trouble(2.0)
            acting.returns(number)
        finally:
            acting.ends(number, self._loop)

    def _restart(self) -> None:
        if self._node.lives == self._life:
            self._node.interrupt()

    async def sweep(self) -> None:
        """Sweep at random intervals while work is left."""
        dice = self._run.dice
        while self._node.has_work():
            await asyncio.sleep(dice.choice([5.0, 900.0, 2000.0]) * dice.random())
            try:
                await self._endpoint.sweep()
            except FromBelowError:
                continue  # of the handler
            except JournalError as error:
                self._node.reopen(error)
            except RuntimeError as error:
                if "open the NotificationEndpoint again" not in str(error):
                    raise
                self._restart()
