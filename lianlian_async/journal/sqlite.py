"""The embedded journal: one SQLite file, one process, many tasks; standard library only.

The event loop never touches SQLite: each batch of writes is one transaction, and one ``fsync``, in a thread.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import anyio
import anyio.to_thread

from .base import Ending, Entry, Intent, JournalError, Standing, State
from .group import GroupCommit
from .operations import Answer, Begin, Look, Operation, Release, Settle, TakeBack
from .sqlite_file import JournalFile

__all__ = ["SqliteJournal"]

T = TypeVar("T")

_PAGE: Final = 500


class SqliteJournal:
    """A :class:`~lianlian_async.journal.Journal` in the SQLite file ``path``, which is made if it is not there.

    It belongs to one process at a time; a second one that opens it is refused. When that process has ended, in
    whatever way, the next one finds what it left open as UNSETTLED. Beside the file lie, while it is open,
    ``…-wal`` and ``…-shm`` (SQLite's own: they are part of it) and for ever the empty ``…-owner``. Keep it on a
    local disk: network file systems do not lock as it needs.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: JournalFile | None = None

    def __repr__(self) -> str:
        return f"<SqliteJournal {self._path}>"

    async def __aenter__(self) -> Self:
        if self._file is not None:
            raise RuntimeError(f"journal {self._path} is open already")
        self._process = os.getpid()
        self._thread = anyio.CapacityLimiter(1)
        self._file = await self._in_thread(JournalFile, self._path)
        self._group = GroupCommit(self._write)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:
            return  # a forked child leaves everything to its parent
        await self._group.stop()
        file, self._file = self._opened(), None
        with anyio.CancelScope(shield=True):
            await self._in_thread(file.close)

    async def intend(self, intent: Intent, now: datetime) -> tuple[Standing, Entry]:
        """See :meth:`Journal.intend`."""
        begin = Begin(intent, now)
        self._opened()
        return await self._group.do(begin, if_cancelled=TakeBack(begin))

    async def settle(self, no_refund: str, ending: Ending) -> Entry:
        """See :meth:`Journal.settle`."""
        return await self._do(Settle(no_refund, ending))

    async def release(self, entry: Entry, sent_at: datetime | None) -> None:
        """See :meth:`Journal.release`."""
        await self._do(Release(entry, sent_at))

    async def find(self, no_refund: str) -> Entry | None:
        """See :meth:`Journal.find`."""
        return await self._do(Look(no_refund))

    async def pending(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.pending`. What is begun later is not among them."""
        last, until = 0, self._opened().last_place
        while page := await self._in_thread(self._opened().pending, last, until, _PAGE):
            for last, entry in page:  # noqa: B007 - the next page begins there
                yield entry

    async def counts(self) -> Mapping[State, int]:
        """See :meth:`Journal.counts`."""
        return await self._in_thread(self._opened().counts)

    def _opened(self) -> JournalFile:
        if self._file is None:
            raise RuntimeError(f"journal {self._path} is not open: use it in `async with`")
        if os.getpid() != self._process:
            raise JournalError(
                f"journal {self._path} belongs to process {self._process}, which forked this one; "
                "open journals after forking, each process its own"
            )
        return self._file

    async def _do(self, operation: Operation[T]) -> T:
        self._opened()
        return await self._group.do(operation)

    async def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[Answer]:
        return await self._in_thread(self._opened().write, operations)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._thread)
