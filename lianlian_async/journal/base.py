"""What a journal is: the durable memory of which refunds were begun, and how each of them ended.

A refund stands in the journal before its first byte is sent. Whatever happens to the process, the journal
then tells which refunds have to be asked about, and an ending that is known is never lost or overwritten.

The way of one refund::

    begin ──► NEW ──────────────► send ──► finish (made, rejected, conflict)
         ├───► ASK_FIRST ► ask ──► send ──► finish
         ├───► UNRESOLVED ► ask ──► (resend, send) ──► finish
         │         ▲                 └──────► release (unknown: may have arrived; or certainly not sent)
         │         └───────────────────────────┘
         ├───► FINISHED: the recorded ending, no traffic
         └───► LEASED: another call or worker has the lease; wait for it

Cancellation never leaves a refund between two of these: a ``finish`` or ``release`` that was called is carried
out even if its caller is cancelled meanwhile, and an ``begin`` whose caller is cancelled is taken back.

A journal belongs to one merchant and one apply endpoint (:meth:`Journal.bind`): what a sandbox made must never
answer for production.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

import attrs

from lianlian_async.clock import Moment
from lianlian_async.errors import ConfigurationError, JournalError

__all__ = ["Ending", "Entry", "Intent", "Journal", "JournalError", "Owner", "Standing", "State"]


class State(StrEnum):
    """How a refund stands in the journal. It moves only downwards in this list, never back."""

    UNRESOLVED = "unresolved"
    """Begun; whether it was made is not known yet."""
    ACCEPTED = "accepted"
    """Made, but ``sta_refund`` can still change."""
    FINAL = "final"
    """Made, and final; to be acted on, as ``on_refund`` has not returned for it (:meth:`Journal.begin_acting`)."""
    DONE = "done"
    """Made, and final; nothing is left to do."""
    REJECTED = "rejected"
    """Refused by the gateway for good."""
    CONFLICT = "conflict"
    """The gateway told of another refund under this number: a person has to decide, nothing is sent or asked."""

    @property
    def is_finished(self) -> bool:
        """Whether there is an ending to answer with."""
        return self is not State.UNRESOLVED

    @property
    def is_made(self) -> bool:
        """Whether the gateway has told that the refund was made."""
        return self in (State.ACCEPTED, State.FINAL, State.DONE)


class Standing(StrEnum):
    """What :meth:`Journal.begin` found."""

    NEW = "new"
    ASK_FIRST = "ask first"
    """Not on record, but the journal may have lost its last commits: query before sending."""
    UNRESOLVED = "unresolved"
    FINISHED = "finished"
    LEASED = "leased"


@attrs.frozen
class Owner:
    """Whose refunds a journal holds: a merchant's, at one apply endpoint."""

    oid_partner: str
    apply_url: str

    def confirm(self, recorded: Owner | None, journal: str) -> Owner:
        """Return this owner if ``recorded`` is the same or nobody, or raise ``ConfigurationError``."""
        if recorded not in (None, self):
            raise ConfigurationError(
                f"journal {journal} belongs to merchant {recorded.oid_partner} at {recorded.apply_url}, "
                f"this session to {self.oid_partner} at {self.apply_url}: each needs a journal of its own"
            )
        return self


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
    lease: float
    """Seconds from now on in which the caller may send: nobody else does before they are over."""


@attrs.frozen(kw_only=True)
class Ending:
    """A known end: ``state`` and what it was learned from (``Refund.to_dict()``, or the rejection's fields)."""

    state: State = attrs.field(validator=attrs.validators.not_(attrs.validators.in_([State.UNRESOLVED])))
    record: Mapping[str, str]


