"""Read and write the SQLite file of a journal, with one transaction for each batch. All calls block.

No other process writes to the file, so leased entries are kept in memory and are not read from the file again.
"""

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, Final

from lianlian_async.clock import Moment

from . import sqlite_schema as sql
from .base import Ending, Entry, JournalError, Owner, State, upgrade_steps
from .files import FileLocked, file_lock, has_content, identity_of, may_be_same, sync_folders
from .operations import Begin, Operation, Result, measurable, perform

_RESTORE: Final = "if it is lost, move this file away and use `lianlian journal restore FILE`"
_COPY: Final = (
    "this is a backup or another copy of a journal, and later refunds may have been made; use the journal itself, or, "
    + _RESTORE
)
_LOST: Final = f"with it, the latest refunds, which may have been made; put it back, or, {_RESTORE}"
_ADVICE: Final = {
    sqlite3.SQLITE_BUSY: "another program has locked the file; end that program",
    sqlite3.SQLITE_CANTOPEN: "its folder must exist and be writable",
    sqlite3.SQLITE_CORRUPT: "restore a backup, keep the damaged file; refunds newer than the backup may have been made",
    sqlite3.SQLITE_FULL: "free some disk space; the journal then continues",
    sqlite3.SQLITE_IOERR: "check the disk",
    sqlite3.SQLITE_NOTADB: "the file is not a journal, and was not changed; name another file",
    sqlite3.SQLITE_READONLY: "the file and its folder must be writable",
}
_CANNOT_OPEN: Final = (errno.EACCES, errno.EISDIR, errno.ENOENT, errno.EROFS)
_ERRNO: Final = dict.fromkeys(_CANNOT_OPEN, sqlite3.SQLITE_CANTOPEN) | {errno.ENOSPC: sqlite3.SQLITE_FULL}


class _DamagedRowError(Exception):
    """The file is damaged."""


