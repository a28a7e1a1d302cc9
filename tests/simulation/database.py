"""A model of PostgreSQL for the statements of ``postgres_rows`` only: rows, locks, one clock, failover.

It runs on any event loop, so the journal contract tests compare it with the real server. Transactions are READ
COMMITTED: each statement sees the rows committed before it began, and the transaction's own changes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import count, takewhile
from typing import Any, Final

import attrs
from psycopg import OperationalError
from psycopg.errors import LockNotAvailable

from lianlian_async.journal import postgres_rows as sql

from .clocks import EPOCH

Key = tuple[str, str, Any]
"""Schema, table and primary key of a row."""
Row = Mapping[str, Any]
Rows = Sequence[Row]
Answers = list[list[dict[str, Any]]]
"""The rows of each statement of a message."""

LOCK_TIMEOUT: Final = 0.1
"""Seconds, as in the statement ``WAIT_BRIEFLY``."""
_OPEN: Final = ("unresolved", "accepted", "final")
_MADE: Final = ("accepted", "final", "done")


@attrs.define(eq=False)
class Session:
    """The server's state of one connection."""

    incarnation: int
    number: int
    last_active: float
    idle_timeout: float = 3600.0
    """Seconds after which the server terminates the connection if its transaction is idle."""
    is_in_transaction: bool = False
    is_terminated: bool = False
    changes: dict[Key, Row] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Database:
    """The server, which all connections share. ``after(seconds, call)`` schedules a call."""

    time: Callable[[], float]
    after: Callable[[float, Callable[[], None]], object]
    dice: random.Random
    on_commit: Callable[[Row | None, Row], None] = lambda before, after: None
    """Called for each committed row of a refund, with the row before and after."""
    offset: float = 0.0
    """Seconds by which the database's clock is ahead of the true time."""
    drift: float = 0.0
    incarnation: int = 1
    """The number of starts of a database server so far."""
    started: datetime = EPOCH
    """``pg_postmaster_start_time()``."""
    trouble: str = ""
    """The fault that lasts until ``trouble_until``: ``refuses``, ``hangs`` or ``slow``."""
    trouble_until: float = -1.0
    flaky: float = 0.0
    """Probability that an answer and its connection are lost; also that the connection becomes half-open."""
    committed: dict[Key, Row] = attrs.field(factory=dict)
    commits: list[tuple[float, dict[Key, tuple[Row | None, Row]]]] = attrs.field(factory=list)
    """The time of each commit, and its rows before and after."""
    locks: dict[Key, Session] = attrs.field(factory=dict)
    _numbers: count[int] = attrs.field(factory=lambda: count(1))

    def clock(self) -> datetime:
        """Return the time of the database's clock."""
        return EPOCH + timedelta(seconds=self.time() * (1 + self.drift) + self.offset)

    def is_in(self, trouble: str) -> bool:
        """Whether the database has this fault now."""
        return self.trouble == trouble and self.time() < self.trouble_until

    def connect(self) -> Session:
        """Accept a new connection."""
        return Session(self.incarnation, next(self._numbers), self.time())

    # ── another incarnation ──────────────────────────────────────────────────────────────────────

    def restart(self) -> None:
        """Restart: all connections break, and open transactions are rolled back."""
        self.incarnation += 1
        self.started = self.clock()
        self.locks.clear()

    def fail_over(self, lag: float) -> list[tuple[Row, Row | None]]:
        """Fail over to a replica on another machine, which lacks the commits of the last ``lag`` seconds.

        Returns the lost rows of refunds, each with the row that remains. The tables themselves are never lost: a
        replica of a journal is set up after the journal.
        """
        lost = [one for one in self.commits if one[0] > self.time() - lag]
        del self.commits[len(self.commits) - len(lost) :]
        rows: list[tuple[Key, Row]] = []
        for _, changes in reversed(lost):
            for key, (before, after) in changes.items():
                if before is not None:
                    self.committed[key] = before
                elif key[1:] not in (("version", 0), ("eras", 1)):
                    self.committed.pop(key, None)
                rows += [(key, after)] if key[1] == "refunds" else []
        dice = self.dice
        self.offset, self.drift = (
            dice.choice([0.02, -0.5, 40.0, -900.0, 1000.0, 3600.0]),
            dice.choice([0.0, 1e-4, -1e-4]),
        )
        self.restart()
        self.started -= timedelta(seconds=86_400 * dice.random())  # the replica was already running
        return [(after, self.committed.get(key)) for key, after in rows]

    # ── transactions ─────────────────────────────────────────────────────────────────────────────

    def execute(
        self, session: Session, schema: str, statements: Sequence[tuple[str, Sequence[Any]]]
    ) -> Generator[None, None, Answers]:
        """Execute the statements of a message; each ``yield`` is a wait for another transaction's lock."""
        self.check(session)
        answers = []
        for statement, parameters in statements:
            rows = STATEMENTS[statement](self, session, schema, *parameters)
            if isinstance(rows, Generator):
                rows = yield from rows
            answers.append([dict(row) for row in rows])
        if not session.is_in_transaction:
            self.commit(session)
        return answers

    def check(self, session: Session) -> None:
        """Raise if the server has terminated this connection, for example because its transaction was idle."""
        now = self.time()
        has_locks = session.is_in_transaction and now - session.last_active > session.idle_timeout
        session.is_terminated |= has_locks or session.incarnation != self.incarnation
        if session.is_terminated:
            self.roll_back(session)
            raise OperationalError("server closed the connection unexpectedly")
        session.last_active = now

    def commit(self, session: Session) -> None:
        """Commit the session's changes."""
        changes = {key: (self.committed.get(key), row) for key, row in session.changes.items()}
        if changes:
            self.commits.append((self.time(), changes))
            self.committed |= session.changes
        self.roll_back(session)
        for key, (before, after) in changes.items():
            if key[1] == "refunds" and not key[0].endswith("_inbox"):
                self.on_commit(before, after)

    def roll_back(self, session: Session) -> None:
        """Roll back the session's transaction and free its locks."""
        session.changes = {}
        session.is_in_transaction = False
        for key in [key for key, holder in self.locks.items() if holder is session]:
            del self.locks[key]

    def _is_held(self, key: Key, session: Session) -> bool:
        """Whether another open transaction has this lock."""
        holder = self.locks.get(key)
        if holder is None or holder is session:
            return False
        if self.time() - holder.last_active > holder.idle_timeout:
            holder.is_terminated = True
            self.roll_back(holder)
            return False
        return True

    def _row(self, session: Session, key: Key) -> Row | None:
        return session.changes.get(key) or self.committed.get(key)

    def refunds(self, schema: str, *, states: Iterable[str] | None = None) -> list[Row]:
        """Return the committed rows, oldest first."""
        rows = [row for key, row in self.committed.items() if key[0] == schema and key[1] == "refunds"]
        return sorted((r for r in rows if states is None or r["state"] in states), key=lambda row: row["id"])

    # ── statements ───────────────────────────────────────────────────────────────────────────────

    def _lock_advisory(self, session: Session, _: str, name: str) -> Generator[None, None, Rows]:
        while self._is_held(("", "advisory", name), session):
            yield
        self.locks["", "advisory", name] = session
        return [{}]

    def _find_tables(self, session: Session, _: str, schema: str) -> Rows:
        found = "version" if (schema, "version", 0) in self.committed else None
        return [{"encoding": "UTF8", "nspname": schema, "tablename": found}]

    def _create(self, session: Session, schema: str) -> Rows:
        owner = {"oid_partner": None, "apply_url": None}
        session.changes[schema, "version", 0] = {"version": 8, "id": f"journal {schema}", **owner, "is_acting": False}
        return self._new_era(session, schema, 1)

    def _new_era(self, session: Session, schema: str, number: int) -> Rows:
        key = schema, "eras", number
        if key not in self.committed:
            session.changes[key] = {"began": self.clock(), "postmaster_start_time": self.started}
        return []

    def _read_version(self, session: Session, schema: str) -> Rows:
        return [self._row(session, (schema, "version", 0)) or {}]

    def _begin(self, session: Session, schema: str) -> Rows:
        session.is_in_transaction = True
        return []

    def _end(self, session: Session, schema: str) -> Rows:
        session.is_in_transaction = False
        return []

    def _undo(self, session: Session, schema: str) -> Rows:
        self.roll_back(session)
        return []

    def _read_clock(self, session: Session, schema: str, timeout: str, idle: str) -> Rows:
        session.idle_timeout = float(idle.removesuffix("ms")) / 1000
        eras = takewhile(lambda number: self._row(session, (schema, "eras", number)), count(1))
        number = max(eras)
        era = self._row(session, (schema, "eras", number)) or {}
        is_same = era["postmaster_start_time"] == self.started
        database, began = self.clock().isoformat(), era["began"].isoformat()
        return [{"database": database, "era": number, "began": began, "is_same_incarnation": is_same}]

    def _bind(self, session: Session, schema: str, oid_partner: str, apply_url: str) -> Rows:
        [version] = self._read_version(session, schema)
        if version["oid_partner"] is None:
            owner = {"oid_partner": oid_partner, "apply_url": apply_url}
            session.changes[schema, "version", 0] = {**version, **owner}
        return []

    def _lock_table(self, session: Session, schema: str) -> Generator[None, None, Rows]:
        shares = [key for key in self.locks if key[:2] == (schema, "share")]
        while any(self._is_held(key, session) for key in shares):
            yield
        self.locks[schema, "exclusive", 0] = session
        return []

    def _act(self, session: Session, schema: str) -> Rows:
        [version] = self._read_version(session, schema)
        session.changes[schema, "version", 0] = {**version, "is_acting": True}
        return []

    def _lock(self, session: Session, schema: str, numbers: Sequence[str]) -> Generator[None, None, Rows]:
        while self._is_held((schema, "exclusive", 0), session):
            yield
        self.locks[schema, "share", session.number] = session
        keys: list[Key] = [(schema, "refunds", number) for number in sorted(numbers)]
        rows = [(key, row) for key in keys if (row := self._row(session, key)) and not self._is_held(key, session)]
        self.locks |= {key: session for key, _ in rows}
        [version] = self._read_version(session, schema)
        first = {name: version[name] for name in ("version", "is_acting")}
        return [{**first, **row} for _, row in rows] or [{**first, "no_refund": None}]

    def _insert(self, session: Session, schema: str, rows: str) -> Generator[None, None, Rows]:
        began, inserted = self.time(), []
        for row in sorted(json.loads(rows), key=lambda row: str(row["no_refund"])):
            key = schema, "refunds", row["no_refund"]
            while self._row(session, key) is None and self._is_held(key, session):
                if self.time() - began > LOCK_TIMEOUT:
                    raise LockNotAvailable("canceling statement due to lock timeout")
                yield
            if self._row(session, key) is None:
                self.locks[key] = session
                session.changes[key] = {"id": next(self._numbers), **row}
                inserted.append(row)
        return inserted

    def _update(self, session: Session, schema: str, rows: str) -> Rows:
        for row in json.loads(rows):
            key = schema, "refunds", row["no_refund"]
            assert self.locks[key] is session
            session.changes[key] = {**(self._row(session, key) or {}), **row}
        return []

    def _find(self, session: Session, schema: str, numbers: Sequence[str]) -> Rows:
        keys: list[Key] = [(schema, "refunds", number) for number in sorted(set(numbers))]
        return [row for key in keys if (row := self._row(session, key))]

    def _page(self, schema: str, place: int, newest: int, limit: int, states: Iterable[str] | None = None) -> Rows:
        return [row for row in self.refunds(schema, states=states) if place < row["id"] <= newest][:limit]

    def _canaries(self, schema: str) -> Rows:
        return [row for row in self.refunds(schema, states=_MADE) if "evidence" not in row["record"]][::-1]

    def _count(self, session: Session, schema: str) -> Rows:
        states = [row["state"] for row in self.refunds(schema)]
        return [{"state": state, "count": states.count(state)} for state in sorted(set(states))]


