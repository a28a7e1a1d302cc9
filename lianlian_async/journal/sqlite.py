"""The embedded journal: one SQLite file, written by the tasks of one process; it needs no extra.

SQLite runs in a thread. Each batch of operations is one transaction, with one ``fsync`` except at checkpoints.
"""

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import anyio

from lianlian_async.background import run_in_thread
from lianlian_async.models import check_storable

from .base import Entry, JournalError, Owner, State
from .group_commit import GroupCommitJournal, Queued
from .sqlite_file import JournalFile

T = TypeVar("T")

_PAGE: Final = 500


class SqliteJournal(GroupCommitJournal):
    """A :class:`~lianlian_async.journal.Journal` in the SQLite file ``path``, which is created if it is missing.

    Only one ``SqliteJournal`` at a time may have it open; a second one, also in another process, gets a
    ``JournalError``. If a process ends or is killed, the next process finds leased refunds UNRESOLVED. A copy of the
    file is refused, because it may lack later refunds: its inode differs from the recorded one. A copy that was written
    over the journal's own file, or that has the same inode (for example, in a snapshot of Btrfs or ZFS), is not
    recognized.

    While the journal is open, and after a crash, the files ``…-wal`` and ``…-shm`` are part of it: in a container,
    mount its folder, not only its file. The file ``…-owner`` names the process that has opened the journal; never
    remove it: its lock ends with that process. ``…-inbox`` contains the final refunds for which
    ``NotificationEndpoint(inbox=True)`` will call, or has called, ``on_refund``. If several processes run one service,
    they need one :class:`~.postgres.PostgresJournal`: with a file for each process, no process knows the refunds of the
    others. Use a local disk: network file systems lack reliable locks. Where inode numbers change at a restart or mount
    (gVisor, FAT, some FUSE file systems), the journal is then refused: use a PostgresJournal.
    """

    _is_read_only = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.path.realpath(path))

    def pending(self) -> AsyncIterator[Entry]:
        return self._walk(pending=True)

    def entries(self) -> AsyncIterator[Entry]:
        return self._walk(pending=False)

    async def _walk(self, *, pending: bool) -> AsyncGenerator[Entry]:
        self._check_usable()
        last, until = 0, self._file.last_rowid
        while page := await self._in_thread(partial(self._file.page, last, until, _PAGE, pending=pending)):
            for last, entry in page:  # noqa: B007 - the next page starts after rowid ``last``
                yield entry
            self._check_usable()

    async def canaries(self) -> list[Entry]:
        self._check_usable()
        return await self._in_thread(self._file.canaries)

    async def counts(self) -> Mapping[State, int]:
        self._check_usable()
        return await self._in_thread(self._file.counts)

    async def begin_acting(self) -> None:
        self._check_usable()
        await self._in_thread(self._file.begin_acting)

    def _new_inbox(self) -> "SqliteJournal":
        return type(self)(f"{self._name}-inbox")

    async def _open(self) -> None:
        self._thread = anyio.CapacityLimiter(1)
        make = partial(JournalFile, self._name, read_only=self._is_read_only)
        self._file = await run_in_thread(make, limiter=self._thread, undo=JournalFile.close)
        self._id, self.owner = self._file.id, self._file.owner

    async def _close(self) -> None:
        await self._in_thread(self._file.close)

    async def _bind(self, owner: Owner) -> None:
        await self._in_thread(self._file.bind, owner)

    async def _write(self, batch: Sequence[Queued]) -> None:
        results = await self._in_thread(self._file.write, [queued.operation for queued in batch])
        for queued, result in zip(batch, results, strict=True):
            queued.result = result

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await run_in_thread(function, *arguments, limiter=self._thread)


class SqliteReader(SqliteJournal):
    """Reads the journal file ``path``, even while another process has it open. Writes raise ``JournalError``."""

    _is_read_only = True

    @property
    def problem(self) -> str:
        """Why ``SqliteJournal`` refuses this file (such as a copy), and what to do; else empty. It ignores locks."""
        return self._file.problem

    async def find(self, no_refund: str) -> Entry | None:
        check_storable(no_refund, "no_refund")
        return next(iter(await self.find_all([no_refund])), None)

    async def find_all(self, numbers: Sequence[str]) -> list[Entry]:
        """Return the entries of ``numbers``; a number without an entry is left out."""
        self._check_usable()
        return await self._in_thread(self._file.find_all, numbers)

    async def _write(self, batch: Sequence[Queued]) -> None:
        raise JournalError(f"journal {self._name} is open for reading only; use SqliteJournal to write")
