"""The journals of a simulation: none, one in memory that outlives its nodes, SQLite simulated at its file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from lianlian_async.clock import Moment
from lianlian_async.journal import Entry, Journal, JournalError, MemoryJournal, Owner, SqliteJournal, State
from lianlian_async.journal.operations import Operation, Result, perform

from .oracle import Oracle
from .world import NodeLoop, World


class Store(Protocol):
    """Where the journals of all nodes keep what is committed."""

    def journal(self, loop: NodeLoop) -> Journal | None:
        """A journal for one life of a node; None: it has none."""

    def entry(self, no_refund: str) -> Entry | None:
        """What is on record, durably."""

    def entries(self) -> Mapping[str, Entry]:
        """All that is on record."""

    def trouble(self, seconds: float) -> None:
        """Have it fail, or be slow, for so long."""


class NoStore:
    """For sessions without a journal."""

    def journal(self, loop: NodeLoop) -> None:
        return None

    def entry(self, no_refund: str) -> None:
        return None

    def entries(self) -> Mapping[str, Entry]:
        return {}

    def trouble(self, seconds: float) -> None: ...


class _NodesMemoryJournal(MemoryJournal):
    """One node's hand on the memory that all nodes share; a dead node's hand is off."""

    def __init__(self, store: MemoryStore, loop: NodeLoop) -> None:
        super().__init__()
        self._entries = store.memory
        self._store, self._loop = store, loop

    def _do(self, operation: Operation[Any]) -> Any:
        if self._loop.is_dead:
            raise JournalError("this node is dead")
        before = self._entries.get(operation.no_refund)
        answer = super()._do(operation)
        after = self._entries.get(operation.no_refund)
        if after is not None and after is not before:
            self._store.oracle.recorded(before, after)
        return answer


@attrs.define(eq=False)
class MemoryStore:
    """A dictionary that outlives every node."""

    oracle: Oracle
    memory: dict[str, Entry] = attrs.field(factory=dict)

    def journal(self, loop: NodeLoop) -> MemoryJournal:
        return _NodesMemoryJournal(self, loop)

    def entry(self, no_refund: str) -> Entry | None:
        return self.memory.get(no_refund)

    def entries(self) -> Mapping[str, Entry]:
        return self.memory

    def trouble(self, seconds: float) -> None: ...


@attrs.define(eq=False)
class DiskStore:
    """A disk with one journal file: it may fail, be full or slow, but loses nothing that was committed."""

    world: World
    oracle: Oracle
    committed: dict[str, Entry] = attrs.field(factory=dict)
    owner: Owner | None = None
    locked_by: NodeLoop | None = None
    trouble_until: float = -1.0
    trouble_kind: str = ""

    def journal(self, loop: NodeLoop) -> SqliteJournal:
        return SqliteJournal("/simulated/journal")

    def entry(self, no_refund: str) -> Entry | None:
        return self.committed.get(no_refund)

    def entries(self) -> Mapping[str, Entry]:
        return self.committed

    def trouble(self, seconds: float) -> None:
        self.trouble_until = self.world.now + seconds
        self.trouble_kind = self.world.random.choice(["fails", "full", "slow", "fails_after"])

    def file_class(self) -> type[SimulatedFile]:
        """Return what takes the place of ``JournalFile``."""
        return type("JournalFile", (SimulatedFile,), {"_disk": self})

    def check(self, kind: str) -> None:
        """Raise if the disk is in this kind of trouble now."""
        if self.world.now < self.trouble_until and self.trouble_kind == kind:
            raise JournalError(f"the disk {kind}")


class SimulatedFile:
    """What ``JournalFile`` is, over a :class:`DiskStore`. The inbox has a file of its own, which is empty."""

    _disk: DiskStore

    def __init__(self, path: str, *, only_to_look: bool = False) -> None:
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

    def owner(self) -> tuple[str, Owner | None]:
        return "0" * 32, self._disk.owner

    def bind(self, owner: Owner) -> None:
        self._disk.check("fails")
        self._disk.owner = owner.confirm(self._disk.owner, "simulated")

    def close(self) -> None:
        if self._disk.locked_by is self._loop:
            self._disk.locked_by = None

    def is_new(self, no_refund: str) -> bool:
        return no_refund not in self._disk.committed

    def write(self, operations: Sequence[Operation[Any]]) -> list[Result]:
        disk = self._disk
        disk.check("fails")
        disk.check("full")
        slow = disk.world.now < disk.trouble_until and disk.trouble_kind == "slow"
        self._loop.slow_disk = 3.0 * disk.world.random.random() if slow else 0.0
        numbers = dict.fromkeys(operation.no_refund for operation in operations)
        before = {number: entry for number in numbers if (entry := self._stored(number)) is not None}
        after = dict(before)
        answers = perform(operations, after)
        for number, entry in after.items():
            if entry is before.get(number):
                continue
            self._disk.oracle.recorded(disk.committed.get(number), entry)
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
    def last_place(self) -> int:
        return len(self._places)

    def page(self, after: int, until: int, limit: int, *, pending: bool) -> list[tuple[int, Entry]]:
        self._disk.check("fails")
        numbered = [(place, self._stored(number)) for place, number in enumerate(self._places, 1)]
        wanted = [
            (place, entry)
            for place, entry in numbered
            if entry is not None
            and after < place <= until
            and (not pending or entry.state in (State.UNRESOLVED, State.ACCEPTED))
        ]
        return wanted[:limit]

    def latest_made(self) -> Entry | None:
        self._disk.check("fails")
        return next((entry for entry in reversed(self._disk.committed.values()) if entry.state.is_made), None)

    def counts(self) -> dict[State, int]:
        states = [entry.state for entry in self._disk.committed.values()]
        return {state: states.count(state) for state in State}


def _as_stored(entry: Entry) -> Entry:
    """What a file gives back: no lease, and of what is resolved only the wall clock's moment."""
    sent_at = entry.sent_at
    if sent_at is not None and entry.ending is not None:
        sent_at = Moment(sent_at.wall, 0.0, "")
    fields = json.loads(json.dumps(dict(entry.fields)))
    return attrs.evolve(entry, fields=fields, sent_at=sent_at, holder=None, leased_until=None)
