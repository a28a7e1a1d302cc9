"""The journal that ends with its process: for tests, and for jobs small enough to be looked at by a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from functools import cached_property
from types import TracebackType
from typing import Self, TypeVar

import anyio.lowlevel

from .base import Ending, Entry, Intent, Standing, State
from .operations import Begin, Operation, Release, Settle

__all__ = ["MemoryJournal"]

T = TypeVar("T")


class MemoryJournal:
    """A :class:`~lianlian_async.journal.Journal` in a dictionary. It can be opened again, and still knows all."""

    is_open = True
    """It has nothing to open: it works outside `async with` as well."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __repr__(self) -> str:
        return f"<MemoryJournal {len(self._entries)} refunds>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    async def intend(self, intent: Intent, now: datetime) -> tuple[Standing, Entry]:
        """See :meth:`Journal.intend`."""
        await anyio.lowlevel.checkpoint()
        return self._do(Begin(intent, now))

    async def settle(self, no_refund: str, ending: Ending) -> Entry:
        """See :meth:`Journal.settle`."""
        return self._do(Settle(no_refund, ending))

    async def release(self, entry: Entry, sent_at: datetime | None) -> None:
        """See :meth:`Journal.release`."""
        self._do(Release(entry, sent_at))

    async def pending(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.pending`."""
        for no_refund in list(self._entries):
            entry = self._entries[no_refund]
            if entry.state in (State.UNSETTLED, State.ACCEPTED):
                yield entry

    async def entries(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.entries`."""
        for no_refund in list(self._entries):
            yield self._entries[no_refund]

    async def find(self, no_refund: str) -> Entry | None:
        """See :meth:`Journal.find`."""
        return self._entries.get(no_refund)

    async def counts(self) -> Mapping[State, int]:
        """See :meth:`Journal.counts`."""
        return dict.fromkeys(State, 0) | Counter(entry.state for entry in self._entries.values())

    async def inbox(self) -> MemoryJournal:
        """See :meth:`Journal.inbox`."""
        return self._inbox

    @cached_property
    def _inbox(self) -> MemoryJournal:
        return MemoryJournal()

    def _do(self, operation: Operation[T]) -> T:
        answer, entry = operation.apply(self._entries.get(operation.no_refund))
        if entry is not None:
            self._entries[operation.no_refund] = entry
        return answer
