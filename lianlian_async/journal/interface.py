"""The journal protocol: records every refund that was begun, and its outcome.

A refund is recorded before its first byte is sent. After a crash, :meth:`Journal.pending` yields the refunds that are
open or not acted on. The steps of one call::

    begin ──► NEW ─────────────────────────► send ──┬──► finish (made, rejected, conflict)
         ├──► QUERY_FIRST ──► query ─────────► send ──┤
         ├──► UNRESOLVED ─► query ─► resend, send ──┴──► release (still unknown, or certainly not made)
         ├──► FINISHED: return the recorded outcome, send nothing
         └──► LEASED: another call or worker has the lease; call begin again later

Cancellation is safe. ``finish`` and ``release`` are recorded even if the caller is cancelled meanwhile; the lease of a
``begin`` whose caller is cancelled is released.
"""

from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Protocol, Self, TypeVar, cast

from lianlian_async.clock import Moment

from . import operations
from .base import Ending, Entry, Intent, Owner, Standing, State

E = TypeVar("E", bound=Entry | None)


class Journal(Protocol):
    """A journal, opened by ``async with``. All methods raise :class:`JournalError` if the journal fails.

    A subclass defines every method that has no body here.
    """

    async def __aenter__(self) -> Self:
        """Open it."""

    async def __aexit__(self, *exc_info: object) -> None:
        """Finish all writes and close it."""

    @property
    def is_open(self) -> bool:
        """Whether the journal is open."""

    @property
    def id(self) -> str:
        """The random id that the journal got at its creation. Can be read only while the journal is open."""

    owner: Owner | None
    """The owner, as this process last read it. None: the journal is not bound yet."""

    async def bind(self, oid_partner: str, apply_url: str) -> None:
        """Record the owner. Raises ``ConfigurationError`` if the journal has another owner.

        So a refund that was made in the sandbox is never taken for a production refund.
        """

    async def record(self, operation: operations.Operation[E]) -> E:
        """Apply ``operation`` to the entry of its refund, and return the entry as stored.

        If the caller of :class:`.operations.Begin` is cancelled, its ``take_back`` follows it.
        """

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        """Record ``intent`` and take the refund's lease, before anything is sent.

        NEW: the journal has no entry, or no attempt can have made the refund; send it. QUERY_FIRST: as NEW, but query
        first. UNRESOLVED: an earlier call began the refund; query first, and send the entry's own fields only after
        :meth:`resend`. FINISHED: use the entry's ending. LEASED: another call has the lease; the entry is as stored.
        The entry's ``sent_at`` is None after NEW, and not in the future after UNRESOLVED. After QUERY_FIRST it is the
        latest time of a send whose entry may have been lost; None: no such send, or its grace is over.

        After NEW, QUERY_FIRST and UNRESOLVED, the caller has to call :meth:`finish` or :meth:`release`.
        Raises ``RefundConflict`` if the journal has the number with other fields.
        """
        begin = operations.Begin(intent, now)
        await self.record(operations.Operation(intent.no_refund, begin))
        return begin.standing, cast("Entry", begin.found)

    async def resend(self, entry: Entry, history: str = "") -> None:
        """Record that the entry of :meth:`begin`, with a new ``body``, may be sent until its lease ends.

        ``history``, here and in :meth:`finish` and :meth:`release`: the entry's history with the facts of this call.
        Raises :class:`JournalError` if another call has taken the lease or resolved the refund.
        """
        await self.record(operations.Operation(entry.no_refund, partial(operations.resend, entry, history)))

    async def finish(self, entry: Entry, ending: Ending, history: str = "") -> Entry:
        """Record the outcome of ``entry``, end its lease, and return the entry as stored.

        The first outcome wins; only ACCEPTED may become FINAL or DONE later. Idempotent. An entry that the journal has
        lost is written again. After :meth:`begin_acting`, a DONE ending is recorded as FINAL until :meth:`acted`.
        """
        return await self.record(
            operations.Operation(entry.no_refund, partial(operations.finish, entry, ending, history))
        )

    async def begin_acting(self) -> None:
        """Switch the journal permanently, for all processes: record a final refund as FINAL until :meth:`acted`.

        To act on a refund means to call ``on_refund``. Refunds that are DONE stay DONE. Without this call, no refund
        becomes FINAL.
        """

    async def acted(self, no_refund: str, now: Moment) -> None:
        """Record that ``on_refund`` has returned: FINAL becomes DONE; every other state stays as it is."""
        await self.record(operations.Operation(no_refund, partial(operations.acted, now)))

    async def release(
        self, entry: Entry, sent_at: Moment | None, refused: Mapping[str, str] | None = None, history: str = ""
    ) -> None:
        """End the lease of ``entry``, as returned by :meth:`begin`, and leave the refund unresolved.

        ``sent_at`` and ``refused`` (see :class:`Entry`) cover the attempts of this call and of earlier ones. If
        ``sent_at`` is None, the next :meth:`begin` returns NEW or QUERY_FIRST. Does nothing if another call has taken
        the lease; if another call has resolved the refund, only adds the history.
        """
        await self.record(
            operations.Operation(entry.no_refund, partial(operations.release, entry, sent_at, refused, history))
        )

    async def decide(self, no_refund: str, ending: Ending, now: Moment) -> Entry:
        """Record the outcome that a person has decided, DONE or REJECTED, as :meth:`finish` does.

        Raises :class:`JournalError` if the refund has no entry, is leased, is FINAL or DONE, was rejected with a
        signature, or was decided already. A rejection cannot replace a rejection.
        """
        return await self.record(operations.Operation(no_refund, partial(operations.decide, no_refund, ending, now)))

    async def canaries(self) -> list[Entry]:
        """Return a sample, of different ages, of the entries whose :attr:`~Entry.is_canary` is true, newest first."""

    def pending(self) -> AsyncIterator[Entry]:
        """Yield every UNRESOLVED, ACCEPTED or FINAL entry, oldest first, in bounded memory.

        Leaves out entries that are added during the iteration.
        """

    def entries(self) -> AsyncIterator[Entry]:
        """Yield every entry as :meth:`pending` does, whatever its state."""

    async def find(self, no_refund: str) -> Entry | None:
        """Return the entry of one refund."""
        return await self.record(operations.Operation(no_refund, operations.find))

    async def counts(self) -> Mapping[State, int]:
        """Return the number of refunds in each state."""

    async def inbox(self) -> "Journal":
        """Return the inbox: a second journal, which contains the final refunds to act on.

        The first call opens it, and it closes with this journal. Its entries are UNRESOLVED until ``on_refund`` has
        returned for them, then DONE.
        """
