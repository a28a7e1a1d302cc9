"""One run: the world of a plan from the start until all requested refunds are known."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from decimal import Decimal
from itertools import count
from typing import Final
from unittest import mock

import attrs

from lianlian_async.errors import RefundOutcomeUnknown
from lianlian_async.journal import sqlite
from lianlian_async.merchant import Merchant
from lianlian_async.models import Refund, RefundRequest

from .clocks import EPOCH, Machine
from .connections import modelled
from .gateway import Gateway
from .journals import DiskStore, MemoryStore, NoStore, PostgresStore, Store
from .keys import signing_key
from .network import Network
from .node import Node, merchant
from .notifications import Acting
from .oracle import Oracle
from .plan import Event, Plan
from .threads import simulated
from .world import NodeLoop, World

SETTLED_WITHIN: Final = 2 * 86_400.0
"""Seconds after the last fault within which all refunds must be known."""

MOST_STEPS: Final = 60_000
"""Average number of steps for each refund; a run that needs more is in an endless loop."""


@attrs.frozen
class Result:
    """The result of a run."""

    plan: Plan
    violations: list[str]
    ends: int
    steps: int
    seconds: float
    """Virtual ones."""
    told: Counter[str]


class Run:
    """The state of one run, which connects its parts."""

    def __init__(self, plan: Plan, trace: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.world = world = World(plan.seed, window=plan.window, trace=trace)
        world.slow_threads, world.cancelled_threads = plan.slow_threads, plan.cancelled_threads
        world.interleaved_threads = plan.interleaved_threads
        self.dice = random.Random(f"programs {plan.seed}")
        self.oracle = Oracle(self._stop, world.log, lambda: world.now, is_blind=plan.blind)
        gateway_key = signing_key("gateway", real=plan.real_rsa)
        self.gateway = self.oracle.gateway = Gateway(world, plan, gateway_key, self.oracle)
        self.acting = Acting(self)
        self.gateway.announce = self.acting.announce
        self.network = Network(world, plan, self.gateway, self.oracle)
        self.merchant: Merchant = merchant(signing_key("merchant", real=plan.real_rsa), gateway_key.public_key())
        self.requests = {f"R{number}": _request(f"R{number}") for number in range(plan.refunds)}
        self.unknown: dict[str, RefundOutcomeUnknown] = {}
        """The last error of each refund that is unknown."""
        self.left_unknown_in: dict[str, NodeLoop] = {}
        """The event loop (the life of a node) whose session left each refund unknown."""
        self.forgiven: set[str] = set()
        """Refunds known only to a session that ended: nobody may request them again."""
        self.keys = count()
        self.ends = 0
        self.longest_call = 600.0 + plan.deadline * (2 + 2 * plan.refunds * plan.callers / plan.max_connections)
        self.store: Store = {
            "none": NoStore,
            "memory": lambda: MemoryStore(self.oracle),
            "sqlite": lambda: DiskStore(world, self.oracle, inbox=DiskStore(world, self.oracle)),
            "postgres": lambda: PostgresStore(world, self.oracle, plan.trouble * 0.02),
        }[plan.journal]()
        dice = self.dice
        machines = [self._machine(f"machine {number}") for number in range(plan.machines)]
        self.nodes = [Node(self, i, machines[i % plan.machines], self._share(i)) for i in range(plan.nodes)]
        self.gateway.refused = {number for number in self.requests if dice.random() < plan.rejects}
        for number in [number for number in self.requests if dice.random() < plan.reused]:
            if number not in self.gateway.refused:
                other = {**self.requests[number].to_dict(), "dt_refund": "20251201000000"}
                self.gateway.make({**other, "oid_partner": self.merchant.oid_partner}, 0.0)
                self.oracle.foreign.add(number)

    def _share(self, index: int) -> list[str]:
        if self.plan.journal == "sqlite":  # one process at a time: the process with the file does all the work
            return list(self.requests)
        nodes = self.plan.nodes
        return [n for place, n in enumerate(self.requests) if place % nodes == index or self.dice.random() < 0.3]

    def _machine(self, name: str) -> Machine:
        machine = Machine(self.world, name, self.dice.choice([0.0, 3.0, -4000.0]), self.dice.choice([0.0, 1e-4, -1e-4]))
        if self.plan.machines > 1:
            machine.booted_at = -1e6 * self.dice.random()
        return machine

    def _stop(self) -> None:
        self.world.is_over = True

    def carry_out(self) -> Result:
        """Run to the end, and return the result."""
        world, plan = self.world, self.plan
        with ExitStack() as stack:
            stack.enter_context(simulated(world))
            if isinstance(self.store, DiskStore):
                stack.enter_context(mock.patch.object(sqlite, "JournalFile", self.store.file_class()))
            if isinstance(self.store, PostgresStore):
                stack.enter_context(modelled(self.store.database))
            for node in self.nodes:
                world.after(5 * self.dice.random(), node.start)
            for event in plan.events:
                world.at(event.at, lambda event=event: self._happen(event))
            last = max(
                [plan.spread, *(event.at + abs(event.amount) for event in plan.events if "step" not in event.kind)]
            )
            world.at(last + 1800, self._calm)
            if plan.blind:
                world.at((last + 1800) * self.dice.random(), self._see)
            world.at(last + 1800 + SETTLED_WITHIN, self._too_late)
            how = world.run(MOST_STEPS * (plan.refunds + 10) * plan.callers)
            if how != "over":
                self.oracle.violate(f"the run ended in {how}; open: {self._open()}")
            if not self.oracle.violations:
                self.oracle.check_books(self.requests, forgiven=self.forgiven)
                if plan.journal != "none":
                    self.oracle.check_journal(self.store.entries())
            for problem in world.problems:
                self.oracle.violate(problem)
            for node in self.nodes:
                if node.lives:
                    node.loop.kill()
        told = Counter(self.oracle.told.values())
        return Result(plan, self.oracle.violations, self.ends, world.steps, world.now, told)

    # ── what happens ─────────────────────────────────────────────────────────────────────────────

    def _happen(self, event: Event) -> None:
        world, node, amount = self.world, self.nodes[event.node % len(self.nodes)], event.amount
        world.log(f"event: {event}")
        machine = node.machine
        match event.kind:
            case "kill":
                node.kill(amount)
            case "reboot":
                machine.boot()
                for each in self._nodes_on(machine):
                    each.kill(amount)
            case "interrupt":
                node.interrupt()
            case "interrupt_twice":
                node.interrupt()
                world.after(0.001 * world.random.random(), node.interrupt_all)
            case "cancel_task":
                node.cancel_any()
            case "suspend":
                for each in self._nodes_on(machine):
                    each.suspend(amount)
            case "stop":
                node.stop(amount)
            case "wall_step":
                machine.offset += amount
            case "wall_slew":
                machine.slew(5e-4 if amount > 0 else -5e-4)
                world.after(abs(amount), lambda: machine.slew(0.0))
            case "outage":
                self.gateway.is_down = True
                world.after(amount, lambda: setattr(self.gateway, "is_down", False))
            case "disk":
                self.store.trouble(amount)
            case _ if isinstance(self.store, PostgresStore):
                self.store.happen(event)

    def _nodes_on(self, machine: Machine) -> list[Node]:
        return [node for node in self.nodes if node.machine is machine]

    def _calm(self) -> None:
        self.world.log("all faults are over")
        self.gateway.is_calm = True
        self.gateway.is_down = False
        if isinstance(self.store, PostgresStore):
            self.store.database.flaky = 0.0
        self.world.slow_threads = min(self.world.slow_threads, 0.02)  # overload ends, too

    def _see(self) -> None:
        """Let the query service know all refunds from now on, in half of the runs with restarted nodes."""
        self.gateway.is_blind = False
        self.oracle.canary_since = min(self.oracle.canary_since, self.world.now)
        for node in self.nodes if self.world.random.random() < 0.5 else ():
            node.kill(1.0)

    def _too_late(self) -> None:
        self.oracle.violate(f"not known {SETTLED_WITHIN / 3600:.0f} h after the last fault: {self._open()}")

    def check_over(self) -> None:
        """End the run if no node has anything to do."""
        if all(node.is_done for node in self.nodes):
            self._stop()

    # ── what callers know ────────────────────────────────────────────────────────────────────────

    def _open(self) -> str:
        calls = [
            f"{node.loop.name}: {sorted({n for n, _ in node.calls.values()})}" for node in self.nodes if node.lives
        ]
        unacted = self.acting.unacted(list(self.requests))
        return f"{[n for n in self.requests if not self.is_known(n)]}, not acted on {unacted}, calls {calls}"

    def is_known(self, number: str) -> bool:
        """Whether nobody needs to request this refund again."""
        return number in self.oracle.told or number in self.forgiven

    def may_begin(self, number: str) -> bool:
        """Whether a caller may request a refund; without a journal not after its outcome was told or lost."""
        return self.plan.journal != "none" or not self.is_known(number)

    def lost_call(self, number: str) -> None:
        """Note a call that ended without an outcome. Without a journal the outcome is lost."""
        if self.plan.journal == "none" and number not in self.oracle.told:
            self.forgiven.add(number)

    def told(self, request: RefundRequest, refund: Refund | None, error: BaseException | None, loop: NodeLoop) -> str:
        """Note the outcome that a caller was told; see :meth:`Oracle.tell`."""
        if isinstance(error, RefundOutcomeUnknown):
            self.unknown[request.no_refund] = error
            self.left_unknown_in[request.no_refund] = loop
        else:
            self.unknown.pop(request.no_refund, None)
            self.left_unknown_in.pop(request.no_refund, None)
        return self.oracle.tell(request, refund, error)

    def check_record(self, body: bytes, loop: NodeLoop) -> None:
        """Check the journal when an apply call leaves a node."""
        number = json.loads(body)["no_refund"]
        if isinstance(self.store, PostgresStore):
            self.store.check_lease(number, loop)
        if self.plan.journal != "none" and number not in self.oracle.beyond_bounds:
            self.oracle.leaves(body, self.store.entry(number))


def _request(number: str) -> RefundRequest:
    return RefundRequest(
        no_refund=number,
        dt_refund=EPOCH,
        money_refund=Decimal("10.00"),
        no_order=f"O{number}",
        dt_order=EPOCH - timedelta(days=3),
    )
