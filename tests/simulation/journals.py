"""The journals of a simulation: none, memory that outlives nodes, SQLite with a simulated file, modelled PostgreSQL."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

import attrs

from lianlian_async.clock import Clock, Moment
from lianlian_async.journal import Entry, Journal, JournalError, MemoryJournal, Owner, SqliteJournal, State
from lianlian_async.journal.operations import Begin, Operation, Result, perform
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.journal.postgres_rows import entry_of
from lianlian_async.wire import format_timestamp

from .database import Database, Row
from .oracle import Oracle
from .plan import Event
from .world import NodeLoop, World


class Store(Protocol):
    """The committed data of the journals of all nodes."""

    def journal(self, loop: NodeLoop, clock: Clock) -> Journal | None:
        """Return a journal for one life of a node, or None for a session without a journal."""

    def entry(self, no_refund: str) -> Entry | None:
        """Return the committed entry of a refund."""

    def entries(self) -> Mapping[str, Entry]:
        """Return all committed entries."""

    def kept(self, no_refund: str) -> State | None:
        """Return the committed state of a refund in the inbox."""

    def trouble(self, seconds: float) -> None:
        """Make the journal fail or be slow for ``seconds``."""


class NoStore:
    """The store of sessions without a journal."""

    def journal(self, loop: NodeLoop, clock: Clock) -> None:
        return None

    def entry(self, no_refund: str) -> None:
        return None

    def entries(self) -> Mapping[str, Entry]:
        return {}

    def kept(self, no_refund: str) -> None:
        return None

    def trouble(self, seconds: float) -> None: ...


class _NodesMemoryJournal(MemoryJournal):
    """One node's access to the memory that all nodes share; it ends with the node."""

    def __init__(self, store: MemoryStore, loop: NodeLoop, *, is_inbox: bool = False) -> None:
        super().__init__()
        self._entries = store.inbox if is_inbox else store.memory
        self._canaries = deque() if is_inbox else store.canaries
        self._store, self._loop, self._is_inbox = store, loop, is_inbox

    @cached_property
    def _inbox(self) -> MemoryJournal:
        return _NodesMemoryJournal(self._store, self._loop, is_inbox=True)

    async def record(self, operation: Operation[Any]) -> Any:
        if self._loop.is_dead:
            raise JournalError("this node is dead")
        before = self._entries.get(operation.no_refund)
        answer = await super().record(operation)
        after = self._entries.get(operation.no_refund)
        if after is not None and after is not before and not self._is_inbox:
            self._store.oracle.recorded(before, after)
        return answer


@attrs.define(eq=False)
class MemoryStore:
    """A dictionary that outlives every node."""

    oracle: Oracle
    memory: dict[str, Entry] = attrs.field(factory=dict)
    canaries: deque[Entry] = attrs.field(factory=deque)
    inbox: dict[str, Entry] = attrs.field(factory=dict)

    def journal(self, loop: NodeLoop, clock: Clock) -> MemoryJournal:
        return _NodesMemoryJournal(self, loop)

    def entry(self, no_refund: str) -> Entry | None:
        return self.memory.get(no_refund)

    def entries(self) -> Mapping[str, Entry]:
        return self.memory

    def kept(self, no_refund: str) -> State | None:
        return _state(self.inbox.get(no_refund))

    def trouble(self, seconds: float) -> None: ...


@attrs.define(eq=False)
class DiskStore:
    """A disk with one journal file: it may fail, be full or slow, but it never loses a commit."""

    world: World
    oracle: Oracle
    committed: dict[str, Entry] = attrs.field(factory=dict)
    owner: Owner | None = None
    locked_by: NodeLoop | None = None
    trouble_until: float = -1.0
    trouble_kind: str = ""
    is_acting: bool = False
    inbox: DiskStore | None = None
    """The store of the inbox's file; None in that store itself."""

    def journal(self, loop: NodeLoop, clock: Clock) -> SqliteJournal:
        return SqliteJournal("/simulated/journal")

    def entry(self, no_refund: str) -> Entry | None:
        return self.committed.get(no_refund)

    def entries(self) -> Mapping[str, Entry]:
        return self.committed

    def kept(self, no_refund: str) -> State | None:
        return None if self.inbox is None else _state(self.inbox.entry(no_refund))

    def trouble(self, seconds: float) -> None:
        self.trouble_until = self.world.now + seconds
        self.trouble_kind = self.world.random.choice(["fails", "full", "slow", "fails_after"])
        if self.inbox is not None:
            self.inbox.trouble_until, self.inbox.trouble_kind = self.trouble_until, self.trouble_kind

    def file_class(self) -> type[SimulatedFile]:
        """Return the replacement of ``JournalFile``."""
        return type("JournalFile", (SimulatedFile,), {"_disk": self})

    def check(self, kind: str) -> None:
        """Raise if the disk has this fault now."""
        if self.world.now < self.trouble_until and self.trouble_kind == kind:
            raise JournalError(f"the disk {kind}")


