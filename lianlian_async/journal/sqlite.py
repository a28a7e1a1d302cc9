"""The embedded journal: one SQLite file, one process, many tasks; standard library only.

The event loop never touches SQLite: each batch of writes is one transaction, and one ``fsync``, in a thread.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread

from .base import Entry, State
from .group import GroupedJournal
from .operations import Answer, Operation
from .sqlite_file import JournalFile

__all__ = ["SqliteJournal"]

T = TypeVar("T")

_PAGE: Final = 500


class SqliteJournal(GroupedJournal):
    """A :class:`~lianlian_async.journal.Journal` in the SQLite file ``path``, which is made if it is not there.

    It belongs to one process at a time; a second one that opens it is refused. When that process has ended, in
    whatever way, the next one finds what it left open as UNSETTLED. Beside the file lie, while it is open,
    ``…-wal`` and ``…-shm`` (SQLite's own: they are part of it) and for ever the empty ``…-owner``; its inbox, if it
    ever had one, is the file ``…-inbox``. Keep it on a local disk: network file systems do not lock as it needs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.path.realpath(path))

    async def pending(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.pending`. What is begun later is not among them."""
        self._opened()
        last, until = 0, self._file.last_place
        while page := await self._in_thread(self._file.pending, last, until, _PAGE):
            for last, entry in page:  # noqa: B007 - the next page begins there
                yield entry
            self._opened()

    async def counts(self) -> Mapping[State, int]:
        """See :meth:`Journal.counts`."""
        self._opened()
        return await self._in_thread(self._file.counts)

    def _beside(self) -> SqliteJournal:
        return SqliteJournal(f"{self._name}-inbox")

    async def _open(self) -> None:
        self._thread = anyio.CapacityLimiter(1)
        self._file = await self._in_thread(JournalFile, self._name)

    async def _close(self) -> None:
        await self._in_thread(self._file.close)

    async def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[Answer]:
        return await self._in_thread(self._file.write, operations)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._thread)
