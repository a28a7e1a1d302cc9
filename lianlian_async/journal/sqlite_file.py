"""The SQLite file of a journal: its schema, its owner, and whole batches in single statements. It blocks.

Many rows go into one statement, and come out as one JSON text: ``sqlite3`` gives up the interpreter and asks for it
back at every row that it steps over, and a busy event loop would let each of a thousand rows wait.

``refunds`` holds what is written once and hardly changes, a body lives in ``bodies`` only while its refund is
unresolved, how it ended is added to ``endings``. So rows never grow, and pages stay full. ``sent_at`` is in
microseconds since 1970 (UTC); beside the body, ``evidence`` holds the same moment on the other clocks, and the
refusal in which every attempt so far ended. ``journal`` has one row: the journal's id, whose refunds it holds, and
whether acting on final refunds has begun.

Nobody else writes to the file: what is leased is known without reading it again, and so is, of most new numbers,
that they are not on record.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Final

from lianlian_async.clock import Moment

from .base import Ending, Entry, JournalError, Owner, State
from .bloom_filter import BloomFilter
from .file_lock import FileLock, FileLocked
from .operations import Operation, Result, perform

__all__ = ["JournalFile"]

APPLICATION_ID: Final = 0x4C4C5246  # "LLRF"
SCHEMA_VERSION: Final = 4

CHECKPOINT_PAGES: Final = 4000
"""How long the log grows (16 MB) before it is worked into the file: bodies mostly come and go within that."""

_SCHEMA: Final = f"""
BEGIN IMMEDIATE;
CREATE TABLE refunds (
    id INTEGER PRIMARY KEY,
    no_refund TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    fields TEXT NOT NULL,
    state TEXT NOT NULL,
    sent_at INTEGER
);
CREATE TABLE bodies (id INTEGER PRIMARY KEY, body TEXT NOT NULL, evidence TEXT);
CREATE TABLE endings (id INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE INDEX not_done ON refunds (id, state) WHERE state <> 'done';
CREATE TABLE journal (id TEXT NOT NULL, oid_partner TEXT, apply_url TEXT, is_acting INTEGER NOT NULL);
INSERT INTO journal SELECT lower(hex(randomblob(16))), NULL, NULL, 0;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_READ: Final = """
SELECT json_group_array(
    json_array(id, no_refund, digest, json(fields), sent_at, body, json(evidence), state, json(record))
)
FROM refunds LEFT JOIN bodies USING (id) LEFT JOIN endings USING (id)
WHERE no_refund IN (SELECT value FROM json_each(?))"""
_PENDING: Final = """
SELECT json_group_array(no_refund) FROM (
    SELECT no_refund FROM refunds
    WHERE state IN ('unresolved', 'accepted', 'final') AND state <> 'done' AND id > ? AND id <= ? ORDER BY id LIMIT ?
)"""
_ENTRIES: Final = """
SELECT json_group_array(no_refund) FROM (
    SELECT no_refund FROM refunds WHERE id > ? AND id <= ? ORDER BY id LIMIT ?
)"""
_COUNT: Final = """
SELECT json_group_object(state, n) FROM (
    SELECT state, count(*) AS n FROM refunds WHERE state <> 'done' GROUP BY state
    UNION ALL SELECT 'all', count(*) FROM refunds
)"""
_LAST_PLACE: Final = "SELECT coalesce(max(id), 0) FROM refunds"
_LATEST_MADE: Final = """
SELECT json_group_array(no_refund) FROM (
    SELECT no_refund FROM refunds WHERE state IN ('accepted', 'final', 'done') ORDER BY id DESC LIMIT 1
)"""
_OWNER: Final = "SELECT json_array(id, oid_partner, apply_url) FROM journal"
_IS_ACTING: Final = "SELECT is_acting FROM journal"

# A row that is inserted into this view is a refund as it stands from now on: one statement does all that this takes.
# ``no_refund`` and what comes with it is there only if the refund begins, ``record`` only if it has ended.
_CHANGES: Final = """
CREATE TEMP VIEW changes AS SELECT * FROM refunds JOIN bodies USING (id) JOIN endings USING (id);
CREATE TEMP TRIGGER begun INSTEAD OF INSERT ON changes WHEN new.no_refund IS NOT NULL BEGIN
    INSERT INTO refunds (id, no_refund, digest, fields, state, sent_at)
    VALUES (new.id, new.no_refund, new.digest, new.fields, new.state, new.sent_at)
    ON CONFLICT (id) DO UPDATE
    SET digest = excluded.digest, fields = excluded.fields, state = excluded.state, sent_at = excluded.sent_at;
    INSERT OR REPLACE INTO bodies (id, body, evidence) SELECT new.id, new.body, new.evidence WHERE new.record IS NULL;
END;
CREATE TEMP TRIGGER moved INSTEAD OF INSERT ON changes WHEN new.no_refund IS NULL BEGIN
    UPDATE refunds SET state = new.state, sent_at = new.sent_at WHERE id = new.id;
    UPDATE bodies SET evidence = new.evidence WHERE id = new.id;
END;
CREATE TEMP TRIGGER ended INSTEAD OF INSERT ON changes WHEN new.record IS NOT NULL BEGIN
    INSERT OR REPLACE INTO endings (id, record) VALUES (new.id, new.record);
    DELETE FROM bodies WHERE id = new.id;
END;
"""
_CHANGE: Final = "INSERT INTO changes (id, state, sent_at, record, evidence, no_refund, digest, fields, body) VALUES "
_ROW: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"

_ROWS: Final = 64
"""In one statement. There is one for each number of rows up to that: SQLite keeps them compiled."""
_SLICE: Final = 1000
"""How many numbers are learned at a time: more would keep the event loop waiting for the interpreter."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

_ADVICE: Final = {
    sqlite3.SQLITE_BUSY: "another program has locked it; end that one",
    sqlite3.SQLITE_CANTOPEN: "its folder must exist, and must let files be created",
    sqlite3.SQLITE_CORRUPT: "keep the file, and restore it from a backup; refunds begun since then may have been made",
    sqlite3.SQLITE_FULL: "make room on the disk; the journal goes on once there is some",
    sqlite3.SQLITE_IOERR: "the disk does not do what it is asked to",
    sqlite3.SQLITE_NOTADB: "it is no journal, and was left as it is; name another file",
    sqlite3.SQLITE_READONLY: "the file and its folder must be writable",
}
_ERRNO: Final = {
    errno.EACCES: sqlite3.SQLITE_CANTOPEN,
    errno.ENOENT: sqlite3.SQLITE_CANTOPEN,
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EROFS: sqlite3.SQLITE_CANTOPEN,
}


class _DamagedRowError(Exception):
    """A row is not what was written."""


class JournalFile:
    """An open journal file, owned by this process. Threads may share it: they take turns.

    A file beside it, ``…-owner``, is locked as long as the journal is open (see :mod:`.file_lock`), and says by whom.
    The journal itself is not locked, so that others can read it meanwhile: who comes ``only_to_look`` locks nothing,
    makes nothing and writes nothing.
    """

    def __init__(self, path: str, *, only_to_look: bool = False) -> None:
        self._path = Path(path)
        owner_path, log_path = (Path(f"{self._path}-{suffix}") for suffix in ("owner", "wal"))
        self._turn = Lock()
        self._leased: dict[str, tuple[int, Entry]] = {}
        """Leased entries by no_refund: (rowid, entry as stored)."""
        self._numbers = BloomFilter()
        self._learned = 0
        """Up to which place ``_numbers`` knows what was on record at the opening."""
        with self._errors(), ExitStack() as opened:
            if only_to_look:
                self._connection = opened.enter_context(closing(_connect(self._path, timeout=5.0, mode="rw")))
                self._connection.execute("PRAGMA query_only = on")
                self._check_kind()
            else:
                opened.enter_context(closing(FileLock(owner_path)))
                self._connection = opened.enter_context(closing(_connect(self._path, timeout=5.0)))
                self._prepare()
                self._connection.executescript(_CHANGES)
                self._files = {path: path.stat() for path in (self._path, owner_path, log_path)}
            self._last_place: int = self._value(_LAST_PLACE)
            self._to_learn = self._last_place
            if not only_to_look:
                self._learn()
                self._is_acting = bool(self._value(_IS_ACTING))
            self._opened = opened.pop_all()

    def _prepare(self) -> None:
        """Make sure that it is a journal of ours, or make it one."""
        is_new = not self._value("SELECT count(*) FROM sqlite_master")
        if not is_new:
            self._check_kind()
        self._connection.execute("PRAGMA temp_store = memory")
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute("PRAGMA synchronous = full")
        self._connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        if is_new:
            self._connection.executescript(_SCHEMA)

    def _check_kind(self) -> None:
        if self._value("PRAGMA application_id") != APPLICATION_ID:
            raise JournalError(f"journal {self._path}: an SQLite file, but no journal; name another file")
        if (version := self._value("PRAGMA user_version")) != SCHEMA_VERSION:
            raise JournalError(
                f"journal {self._path}: of version {version}, and this is a library for version {SCHEMA_VERSION}; "
                "finish it with the lianlian-async that began it, or begin another file"
            )

    def owner(self) -> tuple[str, Owner | None]:
        """The journal's id, and whose refunds it holds; None: nobody's yet."""
        with self._errors():
            number, oid_partner, apply_url = json.loads(self._value(_OWNER))
        return number, None if oid_partner is None else Owner(oid_partner, apply_url)

    def bind(self, owner: Owner) -> None:
        """Write down whose refunds it holds; see :meth:`.base.Journal.bind`."""
        with self._turn, self._errors():
            if owner.confirm(self.owner()[1], str(self._path)) != self.owner()[1]:
                statement = "UPDATE journal SET oid_partner = ?, apply_url = ?"
                self._connection.execute(statement, (owner.oid_partner, owner.apply_url))

    def begin_acting(self) -> None:
        """See :meth:`.base.Journal.begin_acting`."""
        with self._turn, self._errors():
            if not self._is_acting:
                self._connection.execute("UPDATE journal SET is_acting = 1")
                self._is_acting = True

    def close(self) -> None:
        """Close it, and let others own it."""
        with self._turn, self._errors():
            self._opened.close()

    # ── what is asked ────────────────────────────────────────────────────────────────────────────

    def is_new(self, no_refund: str) -> bool:
        """Whether it is certainly not on record. Does not block."""
        return self._learned >= self._to_learn and not self._numbers.may_hold(no_refund)

    def write(self, operations: Sequence[Operation[Any]]) -> list[Result]:
        """Do all in one transaction: when this returns, it is on the disk; when it raises, nothing of it counts."""
        with self._turn, self._errors():
            self._learn()
            known = self._known({operation.no_refund for operation in operations})
            before = {no_refund: entry for no_refund, (_, entry) in known.items()}
            after = before.copy()
            answers = perform(operations, after, is_acting=self._is_acting)
            changed = [entry for no_refund, entry in after.items() if entry is not before.get(no_refund)]
            places = self._save(changed, known)
            for place, entry in zip(places, changed, strict=True):
                if entry.holder is None:
                    self._leased.pop(entry.no_refund, None)
                else:
                    self._leased[entry.no_refund] = place, entry
            self._check_in_place()
        return answers

    def _known(self, numbers: Iterable[str]) -> dict[str, tuple[int, Entry]]:
        """Those of ``numbers`` that are on record, with their places."""
        known, unread = {}, []
        for no_refund in numbers:
            if leased := self._leased.get(no_refund):
                known[no_refund] = leased
            elif not self.is_new(no_refund):
                unread.append(no_refund)
        if unread:
            known |= {entry.no_refund: (place, entry) for place, entry in self._read(_json(unread)).items()}
        return known

    def _learn(self) -> None:
        """Some more of the numbers that were on record at the opening: all at once would delay the first answer."""
        if self._learned < self._to_learn:
            until = self._learned + _SLICE
            self._numbers.add(json.loads(self._value(_ENTRIES, self._learned, until, _SLICE)))
            self._learned = until

    @property
    def last_place(self) -> int:
        """Where the youngest entry stands."""
        return self._last_place

    def page(self, after: int, until: int, limit: int, *, pending: bool) -> list[tuple[int, Entry]]:
        """The oldest entries, all or those whose end is open, with their places: behind ``after``, to ``until``."""
        with self._turn, self._errors():
            numbers = self._value(_PENDING if pending else _ENTRIES, after, until, limit)
            return sorted(self._read(numbers).items())

    def find_all(self, numbers: Sequence[str]) -> list[Entry]:
        """The entries of those refunds that are on record."""
        with self._turn, self._errors():
            return list(self._read(_json(numbers)).values())

    def latest_made(self) -> Entry | None:
        """The youngest entry that is known as made."""
        with self._turn, self._errors():
            return next(iter(self._read(self._value(_LATEST_MADE)).values()), None)

    def counts(self) -> dict[State, int]:
        """How many entries stand in each state."""
        with self._turn, self._errors():
            found = json.loads(self._value(_COUNT))
        # All others are counted in the index, and most are done: going through those would take seconds.
        found[State.DONE] = found.pop("all") - sum(found.values())
        return {state: found.get(state, 0) for state in State}

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────

    def _read(self, numbers: str) -> dict[int, Entry]:
        """The entries of the refunds that a JSON array names, by their place in the file."""
        rows = json.loads(self._value(_READ, numbers))
        try:
            return {row[0]: self._entry(row[1:]) for row in rows}
        except (AttributeError, TypeError, ValueError) as error:
            raise _DamagedRowError(f"a row cannot be read: {error}") from error

    def _entry(self, row: Sequence[Any]) -> Entry:
        no_refund, digest, fields, sent_at, body, evidence, state, record = row
        leased = self._leased[no_refund][1] if no_refund in self._leased else None
        return Entry(
            no_refund=no_refund,
            digest=digest,
            fields=fields,
            body=b"" if body is None else body.encode(),
            sent_at=None if sent_at is None else _moment(sent_at, evidence or {}),
            refused=None if evidence is None else evidence.get("refused"),
            ending=None if record is None else Ending(state=State(state), record=record),
            holder=None if leased is None else leased.holder,
            leased_until=None if leased is None else leased.leased_until,
        )

    def _save(self, changed: Sequence[Entry], known: Mapping[str, tuple[int, Entry]]) -> list[int]:
        """Write ``changed`` down; their places."""
        places, rows = [], list[tuple[Any, ...]]()
        for entry in changed:
            place, earlier = known.get(entry.no_refund, (None, None))
            sent_at = None if entry.sent_at is None else (entry.sent_at.wall - _EPOCH) // _MICROSECOND
            record = None if entry.ending is None else _json(entry.ending.record)
            begun: tuple[str | None, ...] = (None, None, None, None)
            if earlier is None or entry.sent_at is not None is earlier.sent_at:
                begun = entry.no_refund, entry.digest, _json(entry.fields), entry.body.decode()
            if place is None:
                place = self._last_place = self._last_place + 1
                self._numbers.add((entry.no_refund,))
            places.append(place)
            evidence = None if entry.sent_at is None or record else _json(_evidence(entry.sent_at, entry.refused))
            rows.append((place, entry.state, sent_at, record, evidence, *begun))
        rows.sort()  # by their places: pages that are filled in order stay full
        if len(rows) <= _ROWS:
            self._insert(rows)
        else:
            with self._transaction():
                for first in range(0, len(rows), _ROWS):
                    self._insert(rows[first : first + _ROWS])
        return places

    def _insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """All of them or none, in one statement: it gives up the interpreter a few times, however many rows it has."""
        if rows:
            self._connection.execute(_CHANGE + ", ".join([_ROW] * len(rows)), tuple(chain.from_iterable(rows)))

    def _value(self, statement: str, *parameters: Any) -> Any:
        row = self._connection.execute(statement, parameters).fetchone()
        if row is None:
            raise _DamagedRowError("a row is missing")
        return row[0]

    # ── what can go wrong ────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise

    def _check_in_place(self) -> None:
        """SQLite goes on writing to a file that was removed; nobody would ever read it again."""
        for path, opened in self._files.items():
            try:
                is_there = os.path.samestat(path.stat(), opened)
            except FileNotFoundError:
                is_there = False
            if not is_there:
                raise JournalError(
                    f"journal {self._path}: {path} was removed or replaced while it was open; end this process, and "
                    "put the file back if you can: refunds that stood there may have been made"
                )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileLocked as locked:
            error = JournalError(
                f"journal {self._path}: {locked} holds it; wait until that process has ended. Several processes of one "
                "service share a PostgresJournal"
            )
            error.holder = str(locked)
            raise error from None
        except (sqlite3.Error, OSError, UnicodeError, _DamagedRowError) as error:
            is_damage = isinstance(error, UnicodeError | _DamagedRowError)
            code = _ERRNO.get(getattr(error, "errno", 0), sqlite3.SQLITE_CORRUPT if is_damage else sqlite3.SQLITE_IOERR)
            code = getattr(error, "sqlite_errorcode", code) & 0xFF  # without the extension
            advice = _ADVICE.get(code, "nothing of this was recorded")
            raise JournalError(f"journal {self._path}: {error}; {advice}") from error


def _evidence(sent_at: Moment, refused: Mapping[str, str] | None) -> dict[str, Any]:
    """What stands beside a body; see :func:`_moment`."""
    told: dict[str, Any] = {"boot": sent_at.boot, "timeline": sent_at.timeline}
    if sent_at.gateway is not None:
        told["gateway"] = sent_at.gateway.isoformat()
    if refused is not None:
        told["refused"] = refused
    return told


def _moment(sent_at: int, evidence: Mapping[str, Any]) -> Moment:
    """The moment ``sent_at`` on all clocks; of a refund that is resolved only the wall clock's is kept."""
    gateway = evidence.get("gateway")
    return Moment(
        _EPOCH + sent_at * _MICROSECOND,
        evidence.get("boot", 0.0),
        evidence.get("timeline", ""),
        None if gateway is None else datetime.fromisoformat(gateway),
    )


def _connect(path: Path, timeout: float, mode: str = "rwc") -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(
        uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=2 * _ROWS
    )


_json: Final = json.JSONEncoder(default=dict, ensure_ascii=False, separators=(",", ":")).encode
"""JSON text, of any mapping too."""