@attrs.frozen(kw_only=True)
class Entry:
    """One refund as the journal holds it."""

    no_refund: str
    digest: str
    fields: Mapping[str, str]
    body: bytes
    """What is to be sent, again if need be; empty once there is an ending: nothing is sent any more."""
    sent_at: Moment | None
    """The last moment at which an attempt may have arrived (the end of the lease, while its holder may send);
    None: none ever may have."""
    refused: Mapping[str, str] | None = None
    """The refusal (``ret_code``, ``ret_msg``, ``verified``) in which every attempt so far ended; None: one may have
    worked, or none was made."""
    ending: Ending | None = None
    """None while it is unresolved."""
    holder: str | None = attrs.field(default=None, repr=False)
    """Names the call that has the lease."""
    leased_until: Moment | None = attrs.field(default=None, repr=False)
    """When the holder's lease ends."""

    @property
    def state(self) -> State:
        """How it stands."""
        return State.UNRESOLVED if self.ending is None else self.ending.state


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

    @property
    def id(self) -> str:
        """The random id that it was given when it was made; of an open journal."""

    async def bind(self, oid_partner: str, apply_url: str) -> None:
        """Write down whose refunds it holds, and of which endpoint, if nobody did before.

        Raises ``ConfigurationError`` if it belongs to another merchant or endpoint.
        """

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        """Write ``intent`` durably, and take the refund's lease, before anything is sent.

        NEW: it was not known, or known as certainly not sent; send it. ASK_FIRST: as NEW, but query first.
        UNRESOLVED: it was begun earlier; query first, and send nothing but the entry's own body, after :meth:`resend`.
        FINISHED: answer with the entry's ending. LEASED: somebody else has the lease; the entry is as stored.
        The entry's ``sent_at`` is the last moment at which an earlier attempt may have arrived: None if NEW or
        ASK_FIRST, never later than the answer if UNRESOLVED.

        A caller that is told NEW, ASK_FIRST or UNRESOLVED ends with :meth:`finish` or :meth:`release`.
        Raises ``RefundConflict`` if the number is recorded with another digest.
        """

    async def resend(self, entry: Entry) -> None:
        """Write down that ``entry``, as :meth:`begin` gave it, may be sent again until its lease ends.

        Raises :class:`JournalError` if somebody else has taken the lease.
        """

    async def finish(self, entry: Entry, ending: Ending) -> Entry:
        """Record how ``entry`` ended, and end its lease. The entry as it then stands.

        The first ending wins, whoever reports it; only ACCEPTED becomes DONE later. Recording the same again
        changes nothing. An entry that the journal has lost is written again. DONE is recorded as FINAL once acting has
        begun.
        """

    async def begin_acting(self) -> None:
        """Record every refund that becomes final from now on as FINAL, until :meth:`acted`; for good, in all processes.

        What is DONE by now stays so. A journal that is never told so never holds FINAL.
        """

    async def acted(self, no_refund: str) -> None:
        """Record that ``on_refund`` has returned: FINAL becomes DONE; nothing else changes."""

    async def release(self, entry: Entry, sent_at: Moment | None, refused: Mapping[str, str] | None = None) -> None:
        """End the lease of ``entry``, as :meth:`begin` gave it, without an ending.

        ``sent_at`` is the last moment at which an attempt, of this or of an earlier call, may have arrived;
        None: none ever may have, so that the next :meth:`begin` finds it NEW. ``refused``: see :class:`Entry`.
        Nothing happens if the lease is over and somebody else has taken it, or resolved it.
        """

    async def latest_made(self) -> Entry | None:
        """The youngest entry that is known as made: the proof that the query service knows our refunds."""

    def pending(self) -> AsyncIterator[Entry]:
        """Every entry that is UNRESOLVED, ACCEPTED or FINAL, oldest first; in bounded memory."""

    def entries(self) -> AsyncIterator[Entry]:
        """Every entry, oldest first; in bounded memory. Entries that begin later are left out."""

    async def find(self, no_refund: str) -> Entry | None:
        """The entry of one refund."""

    async def counts(self) -> Mapping[State, int]:
        """How many refunds stand in each state."""

    async def inbox(self) -> Journal:
        """The journal of what was notified: it lies beside this one, is opened on the first call, and closed with it.

        There an entry is a refund's final state as the gateway told it: UNRESOLVED until it was acted on, then DONE.
        """
