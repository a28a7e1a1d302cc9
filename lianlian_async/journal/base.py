"""What a journal is: the durable memory of which refunds were begun, and how each of them ended.

A refund stands in the journal before its first byte is sent. Whatever happens to the process, the journal
then tells which refunds have to be asked about, and an ending that is known is never lost or overwritten.

The way of one refund::

    intend ──► NEW ──────────────► send ──► settle (made, rejected)
         ├───► UNSETTLED ► ask ──► (send) ─► settle
         │         ▲                 └─────► release (unknown: may have arrived; or certainly not sent)
         │         └───────────────────────────┘
         ├───► SETTLED: the recorded ending, no traffic
         └───► HELD: another call or worker is at it; wait for it
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

import attrs

from lianlian_async.errors import LianLianError

__all__ = ["Ending", "Entry", "Intent", "Journal", "JournalError", "Standing", "State"]


class JournalError(LianLianError):
    """The journal cannot be used: not written, not read, held by another process, of an unknown version.

    Nothing was sent that the journal does not hold. The message names the journal and the cure.
    """


class State(StrEnum):
    """How a refund stands in the journal. It moves only downwards in this list, never back."""

    UNSETTLED = "unsettled"
    """Begun; whether it was made is not known yet."""
    ACCEPTED = "accepted"
    """Made, but ``sta_refund`` can still change."""
    DONE = "done"
    """Made, and final."""
    REJECTED = "rejected"
    """Refused by the gateway for good."""

    @property
    def is_settled(self) -> bool:
        """Whether there is an ending to answer with."""
        return self is not State.UNSETTLED


class Standing(StrEnum):
    """What :meth:`Journal.intend` found."""

    NEW = "new"
    UNSETTLED = "unsettled"
    SETTLED = "settled"
    HELD = "held"


@attrs.frozen(kw_only=True)
class Intent:
    """A refund about to be sent."""

    no_refund: str
    digest: str
    """Of the content that may never change under one number (hex)."""
    fields: Mapping[str, str]
    """The request in wire form (``RefundRequest.to_dict``), to ask and to show with."""
    body: bytes
    """The exact signed bytes that are sent."""
    held_until: datetime
    """Until when the caller may go on sending: nobody else does before that."""


@attrs.frozen(kw_only=True)
class Ending:
    """A known end: ``state`` and what it was learned from (``Refund.to_dict()``, or the rejection's fields)."""

    state: State
    record: Mapping[str, str]


@attrs.frozen(kw_only=True)
class Entry:
    """One refund as the journal holds it."""

    no_refund: str
    digest: str
    fields: Mapping[str, str]
    body: bytes
    sent_at: datetime
    """The last moment at which an attempt may have arrived."""
    ending: Ending | None
    """None while it is unsettled."""


class Journal(Protocol):
    """A journal, opened by ``async with``. All methods raise :class:`JournalError` if it cannot do its work."""

    async def __aenter__(self) -> Self:
        """Open it."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Finish what is being written, and close it."""

    async def intend(self, intent: Intent, now: datetime) -> tuple[Standing, Entry]:
        """Write ``intent`` durably, and take hold of the refund until ``held_until``, before anything is sent.

        NEW: it was not known, or known as certainly not sent; send it. UNSETTLED: it was begun earlier and is
        the caller's now; ask first. The entry's ``sent_at`` is the last moment at which the earlier holder may
        have sent: never later than ``now``. SETTLED: answer with the entry's ending. HELD: somebody else is at
        it; the entry is as it stands.

        Raises ``RefundConflict`` if the number is recorded with another digest.
        """

    async def settle(self, no_refund: str, ending: Ending) -> Entry:
        """Record how it ended, and let go of it. The entry as it then stands.

        The first ending wins; only ACCEPTED becomes DONE later. Recording the same again changes nothing.
        """

    async def release(self, no_refund: str, sent_at: datetime | None) -> None:
        """Let go of a refund without an ending.

        ``sent_at`` is the last moment at which an attempt may have arrived; None: none ever may have, so that
        the next :meth:`intend` finds it NEW.
        """

    def pending(self) -> AsyncIterator[Entry]:
        """Every entry that is unsettled, or accepted and not final, oldest first; in bounded memory."""

    async def find(self, no_refund: str) -> Entry | None:
        """The entry of one refund."""

    async def counts(self) -> Mapping[State, int]:
        """How many refunds stand in each state."""
