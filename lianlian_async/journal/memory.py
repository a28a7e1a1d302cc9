"""Journals in memory, for tests, small jobs, and sessions without a journal."""

from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from functools import cached_property
from threading import Lock
from typing import Final, Self, TypeVar, cast
from uuid import uuid4

import anyio.lowlevel

from lianlian_async.clock import Moment

from .base import Entry, Intent, JournalError, Owner, Standing, State
from .interface import Journal
from .operations import Operation, perform

E = TypeVar("E", bound=Entry | None)

_MOST_CANARIES: Final = 1_500
"""Maximum number of canaries that are kept: one for each minute of 25 hours."""


class MemoryJournal(Journal):
    """A :class:`~.interface.Journal` in a dictionary. It keeps its entries when it is closed; threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._entries: dict[str, Entry] = {}
        self._canaries = deque[Entry](maxlen=_MOST_CANARIES)
        self.owner: Owner | None = None
        self._is_acting = False
        self._id = uuid4().hex

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._entries)} refunds>"

    @property
    def is_open(self) -> bool:
        return True  # it also works without `async with`

    @property
    def id(self) -> str:
        return self._id

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass

    async def bind(self, oid_partner: str, apply_url: str) -> None:
        owner = Owner(oid_partner, apply_url)
        self.owner = owner.confirm(self.owner, repr(self))

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        await anyio.lowlevel.checkpoint()
        return await super().begin(intent, now)

    async def begin_acting(self) -> None:
        self._is_acting = True

    async def canaries(self) -> list[Entry]:
        kept = list(self._canaries)  # a copy, because another thread may add one meanwhile
        return [entry for entry in reversed(kept) if self._entries.get(entry.no_refund, entry).is_canary]

    async def pending(self) -> AsyncIterator[Entry]:
        for no_refund in list(self._entries):
            entry = self._entries[no_refund]
            if entry.state in (State.UNRESOLVED, State.ACCEPTED, State.FINAL):
                yield entry

    async def entries(self) -> AsyncIterator[Entry]:
        for no_refund in list(self._entries):
            yield self._entries[no_refund]

    async def find(self, no_refund: str) -> Entry | None:
        return self._entries.get(no_refund)

    async def counts(self) -> Mapping[State, int]:
        return dict.fromkeys(State, 0) | Counter(entry.state for entry in list(self._entries.values()))

    async def inbox(self) -> "MemoryJournal":
        return self._inbox

    @cached_property
    def _inbox(self) -> "MemoryJournal":
        return MemoryJournal()

    async def record(self, operation: Operation[E]) -> E:
        with self._lock:
            [result] = perform([operation], self._entries, is_acting=self._is_acting)
        if result.error is not None:
            raise result.error
        entry = self._entries.get(operation.no_refund)
        if entry is not None and entry.is_canary and entry.sent_at is not None:
            newest = self._canaries[-1].sent_at if self._canaries else None
            if newest is None or entry.sent_at.boot - newest.boot >= 60:
                self._canaries.append(entry)
        return cast("E", result.value)


MOST_OPEN: Final = 100_000
"""Maximum number of unresolved refunds of one session without a journal; they take about 170 MB."""
MOST_MADE: Final = 1_000
"""Maximum number of outcomes that one session without a journal remembers; they take about 4 MB."""


class OpenRefunds(MemoryJournal):
    """The memory of a session without a journal: its unresolved refunds, and its last ``MOST_MADE`` outcomes.

    So a second call for an unknown refund queries first, and one for a refund that was made sends nothing. No
    unresolved refund is dropped: at ``MOST_OPEN`` of them, the session begins no new one. A rejected refund may be sent
    again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._finished = dict[str, None]()
        """The refunds with an outcome, oldest first."""

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        if len(self._entries) - len(self._finished) >= MOST_OPEN and intent.no_refund not in self._entries:
            raise JournalError(
                f"{MOST_OPEN:,} refunds of this session are unresolved, and it cannot remember more: resolve them "
                "first, or use a journal"
            )
        return await super().begin(intent, now)

    async def record(self, operation: Operation[E]) -> E:
        answer = await super().record(operation)
        number = operation.no_refund
        entry = self._entries[number]
        if entry.state is State.REJECTED or (entry.ending is None and entry.sent_at is None):
            del self._entries[number]
        elif entry.ending is not None:
            self._finished[number] = None
            if len(self._finished) > MOST_MADE:
                oldest = next(iter(self._finished))
                del self._finished[oldest], self._entries[oldest]
        return answer
