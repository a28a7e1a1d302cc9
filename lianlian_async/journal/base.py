"""The journal protocol: a durable record of every refund that was begun, and of its outcome.

A refund is recorded before its first byte is sent. After any crash the journal tells which refunds to ask about. A
recorded ending is never lost or overwritten. The states of one call::

    begin ──► NEW ──────────────► send ──► finish (made, rejected, conflict)
         ├───► ASK_FIRST ► ask ──► send ──► finish
         ├───► UNRESOLVED ► ask ──► (resend, send) ──► finish
         │         ▲                 └──────► release (unknown: may have arrived; or certainly not sent)
         │         └───────────────────────────┘
         ├───► FINISHED: the recorded ending, no traffic
         └───► LEASED: another call or worker has the lease; wait for it

Cancellation never leaves a refund in between: a ``finish`` or ``release`` is recorded even if its caller is cancelled
meanwhile, and the ``begin`` of a cancelled caller is taken back.

A journal belongs to one merchant and one apply endpoint (:meth:`Journal.bind`): a rehearsal on the sandbox must never
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
    """The state of a refund in the journal. It changes only from earlier members to later ones."""

    UNRESOLVED = "unresolved"
    """Begun; not known whether it was made."""
    ACCEPTED = "accepted"
    """Made, but ``sta_refund`` can still change."""
    FINAL = "final"
    """Made and final, but ``on_refund`` has not returned for it yet (:meth:`Journal.begin_acting`)."""
    DONE = "done"
    """Made and final; nothing is left to do."""
    REJECTED = "rejected"
    """Rejected by the gateway for good."""
    CONFLICT = "conflict"
    """The gateway reported another refund under this number: a person has to decide, nothing is sent or asked."""

    @property
    def is_finished(self) -> bool:
        """Whether there is an ending."""
        return self is not State.UNRESOLVED

    @property
    def is_made(self) -> bool:
        """Whether the gateway has said that the refund was made."""
        return self in (State.ACCEPTED, State.FINAL, State.DONE)


class Standing(StrEnum):
    """The result of :meth:`Journal.begin`."""

    NEW = "new"
    ASK_FIRST = "ask first"
    """Not on record, but the journal may have lost its last commits: query before sending."""
    UNRESOLVED = "unresolved"
    FINISHED = "finished"
    LEASED = "leased"


@attrs.frozen
class Owner:
    """The merchant and the apply endpoint that a journal belongs to."""

    oid_partner: str
    apply_url: str

    def confirm(self, recorded: Owner | None, journal: str) -> Owner:
        """Return this owner if ``recorded`` is the same or None; else raise ``ConfigurationError``."""
        if recorded not in (None, self):
            raise ConfigurationError(
                f"journal {journal} belongs to merchant {recorded.oid_partner} at {recorded.apply_url}, "
                f"this session to {self.oid_partner} at {self.apply_url}: use one journal for each"
            )
        return self


@attrs.frozen(kw_only=True)
class Intent:
    """A refund about to be sent."""

    no_refund: str
    digest: str
    """SHA-256 (hex) of the content that must not change under one number."""
    fields: Mapping[str, str]
    """The request in wire form (``RefundRequest.to_dict``)."""
    body: bytes
    """The exact signed bytes to send."""
    lease: float
    """Seconds from now in which only this caller may send."""


@attrs.frozen(kw_only=True)
class Ending:
    """A known outcome: ``state`` and its evidence (``Refund.to_dict()``, or the rejection's fields)."""

    state: State = attrs.field(validator=attrs.validators.not_(attrs.validators.in_([State.UNRESOLVED])))
    record: Mapping[str, str]


@attrs.frozen(kw_only=True)
class Entry:
    """One refund in the journal."""

    no_refund: str
    digest: str
    fields: Mapping[str, str]
    body: bytes
    """The signed bytes to send, or to send again; empty once there is an ending."""
    sent_at: Moment | None
    """The last moment at which an attempt may have arrived (the end of the lease, while its holder may send);
    None: certainly no attempt has arrived."""
    refused: Mapping[str, str] | None = None
    """The refusal (``ret_code``, ``ret_msg``, ``verified``) in which every attempt so far ended; None: one may have
    worked, or there was none."""
    ending: Ending | None = None
    """None while it is unresolved."""
    holder: str | None = attrs.field(default=None, repr=False)
    """Identifies the call that has the lease."""
    leased_until: Moment | None = attrs.field(default=None, repr=False)
    """The end of the lease."""

    @property
    def state(self) -> State:
        """The refund's state."""
        return State.UNRESOLVED if self.ending is None else self.ending.state


class Journal(Protocol):
    """A journal, opened by ``async with``. All methods raise :class:`JournalError` if it does not work."""

    async def __aenter__(self) -> Self:
        """Open it."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Finish all writes and close it."""

    @property
    def is_open(self) -> bool:
        """Whether it can be used now."""

    @property
    def id(self) -> str:
        """The random id that the journal got at its creation; only of an open journal."""

    owner: Owner | None
    """Whose refunds it holds, as far as this process knows; None: nobody's yet."""

    async def bind(self, oid_partner: str, apply_url: str) -> None:
        """Record the owner: merchant and apply endpoint.

        Raises ``ConfigurationError`` if the journal has another owner.
        """

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        """Record ``intent`` durably and take the refund's lease, before anything is sent.

        NEW: not on record, or certainly not sent; send it. ASK_FIRST: as NEW, but query first. UNRESOLVED: begun
        earlier; query first, and send only the entry's own body, after :meth:`resend`. FINISHED: use the entry's
        ending. LEASED: another call has the lease; the entry is as stored.
        The entry's ``sent_at`` is the last moment at which an earlier attempt may have arrived: None if NEW or
        ASK_FIRST, never later than ``now`` if UNRESOLVED.

        After NEW, ASK_FIRST and UNRESOLVED, the caller has to call :meth:`finish` or :meth:`release`.
        Raises ``RefundConflict`` if the number is recorded with another digest.
        """

    async def resend(self, entry: Entry) -> None:
        """Record that ``entry``, as returned by :meth:`begin`, may be sent again until its lease ends.

        Raises :class:`JournalError` if another call has taken the lease.
        """

    async def finish(self, entry: Entry, ending: Ending) -> Entry:
        """Record the ending of ``entry``, end its lease, and return the entry as stored.

        The first ending wins; only ACCEPTED may become FINAL or DONE later. Recording the same ending again changes
        nothing. An entry that the journal has lost is written again. Once acting has begun, DONE is recorded as FINAL.
        """

    async def begin_acting(self) -> None:
        """Record every refund that becomes final from now on as FINAL until :meth:`acted`; in all processes, for good.

        Refunds that are DONE stay DONE. Without this call the journal never has FINAL refunds.
        """

    async def acted(self, no_refund: str) -> None:
        """Record that ``on_refund`` has returned: FINAL becomes DONE; nothing else changes."""

    async def release(self, entry: Entry, sent_at: Moment | None, refused: Mapping[str, str] | None = None) -> None:
        """End the lease of ``entry``, as returned by :meth:`begin`, without an ending.

        ``sent_at`` is the last moment at which an attempt, of this or of an earlier call, may have arrived; None:
        certainly none has, so the next :meth:`begin` returns NEW. ``refused``: see :class:`Entry`. Does nothing if
        another call has taken the lease or resolved the refund.
        """

    async def latest_made(self) -> Entry | None:
        """Return the youngest entry that is known as made, to test the query service with."""

    def pending(self) -> AsyncIterator[Entry]:
        """Yield every UNRESOLVED, ACCEPTED or FINAL entry, oldest first, in bounded memory.

        Durable journals leave out entries that begin later.
        """

    def entries(self) -> AsyncIterator[Entry]:
        """Yield every entry, oldest first, in bounded memory, without those that begin later."""

    async def find(self, no_refund: str) -> Entry | None:
        """Return the entry of one refund."""

    async def counts(self) -> Mapping[State, int]:
        """Return the number of refunds in each state."""

    async def inbox(self) -> Journal:
        """Return the journal of notified final states. The first call opens it; it closes with this journal.

        Its entries are UNRESOLVED until the handler has acted on them, then DONE.
        """
