"""The SQLite file of a journal: its schema, its owner, and whole batches in single statements. It blocks.

Many rows go into one statement, and come out as one JSON text: ``sqlite3`` releases and re-acquires the GIL
for every row, and a busy event loop would make each of a thousand rows wait.

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
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any, Final

from . import sqlite_schema as sql
from .base import Ending, Entry, JournalError, Owner, State
from .bloom_filter import BloomFilter
from .file_lock import FileLock, FileLocked
from .operations import Operation, Result, perform

__all__ = ["JournalFile"]

_ROWS: Final = 64
"""In one statement. There is one for each number of rows up to that: SQLite keeps them compiled."""
_SLICE: Final = 1000
"""How many numbers are learned at a time: more would keep the event loop waiting for the interpreter."""

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
                self._connection.executescript(sql.CHANGES)
                self._files = {path: path.stat() for path in (self._path, owner_path, log_path)}
            self._last_place: int = self._value(sql.LAST_PLACE)
            self._to_learn = self._last_place
            if not only_to_look:
                self._learn()
                self._is_acting = bool(self._value(sql.IS_ACTING))
            self._opened = opened.pop_all()

    def _prepare(self) -> None:
        """Make sure that it is a journal of ours, or make it one."""
        is_new = not self._value("SELECT count(*) FROM sqlite_master")
        if not is_new:
            self._check_kind()
        self._connection.execute("PRAGMA temp_store = memory")
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute("PRAGMA synchronous = full")
        self._connection.execute(f"PRAGMA wal_autocheckpoint = {sql.CHECKPOINT_PAGES}")
        if is_new:
            self._connection.executescript(sql.SCHEMA)

    def _check_kind(self) -> None:
        if self._value("PRAGMA application_id") != sql.APPLICATION_ID:
            raise JournalError(f"journal {self._path}: an SQLite file, but no journal; name another file")
        if (version := self._value("PRAGMA user_version")) != sql.SCHEMA_VERSION:
            raise JournalError(
                f"journal {self._path}: schema version {version}, but this release needs {sql.SCHEMA_VERSION}; "
                "complete it with the release that created it"
            )

    def owner(self) -> tuple[str, Owner | None]:
        """The journal's id, and whose refunds it holds; None: nobody's yet."""
        with self._errors():
            number, oid_partner, apply_url = json.loads(self._value(sql.OWNER))
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
            self._numbers.add(json.loads(self._value(sql.ENTRIES, self._learned, until, _SLICE)))
            self._learned = until

    @property
    def last_place(self) -> int:
        """Where the youngest entry stands."""
        return self._last_place

    def page(self, after: int, until: int, limit: int, *, pending: bool) -> list[tuple[int, Entry]]:
        """The oldest entries, all or those whose end is open, with their places: behind ``after``, to ``until``."""
        with self._turn, self._errors():
            numbers = self._value(sql.PENDING if pending else sql.ENTRIES, after, until, limit)
            return sorted(self._read(numbers).items())

    def find_all(self, numbers: Sequence[str]) -> list[Entry]:
        """The entries of those refunds that are on record."""
        with self._turn, self._errors():
            return list(self._read(_json(numbers)).values())

    def latest_made(self) -> Entry | None:
        """The youngest entry that is known as made."""
        with self._turn, self._errors():
            return next(iter(self._read(self._value(sql.LATEST_MADE)).values()), None)

    def counts(self) -> dict[State, int]:
        """How many entries stand in each state."""
        with self._turn, self._errors():
            found = json.loads(self._value(sql.COUNT))
        # All others are counted in the index, and most are done: going through those would take seconds.
        found[State.DONE] = found.pop("all") - sum(found.values())
        return {state: found.get(state, 0) for state in State}

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────

    def _read(self, numbers: str) -> dict[int, Entry]:
        """The entries of the refunds that a JSON array names, by their place in the file."""
        rows = json.loads(self._value(sql.READ, numbers))
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
            sent_at=None if sent_at is None else sql.moment_of(sent_at, evidence or {}),
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
            sent_at = None if entry.sent_at is None else sql.microseconds(entry.sent_at)
            record = None if entry.ending is None else _json(entry.ending.record)
            begun: tuple[str | None, ...] = (None, None, None, None)
            if earlier is None or entry.sent_at is not None is earlier.sent_at:
                begun = entry.no_refund, entry.digest, _json(entry.fields), entry.body.decode()
            if place is None:
                place = self._last_place = self._last_place + 1
                self._numbers.add((entry.no_refund,))
            places.append(place)
            evidence = None if entry.sent_at is None or record else _json(sql.evidence_of(entry.sent_at, entry.refused))
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
        """Insert all rows or none, in one statement, which releases the GIL only a few times."""
        if rows:
            self._connection.execute(sql.CHANGE + ", ".join([sql.ROW] * len(rows)), tuple(chain.from_iterable(rows)))

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


def _connect(path: Path, timeout: float, mode: str = "rwc") -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(
        uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=2 * _ROWS
    )


_json: Final = json.JSONEncoder(default=dict, ensure_ascii=False, separators=(",", ":")).encode
"""JSON text, of any mapping too."""