STATEMENTS: Final[Mapping[str, Callable[..., Rows | Generator[None, None, Rows]]]] = {
    "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))": Database._lock_advisory,
    sql.FIND_TABLES: Database._find_tables,
    sql.CREATE_SCHEMA: lambda database, session, schema: [],
    sql.CREATE: Database._create,
    sql.READ_VERSION: Database._read_version,
    sql.FIND_UNSAFE: lambda database, session, schema: [],
    sql.BIND: Database._bind,
    sql.BEGIN_ACTING[0]: Database._lock_table,
    sql.BEGIN_ACTING[1]: Database._act,
    sql.BEGIN: Database._begin,
    sql.COMMIT: Database._end,
    sql.ROLLBACK: Database._undo,
    sql.READ_CLOCK: Database._read_clock,
    sql.NEW_ERA: Database._new_era,
    sql.WAIT_BRIEFLY: lambda database, session, schema: [{}],
    sql.FIND: Database._find,
    sql.LOCK: Database._lock,
    sql.INSERT: Database._insert,
    sql.UPDATE: Database._update,
    sql.PENDING: lambda database, session, schema, *page: database._page(schema, *page, states=_OPEN),
    sql.ENTRIES: lambda database, session, schema, *page: database._page(schema, *page),
    sql.CANARIES: lambda database, session, schema: database._canaries(schema),
    sql.LAST: lambda database, session, schema: [{"id": max([row["id"] for row in database.refunds(schema)] or [0])}],
    sql.COUNT: Database._count,
}
"""The implementation of each statement of the journal; an unknown statement is a ``KeyError``."""