class SimulatedFile:
    """The replacement of ``JournalFile`` for a :class:`DiskStore`. The inbox has a file of its own."""

    _disk: DiskStore
    id = "0" * 32

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        if path.endswith("-inbox"):
            assert self._disk.inbox is not None
            self._disk = self._disk.inbox
        disk = self._disk
        loop = disk.world.thread_of
        assert loop is not None
        self._loop = loop
        disk.check("fails")
        if disk.locked_by is not None and not disk.locked_by.is_dead:
            raise JournalError(f"journal {path}: another process is at work with it")
        disk.locked_by = loop
        self._held: dict[str, Entry] = {}
        self._places = list(disk.committed)

    @property
    def owner(self) -> Owner | None:
        return self._disk.owner

    def bind(self, owner: Owner) -> None:
        self._disk.check("fails")
        self._disk.owner = owner.confirm(self._disk.owner, "simulated")

    def begin_acting(self) -> None:
        self._disk.check("fails")
        self._disk.is_acting = True

    def close(self) -> None:
        if self._disk.locked_by is self._loop:
            self._disk.locked_by = None

    def write(self, operations: Sequence[Operation[Any]]) -> list[Result]:
        disk = self._disk
        disk.check("fails")
        disk.check("full")
        slow = disk.world.now < disk.trouble_until and disk.trouble_kind == "slow"
        self._loop.slow_disk = 3.0 * disk.world.random.random() if slow else 0.0
        numbers = dict.fromkeys(operation.no_refund for operation in operations)
        before = {number: entry for number in numbers if (entry := self._stored(number)) is not None}
        after = dict(before)
        answers = perform(operations, after, is_acting=disk.is_acting)
        for number, entry in after.items():
            if entry is before.get(number):
                continue
            if disk.inbox is not None:
                disk.oracle.recorded(before.get(number), entry)
            disk.committed[number] = _as_stored(entry)
            if entry.holder is None:
                self._held.pop(number, None)
            else:
                self._held[number] = entry
        self._places = list(disk.committed)
        disk.check("fails_after")
        return answers

    def _stored(self, number: str) -> Entry | None:
        return self._held.get(number) or self._disk.committed.get(number)

    @property
    def last_rowid(self) -> int:
        return len(self._places)

    def page(self, after: int, until: int, limit: int, *, pending: bool) -> list[tuple[int, Entry]]:
        self._disk.check("fails")
        numbered = [(place, self._stored(number)) for place, number in enumerate(self._places, 1)]
        wanted = [
            (place, entry)
            for place, entry in numbered
            if entry is not None
            and after < place <= until
            and (not pending or entry.state in (State.UNRESOLVED, State.ACCEPTED, State.FINAL))
        ]
        return wanted[:limit]

    def canaries(self) -> list[Entry]:
        self._disk.check("fails")
        return [entry for entry in reversed(self._disk.committed.values()) if entry.state.is_made]

    def counts(self) -> dict[State, int]:
        states = [entry.state for entry in self._disk.committed.values()]
        return {state: states.count(state) for state in State}


def _state(entry: Entry | None) -> State | None:
    return None if entry is None else entry.state


def _as_stored(entry: Entry) -> Entry:
    """Return an entry as a file returns it: without a lease; if resolved, with only the wall time of ``sent_at``."""
    sent_at = entry.sent_at
    if sent_at is not None and entry.ending is not None:
        sent_at = Moment(sent_at.wall, 0.0, "")
    fields = json.loads(json.dumps(dict(entry.fields)))
    return attrs.evolve(entry, fields=fields, sent_at=sent_at, holder=None, leased_until=None)


class _AsWritten:
    """Reads stored moments without conversion between clocks."""

    @staticmethod
    def moment(stored: Row | None) -> Moment | None:
        return stored and Moment(datetime.fromisoformat(stored["at"]), stored["boot"], stored["timeline"])


class _NodesPostgresJournal(PostgresJournal):
    """One node's journal; the holder of a lease names the node."""

    def __init__(self, dsn: str, loop: NodeLoop, clock: Clock) -> None:
        super().__init__(dsn, clock=clock)
        self._loop = loop

    async def record(self, operation: Operation[Any]) -> Any:
        if isinstance(begin := operation.apply, Begin):
            begin.holder = f"{self._loop.name}-{begin.holder}"
        return await super().record(operation)


