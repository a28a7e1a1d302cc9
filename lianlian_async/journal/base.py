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

Cancellation never leaves a refund between two of these: a ``settle`` or ``release`` that was called is carried
out even if its caller is cancelled meanwhile, and an ``intend`` whose caller is cancelled is taken back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

import attrs

from lianlian_async.errors import JournalError

__all__ = ["Ending", "Entry", "Intent", "Journal", "JournalError", "Standing", "State"]


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

    state: State = attrs.field(validator=attrs.validators.not_(attrs.validators.in_([State.UNSETTLED])))
    record: Mapping[str, str]


@attrs.frozen(kw_only=True)
class Entry:
    """One refund as the journal holds it."""

    no_refund: str
    digest: str
    fields: Mapping[str, str]
    body: bytes
    """What is to be sent, again if need be; empty once there is an ending: nothing is sent any more."""
    sent_at: datetime | None
    """The last moment at which an attempt may have arrived (the end of the hold, while somebody holds it);
    None: none ever may have."""
    ending: Ending | None = None
    """None while it is unsettled."""
    holder: str | None = attrs.field(default=None, repr=False)
    """Names the call that took hold of it and has not let go."""

    @property
    def state(self) -> State:
        """How it stands."""
        return State.UNSETTLED if self.ending is None else self.ending.state


class Journal(Protocol):
    """A journal, opened by ``async with``. All methods raise :class:`JournalError` if it cannot do its work."""

    async def __aenter__(self) -> Self:
        """Open it."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Finish what is being written, and close it."""

    @property
    def is_open(self) -> bool:
        """Whether it can be used now."""

    async def intend(self, intent: Intent, now: datetime) -> tuple[Standing, Entry]:
        """Write ``intent`` durably, and take hold of the refund until ``held_until``, before anything is sent.

        NEW: it was not known, or known as certainly not sent; send it. UNSETTLED: it was begun earlier and is
        the caller's now; ask first, and send nothing but the entry's own body. The entry's ``sent_at`` is the
        last moment at which an earlier attempt may have arrived: None if NEW, never later than ``now`` if
        UNSETTLED. SETTLED: answer with the entry's ending. HELD: somebody else is at it; the entry is as it
        stands.

        Who is told NEW or UNSETTLED ends with :meth:`settle` or :meth:`release`.
        Raises ``RefundConflict`` if the number is recorded with another digest.
        """

    async def settle(self, no_refund: str, ending: Ending) -> Entry:
        """Record how it ended, and let go of it. The entry as it then stands.

        The first ending wins, whoever reports it; only ACCEPTED becomes DONE later. Recording the same again
        changes nothing.
        """

    async def release(self, entry: Entry, sent_at: datetime | None) -> None:
        """Let go of ``entry``, as :meth:`intend` gave it, without an ending.

        ``sent_at`` is the last moment at which an attempt, of this or of an earlier call, may have arrived;
        None: none ever may have, so that the next :meth:`intend` finds it NEW. Nothing happens if the hold is
        over and somebody else has taken it, or settled it.
        """

    def pending(self) -> AsyncIterator[Entry]:
        """Every entry that is unsettled, or accepted and not final, oldest first; in bounded memory."""

    def entries(self) -> AsyncIterator[Entry]:
        """Every entry, oldest first; in bounded memory. What is begun later is not among them."""

    async def find(self, no_refund: str) -> Entry | None:
        """The entry of one refund."""

    async def counts(self) -> Mapping[State, int]:
        """How many refunds stand in each state."""

    async def inbox(self) -> Journal:
        """The journal of what was notified: it lies beside this one, is opened on the first call, and closed with it.

        There an entry is a refund's final state as the gateway told it: UNSETTLED until it was acted on, then DONE.
        """