class JournalFile:
    """An open journal file, which only this process writes. Threads may share the object.

    The file ``…-owner`` is locked while the journal is open, and names this process (see :mod:`.files`). The
    journal itself is not locked, so other processes may read it. ``read_only`` opens it without the lock.
    ``restored_at``: mark the file, a backup, as restored at that moment.
    """

    def __init__(self, path: str, *, read_only: bool = False, restored_at: Moment | None = None) -> None:
        self._path = Path(os.path.realpath(path))
        owner_path, self._log_path = (Path(f"{self._path}-{suffix}") for suffix in ("owner", "wal"))
        self._lock, self._errors = Lock(), partial(_errors, self._path)
        self._leased: dict[str, tuple[int, Entry]] = {}
        """Leased entries by no_refund: (rowid, entry as stored)."""
        with self._errors(), ExitStack() as opened:
            if not read_only:
                opened.enter_context(file_lock(owner_path))
            check_file(self._path)
            has_log = has_content(self._log_path)
            if read_only:
                # Without "ro", the last connection would write the WAL of a killed process into the file and delete it.
                mode = "ro" if has_log else "rw"
                self._connection = opened.enter_context(closing(_connect(self._path, timeout=5.0, mode=mode)))
                identity = str(self._path.stat().st_ino)
                self._connection.execute("PRAGMA query_only = on")
                if self._upgrades():
                    raise JournalError(
                        f"journal {self._path}: an older release created it; `lianlian journal resume` upgrades it"
                    )
            else:
                identity = identity_of(self._path)
                self._connection = opened.enter_context(closing(_connect(self._path, timeout=5.0)))
                self._prepare()
                self._connection.executescript(sql.CHANGES)
                if restored_at is not None:
                    self._mark_restored(restored_at)
            self.last_rowid: int = self._value(sql.LAST_ROWID)  # the first read creates the WAL
            """The rowid of the newest entry."""
            paths = self._path, owner_path, self._log_path
            self._files = {path: path.stat() for path in paths if path.exists()}
            self.id, *owner, self._is_acting, recorded, restored, evidence = json.loads(self._value(sql.STATUS))
            self.owner = None if owner[0] is None else Owner(*owner)
            """The owner; None if the journal is not bound yet."""
            self.problem = self._problem(recorded or identity, identity, has_log=has_log)
            """Why this file must not be opened for writing, and what to do; empty if it may be."""
            if not read_only:
                if self.problem and restored_at is None:
                    raise JournalError(f"journal {self._path}: {self.problem}")
                self._inode = identity
                self._checkpoint()
            self._restored_at = restored and sql.moment_of(restored, evidence)
            self._opened = opened.pop_all()

    def _prepare(self) -> None:
        """Create the tables in an empty file; upgrade those of an older release in one transaction."""
        is_new = not self._value("SELECT count(*) FROM sqlite_master")
        upgrades = [] if is_new else self._upgrades()
        self._connection.execute("PRAGMA temp_store = memory")
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute("PRAGMA synchronous = full")
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")  # see _checkpoint
        self._connection.execute("PRAGMA journal_size_limit = 0")
        if is_new:
            self._connection.executescript(sql.SCHEMA)
        if upgrades:
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {';'.join(upgrades)}; PRAGMA user_version = {sql.SCHEMA_VERSION}; COMMIT"
            )

    def _upgrades(self) -> list[str]:
        if self._value("PRAGMA application_id") != sql.APPLICATION_ID:
            raise JournalError(f"journal {self._path}: this SQLite file is not a journal; name another file")
        return upgrade_steps(str(self._path), self._value("PRAGMA user_version"), sql.SCHEMA_VERSION, sql.UPGRADES)

    def _problem(self, recorded: str, identity: str, *, has_log: bool) -> str:
        if len({found.st_dev for found in self._files.values()}) > 1:  # as when a container mounts only one file
            return (
                f"{self._log_path} is in another file system, so the end of a container can lose refunds; "
                "mount the journal's folder, not only its file"
            )
        if not may_be_same(recorded.removesuffix(sql.IN_WAL), identity):
            return _COPY
        is_lost = recorded.endswith(sql.IN_WAL) and not has_log
        return f"{self._log_path} is missing or empty and, {_LOST}" if is_lost else ""

    def bind(self, owner: Owner) -> None:
        with self._lock, self._errors():
            if owner.confirm(self.owner, str(self._path)) != self.owner:
                self._connection.execute(sql.BIND, (owner.oid_partner, owner.apply_url))
                self.owner = owner

    def begin_acting(self) -> None:
        with self._lock, self._errors():
            if not self._is_acting:
                self._connection.execute(sql.BEGIN_ACTING)
                self._is_acting = True

    def close(self) -> None:
        """Close the file and release its lock."""
        with self._lock, self._errors():
            self._opened.close()

    def backup(self, target: Path) -> None:
        """Copy the journal, which other processes may have open; ``target`` appears when the copy is complete.

        The copy can be read, but only :func:`restore` makes it a journal again.
        """
        with self._lock, self._errors(), TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as folder:
            copy = Path(folder, target.name)
            with closing(_connect(copy, timeout=0.0)) as connection:
                self._connection.backup(connection)
                connection.execute(sql.SET_INODE, ["backup"])
            copy.replace(target)
            sync_folders(target.parent)

    def _mark_restored(self, now: Moment) -> None:
        """Record that this file is a restored backup, which lacks all later commits.

        From now on, every refund that it does not have is queried before it is sent. Each such refund, and every
        unresolved one, counts as sent at ``now``, because the lost commits may include later sends.
        """
        if (problem := self._value("PRAGMA quick_check")) != "ok":
            raise _DamagedRowError(problem)
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for statement in sql.MARK_RESTORED:
                self._connection.execute(statement, _restored(now))

    def _checkpoint(self) -> None:
        """Copy the commits that no reader blocks from the WAL to the file.

        If it copies all, the inode in the file then has the suffix ``IN_WAL``. The next commit, which only the WAL has,
        removes the suffix: if the WAL is lost, the next process notices it. The first checkpoint is made without the
        suffix: if it fails (disk full), and another program then writes the WAL into the file, the file is accepted.
        """
        self._value("PRAGMA wal_checkpoint(PASSIVE)")  # does not wait for readers
        self._connection.execute(sql.SET_INODE, [self._inode + sql.IN_WAL])
        self._value("PRAGMA wal_checkpoint(PASSIVE)")
        self._connection.execute(sql.SET_INODE, [self._inode])
        self._longest_log = self._log_path.stat().st_size + sql.CHECKPOINT_PAGES * 4096

    def write(self, operations: Sequence[Operation[Any]]) -> list[Result]:
        """Carry out all ``operations`` in one transaction. It is durable on return."""
        with self._lock, self._errors():
            self._check_in_place()  # if the lock file was removed, another process may have the journal open
            if self._log_path.stat().st_size > self._longest_log:
                self._checkpoint()
            known = self._known({operation.no_refund for operation in operations})
            before = {no_refund: entry for no_refund, (_, entry) in known.items()}
            self._allow_for_restore([each.apply for each in operations if isinstance(each.apply, Begin)])
            after = before.copy()
            results = perform(operations, after, is_acting=self._is_acting)
            changed = [entry for no_refund, entry in after.items() if entry is not before.get(no_refund)]
            self._save(changed, known)
            self._check_in_place()  # again, because it may have been replaced during the write
        return results

    def _allow_for_restore(self, begins: Sequence[Begin]) -> None:
        """Tell ``begins`` that the backup may lack entries; start the grace again if no clock can measure it."""
        if self._restored_at is not None and begins:
            now = begins[-1].now
            restored_at = measurable(self._restored_at, now).dated(now)
            if restored_at != self._restored_at:
                self._connection.execute(sql.SET_RESTORED_AT, _restored(restored_at))
                self._restored_at = restored_at
            for begin in begins:
                begin.allow_for_restore(restored_at)

    def _known(self, numbers: set[str]) -> dict[str, tuple[int, Entry]]:
        """Return (rowid, entry) by number; a number without an entry is left out."""
        known = {no_refund: self._leased[no_refund] for no_refund in numbers & self._leased.keys()}
        if unread := numbers - known.keys():
            found = self._read(sql.FIND, _json(list(unread)))
            known |= {entry.no_refund: (rowid, entry) for rowid, entry in found.items()}
        return known

    def page(self, after: int, until: int, limit: int, *, pending: bool) -> list[tuple[int, Entry]]:
        """Return up to ``limit`` pairs (rowid, entry), oldest first, with ``after`` < rowid <= ``until``."""
        with self._lock, self._errors():
            rows = sorted(self._read(sql.PENDING if pending else sql.ENTRIES, after, until, limit).items())
            if rows and rows[0][0] <= after:  # the next page would be the same one, without end
                raise _DamagedRowError("its rows are not in order")
            return rows

    def find_all(self, numbers: Sequence[str]) -> list[Entry]:
        """Return the entries of ``numbers``; a number without an entry is left out."""
        with self._lock, self._errors():
            return list(self._read(sql.FIND, _json(numbers)).values())

    def canaries(self) -> list[Entry]:
        with self._lock, self._errors():
            return [entry for _, entry in sorted(self._read(sql.CANARIES).items(), reverse=True)]

    def counts(self) -> dict[State, int]:
        with self._lock, self._errors():
            found = json.loads(self._value(sql.COUNT))
        # Most refunds are DONE, and not in the partial index: counting them by state would take seconds, so subtract.
        found[State.DONE] = found.pop("all") - sum(found.values())
        return {state: found.get(state, 0) for state in State}

    def _read(self, condition: str, *parameters: Any) -> dict[int, Entry]:
        """Return the entries that match ``condition``, by rowid."""
        rows = json.loads(self._value(sql.READ + condition, *parameters))
        try:
            return {row[0]: self._entry(row[1:]) for row in rows}
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise _DamagedRowError(f"a row cannot be read: {error}") from error

    def _entry(self, row: Sequence[Any]) -> Entry:
        no_refund, fields, sent_at, body, evidence, state, record, history = row
        _, leased = self._leased.get(no_refund, (0, None))
        return Entry(
            no_refund=no_refund,
            fields=fields,
            body=b"" if body is None else body.encode(),
            sent_at=None if sent_at is None else sql.moment_of(sent_at, evidence or {}),
            refused=None if evidence is None else evidence.get("refused"),
            ending=None if record is None else Ending(state=State(state), record=record),
            holder=None if leased is None else leased.holder,
            leased_until=None if leased is None else leased.leased_until,
            history=history,
        )

    def _save(self, changed: Sequence[Entry], known: Mapping[str, tuple[int, Entry]]) -> None:
        """Write ``changed`` in one transaction."""
        rows = list[tuple[Any, ...]]()
        for entry in changed:
            if entry.no_refund in known:
                rowid, _ = known[entry.no_refund]
            else:
                rowid = self.last_rowid = self.last_rowid + 1
            sent_at = evidence = None
            if entry.sent_at is not None:
                sent_at = sql.microseconds(entry.sent_at)
                evidence = _json(sql.evidence_of(entry.sent_at, entry.refused))
            record = None if entry.ending is None else _json(entry.ending.record)
            begun = entry.no_refund, _json(entry.fields), entry.state, sent_at, entry.body.decode()
            rows.append((rowid, *begun, evidence, record, entry.history))
        # Sorted by rowid: SQLite fills pages completely if rows are inserted in order.
        self._connection.execute(sql.CHANGE, [_json(sorted(rows))])
        for entry, (rowid, *_) in zip(changed, rows, strict=True):
            if entry.holder is None:
                self._leased.pop(entry.no_refund, None)
            else:
                self._leased[entry.no_refund] = rowid, entry

    def _value(self, statement: str, *parameters: Any) -> Any:
        row = self._connection.execute(statement, parameters).fetchone()
        if row is None:
            raise _DamagedRowError("a row is missing")
        return row[0]

    def _check_in_place(self) -> None:
        """Raise ``JournalError`` if a file was removed or replaced: SQLite would go on writing to the unlinked file."""
        for path, opened in self._files.items():
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), opened):
                    continue
            raise JournalError(
                f"journal {self._path}: {path} was removed or replaced while it was open; end this process, and put "
                "the file back if you can: refunds recorded in it may have been made"
            )


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileLocked as locked:
        raise JournalError(
            f"journal {path}: {locked} has it open; wait until that process has ended, or if it is this process, share "
            "its SqliteJournal. If several processes run one service, use a PostgresJournal"
        ) from locked
    except (sqlite3.Error, OSError, UnicodeError, _DamagedRowError) as error:
        is_damage = isinstance(error, UnicodeError | _DamagedRowError)
        code = _ERRNO.get(getattr(error, "errno", 0), sqlite3.SQLITE_CORRUPT if is_damage else sqlite3.SQLITE_IOERR)
        code = getattr(error, "sqlite_errorcode", code) & 0xFF  # the primary result code
        advice = _ADVICE.get(code, "nothing was recorded")
        raise JournalError(f"journal {path}: {error}; {advice}") from error