@attrs.define(eq=False)
class PostgresStore:
    """The model of PostgreSQL, and the refunds and leases that its failovers have lost."""

    world: World
    oracle: Oracle
    flaky: float
    database: Database = attrs.field(init=False)
    last: dict[str, Entry] = attrs.field(factory=dict)
    """The entry of each refund at its last commit, even if a failover lost that commit."""
    taken_at: dict[str, float] = attrs.field(factory=dict)
    """The time at which each refund's lease was taken."""
    lease_ends: dict[tuple[str, str], float] = attrs.field(factory=dict)
    """The end of each lease by refund and holder."""
    lost_leases: set[tuple[str, str]] = attrs.field(factory=set)
    """The leases that a failover lost."""
    lost: dict[str, str] = attrs.field(factory=dict)
    """The ``dt_refund`` of each refund that a failover lost, or set back to one that was not sent."""

    def __attrs_post_init__(self) -> None:
        dice = random.Random(self.world.random.random())
        self.database = Database(lambda: self.world.now, self.world.after, dice, self._commit, flaky=self.flaky)

    def journal(self, loop: NodeLoop, clock: Clock) -> PostgresJournal:
        return _NodesPostgresJournal("postgresql://model/refunds", loop, clock)

    def entry(self, no_refund: str) -> Entry | None:
        return self.last.get(no_refund)

    def entries(self) -> Mapping[str, Entry]:
        refunds = self.database.refunds("lianlian")
        return {str(row["no_refund"]): _entry(row) for row in refunds}

    def kept(self, no_refund: str) -> State | None:
        rows = self.database.refunds("lianlian_inbox")
        return next((_entry(row).state for row in rows if row["no_refund"] == no_refund), None)

    def trouble(self, seconds: float) -> None:
        self.database.trouble_until = self.world.now + seconds
        self.database.trouble = self.world.random.choice(["refuses", "hangs", "slow"])

    def happen(self, event: Event) -> None:
        """Restart the database, fail it over, or set its clock.

        If its clock is behind the ``dt_refund`` of a lost refund, see the limits of PostgresJournal.
        """
        match event.kind:
            case "database_restart":
                self.database.restart()
            case "database_step":
                self.database.offset += event.amount
            case "failover":
                for row, left in self.database.fail_over(event.amount):
                    self._lose(_entry(row), left)
                if self.oracle.gateway.is_blind and not any(each.state.is_made for each in self.entries().values()):
                    self.oracle.canary_since = math.inf  # the failover lost every canary
        now = format_timestamp(self.database.clock())
        sent = {number for number, entry in self.entries().items() if entry.sent_at is not None}
        self.oracle.beyond_bounds.update(
            number for number, dt_refund in self.lost.items() if dt_refund >= now and number not in sent
        )

    def check_lease(self, no_refund: str, loop: NodeLoop) -> None:
        """Check that the node which sends an apply call has the refund's lease in the database."""
        now, holder, entry = self.world.now, loop.name, self.last.get(no_refund)
        if (no_refund, holder) in self.lost_leases and now <= self.lease_ends[no_refund, holder] + CLOCKS_DIFFER:
            self.oracle.beyond_bounds.add(no_refund)  # "under a lease that was lost", PostgresJournal
        elif entry is not None and _call(entry) != holder and now > self.taken_at[no_refund] + CLOCKS_DIFFER:
            self.oracle.violate(f"{no_refund} left {loop.name}, which no longer has its lease")

    def _commit(self, before: Row | None, after: Row) -> None:
        earlier, entry = before and _entry(before), _entry(after)
        self.oracle.recorded(earlier, entry)
        self.last[entry.no_refund] = entry
        if earlier is None or earlier.holder != entry.holder:
            self.taken_at[entry.no_refund] = self.world.now
            self.lost_leases.discard((entry.no_refund, _call(entry)))
        if after["leased_until"] is not None:
            self.lease_ends[entry.no_refund, _call(entry)] = self.world.now + after["leased_until"]["ahead"]

    def _lose(self, entry: Entry, left: Row | None) -> None:
        """Note that a failover lost ``entry``; ``left`` is the row that remains."""
        number = entry.no_refund
        if entry.ending is not None and (left is None or left["record"] is None):
            self.oracle.lost_endings.add(number)
        if entry.leased_until is None:
            return
        self.lost_leases.add((number, _call(entry)))
        if left is None or left["sent_at"] is None:
            self.lost[number] = entry.fields.get("dt_refund", "")
            if not self.oracle.gateway.books.get(number):
                self.oracle.beyond_bounds.add(number)  # its request is still on its way: see PostgresJournal


CLOCKS_DIFFER = 1.0
"""Seconds by which two leases may overlap because clocks drift; harmless, because the grace is longer."""


def _entry(row: Row) -> Entry:
    return entry_of(row, _AsWritten)  # type: ignore[arg-type]


def _call(entry: Entry) -> str:
    """Return the name of the node that has the lease; empty if there is no lease."""
    return (entry.holder or "").partition("-")[0]
