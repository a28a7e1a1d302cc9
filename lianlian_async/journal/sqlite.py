"""The embedded journal: one SQLite file, one process, many tasks; standard library only.

The event loop never touches SQLite: each batch of writes is one transaction, and one ``fsync``, in a thread.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import anyio

from lianlian_async.background import complete, run_in_thread

from .base import Entry, Owner, State
from .group_commit import GroupCommitJournal
from .operations import Operation, Result
from .sqlite_file import JournalFile

__all__ = ["SqliteJournal", "SqliteReader"]

T = TypeVar("T")

_PAGE: Final = 500


class _Looking:
    """What can be asked of an open file without writing to it."""

    _file: JournalFile
    _thread: anyio.CapacityLimiter

    def pending(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.pending`. Entries that begin later are left out."""
        return self._walk(pending=True)

    def entries(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.entries`."""
        return self._walk(pending=False)

    async def latest_made(self) -> Entry | None:
        """See :meth:`Journal.latest_made`."""
        self._check_open()
        return await self._in_thread(self._file.latest_made)

    async def counts(self) -> Mapping[State, int]:
        """See :meth:`Journal.counts`."""
        self._check_open()
        return await self._in_thread(self._file.counts)

    async def _walk(self, *, pending: bool) -> AsyncIterator[Entry]:
        self._check_open()
        last, until = 0, self._file.last_place
        while page := await self._in_thread(partial(self._file.page, last, until, _PAGE, pending=pending)):
            for last, entry in page:  # noqa: B007 - the next page begins there
                yield entry
            self._check_open()

    async def _open_file(self, path: str, *, only_to_look: bool = False) -> None:
        self._thread = anyio.CapacityLimiter(1)
        make = partial(JournalFile, path, only_to_look=only_to_look)
        self._file = await run_in_thread(make, limiter=self._thread, undo=JournalFile.close)

    async def _close(self) -> None:
        await self._in_thread(self._file.close)

    def _check_open(self) -> None:
        """Raise if it is not open."""

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await run_in_thread(function, *arguments, limiter=self._thread)


class SqliteReader(_Looking):
    """Looks into the journal ``path``, also while another process is at work with it; it changes nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.realpath(path)

    async def __aenter__(self) -> Self:
        await self._open_file(self._path, only_to_look=True)
        self.id, self.owner = await self._in_thread(self._file.owner)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await complete(self._close)

    async def find_all(self, numbers: Sequence[str]) -> list[Entry]:
        """The entries of those refunds that are on record."""
        return await self._in_thread(self._file.find_all, numbers)


class SqliteJournal(_Looking, GroupCommitJournal):
    """A :class:`~lianlian_async.journal.Journal` in the SQLite file ``path``, which is made if it is not there.

    It belongs to one process at a time; a second one that opens it is refused. When that process has ended, in
    whatever way, the next one finds what it left open as UNRESOLVED. Beside the file lie, while it is open,
    ``…-wal`` and ``…-shm`` (SQLite's own: they are part of it) and for ever ``…-owner``, which tells who has it open;
    its inbox, if it ever had one, is the file ``…-inbox``. Several processes of one service share a
    :class:`~.postgres.PostgresJournal`; several files do not know of each other's refunds. Keep it on a local disk:
    network file systems do not lock as it needs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.path.realpath(path))

    def _beside(self) -> SqliteJournal:
        return SqliteJournal(f"{self._name}-inbox")

    async def _open(self) -> None:
        await self._open_file(self._name)
        try:
            self._id, self._owner = await self._in_thread(self._file.owner)
        except BaseException:
            await complete(self._close)
            raise

    def _check_open(self) -> None:
        self._opened()

    async def _bind(self, owner: Owner) -> None:
        await self._in_thread(self._file.bind, owner)

    async def begin_acting(self) -> None:
        """See :meth:`Journal.begin_acting`."""
        self._opened()
        await self._in_thread(self._file.begin_acting)

    async def find(self, no_refund: str) -> Entry | None:
        """See :meth:`Journal.find`. Of most numbers that are not on record, that is known at once."""
        self._opened()
        return None if self._file.is_new(no_refund) else await super().find(no_refund)

    async def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[Result]:
        return await self._in_thread(self._file.write, operations)