def check_file(path: Path) -> None:
    """Raise ``JournalError`` if only the WAL of a journal is left: SQLite would delete it for a new or empty file."""
    log = Path(f"{os.path.realpath(path)}-wal")
    if not has_content(path) and has_content(log):
        raise JournalError(
            f"journal {path}: the file is missing or empty, but {log} has its latest refunds; "
            "put the file back, or, if it is lost, move the -wal file away and use `lianlian journal restore FILE`"
        )


def restore(backup: Path, path: Path, now: Moment) -> None:
    """Create the journal file ``path`` from a ``backup``, marked as restored.

    Raises ``JournalError`` if ``path`` or its WAL exists, or if ``backup`` is damaged, has a WAL or is no journal.
    """
    path = Path(os.path.realpath(path))
    with (
        _errors(path),
        file_lock(Path(f"{path}-owner")),
        TemporaryDirectory(prefix="restored-", dir=path.parent) as folder,
    ):
        wal = Path(f"{path}-wal")  # SQLite would replay it into the restored file
        if path.exists() or wal.exists():
            raise JournalError(f"journal {path} exists: stop its process, and move {path} and {wal} away; keep both")
        if not backup.stat().st_size or Path(f"{backup}-wal").exists():
            raise JournalError(
                f"{backup} is empty, or lacks the commits in {backup}-wal; restore a file of `lianlian journal backup`"
            )
        copy = Path(shutil.copy(backup, folder))
        copy.chmod(copy.stat().st_mode | 0o200)  # a backup may be read-only
        JournalFile(str(copy), restored_at=now).close()
        copy.replace(path)
        sync_folders(path.parent)


def _connect(path: Path, timeout: float, mode: str = "rwc") -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)


_json: Final = json.JSONEncoder(default=dict, ensure_ascii=False, separators=(",", ":")).encode
"""JSON text; mappings of any kind become objects."""


def _restored(moment: Moment) -> dict[str, Any]:
    return {"now": sql.microseconds(moment), "evidence": _json(sql.evidence_of(moment, None))}
