"""Operations on one journal entry: begin, resend, finish, acted, decide, release, take back (a begin), find.

They do no I/O, and are the same for every journal. An operation gets the stored entry of its refund, or None. It
returns a value for the caller and the entry to store: the same object if nothing changes.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

import attrs

from lianlian_async import wire
from lianlian_async.clock import Moment, elapsed
from lianlian_async.identity import check_request

from .base import Ending, Entry, Intent, JournalError, Standing, State, added, joined

T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """An operation on the journal entry of one refund."""

    @property
    def no_refund(self) -> str:
        """The refund's number."""

    def apply(self, entry: Entry | None) -> tuple[T_co, Entry | None]:
        """Return the value for the caller and the entry to store, or raise the error for the caller."""


class Result(NamedTuple):
    """The outcome of an operation: a value, or the error to raise."""

    value: Any
    error: Exception | None = None


def perform(
    operations: Iterable[Operation[Any]], entries: dict[str, Entry], *, is_acting: bool = False
) -> list[Result]:
    """Apply ``operations`` in order to ``entries`` (in place). An operation that fails changes nothing.

    ``is_acting``: whether the journal records final refunds as FINAL until ``on_refund`` has returned.
    """
    results = []
    for operation in operations:
        if isinstance(operation, (Finish, Decide)):
            operation.is_acting = is_acting
        try:
            value, entry = operation.apply(entries.get(operation.no_refund))
        except Exception as error:  # noqa: BLE001 - raised in the operation's caller
            results.append(Result(None, error))
        else:
            results.append(Result(value))
            if entry is not None:
                entries[operation.no_refund] = entry
    return results


@attrs.define
class Begin:
    """``Journal.begin``."""

    intent: Intent
    now: Moment
    holder: str = attrs.field(factory=lambda: uuid4().hex)
    """Identifies this call among the calls of all processes."""
    ask_first: bool = attrs.field(default=False, kw_only=True)
    """Whether the journal may have lost an entry of this refund."""
    sent_at: Moment | None = attrs.field(default=None, kw_only=True)
    """Latest time at which a call whose entry was lost may have sent the refund; None: no such call, or grace over."""
    found: Entry | None = attrs.field(default=None, init=False)
    """The entry that the caller receives with the lease."""
    is_taken_back: bool = attrs.field(default=False, init=False)
    """Whether the caller was cancelled: the operation then records nothing."""

    @property
    def no_refund(self) -> str:
        """The refund's number."""
        return self.intent.no_refund

    def postpone(self, boot: float) -> None:
        """Move ``now`` forward to the boot-clock reading ``boot``, but do not move the end of the lease."""
        seconds = boot - self.now.boot
        self.now, self.intent = self.now.after(seconds), attrs.evolve(self.intent, lease=self.intent.lease - seconds)

    def allow_for_restore(self, restored_at: Moment) -> None:
        """Set ``ask_first`` and ``sent_at`` for a backup that was restored at ``restored_at``.

        The backup may lack any refund: neither ``dt_refund`` nor the wall clock proves when a refund was begun.
        """
        if self.intent.grace is not None:
            self.ask_first, seconds = True, elapsed(restored_at, self.now)
            self.sent_at = restored_at if seconds is None or seconds < self.intent.grace else None

    def allow_for_failover(self, lost_at: datetime, now: datetime) -> None:
        """Set ``ask_first`` and ``sent_at`` for a database that may have lost its latest entries at ``lost_at``.

        Until the grace ends, every refund is queried first, and counts as sent now if its ``dt_refund`` is before
        ``lost_at``. Later, a refund is queried first if its ``dt_refund`` is before the end of the grace.
        """
        if self.intent.grace is not None:
            until, dt_refund = lost_at + timedelta(seconds=self.intent.grace), self.intent.fields.get("dt_refund", "")
            self.ask_first = now < until or dt_refund < wire.format_timestamp(until)
            is_sent = now < until and dt_refund < wire.format_timestamp(lost_at)
            self.sent_at = self.now if is_sent else None

    def apply(self, entry: Entry | None) -> tuple[tuple[Standing, Entry], Entry]:
        """Return the standing and the entry. The caller has the lease after NEW, ASK_FIRST or UNRESOLVED."""
        if self.is_taken_back:
            raise JournalError(f"refund {self.no_refund}: not begun, because its call was cancelled")
        if entry is None:
            return self._new(added("", self.now, "begun"))
        check_request(self.no_refund, self.intent.fields, entry.fields)
        if entry.ending is not None:
            return (Standing.FINISHED, entry), entry
        if entry.sent_at is None:
            # No attempt can have made the refund, so store this call's body: the signing key may have changed since.
            return self._new(added(entry.history, self.now, "lease"))
        if _is_leased(entry, self.now):
            return (Standing.LEASED, entry), entry
        return self._unresolved(entry, entry.sent_at)

    def _new(self, history: str) -> tuple[tuple[Standing, Entry], Entry]:
        """Store the end of the lease as ``sent_at``: the caller may send until then, and then crash."""
        leased_until = self.now.after(self.intent.lease)
        self.found = Entry(
            no_refund=self.no_refund,
            fields=self.intent.fields,
            body=self.intent.body,
            sent_at=self.sent_at,
            holder=self.holder,
            leased_until=leased_until,
            history=history,
        )
        stored = attrs.evolve(self.found, sent_at=leased_until)
        return (Standing.ASK_FIRST if self.ask_first else Standing.NEW, self.found), stored

    def _unresolved(self, entry: Entry, sent_at: Moment) -> tuple[tuple[Standing, Entry], Entry]:
        sent_at = measurable(sent_at, self.now)  # the lease is over, so earlier calls send nothing more
        leased_until, history = self.now.after(self.intent.lease), added(entry.history, self.now, "lease")
        self.found = attrs.evolve(
            entry, sent_at=sent_at, holder=self.holder, leased_until=leased_until, history=history
        )
        return (Standing.UNRESOLVED, self.found), self.found


def _is_leased(entry: Entry, now: Moment) -> bool:
    return entry.holder is not None and entry.leased_until is not None and _is_ahead(entry.leased_until, now)


def _is_ahead(moment: Moment, now: Moment) -> bool:
    """Return whether ``moment`` is later than ``now``, by the boot clock or, across boots, by the wall clock."""
    return moment.boot > now.boot if moment.timeline == now.timeline else moment.wall > now.wall


def measurable(moment: Moment, now: Moment) -> Moment:
    """Return ``moment``; return ``now`` if it is earlier, or if no clock can measure the time since ``moment``."""
    is_comparable = moment.timeline == now.timeline or moment.gateway is not None
    return moment if is_comparable and not _is_ahead(moment, now) else now


@attrs.define
class _OnLease:
    leased: Entry
    """The entry as :meth:`.Journal.begin` or :meth:`.Journal.find` returned it."""

    @property
    def no_refund(self) -> str:
        """The refund's number."""
        return self.leased.no_refund


@attrs.define
class Resend(_OnLease):
    """``Journal.resend``."""

    history: str

    def apply(self, entry: Entry | None) -> tuple[None, Entry]:
        """Store that the entry may be sent until its lease ends."""
        if entry is not None and (entry.holder != self.leased.holder or entry.ending is not None):
            raise JournalError(
                f"refund {self.no_refund}: another call or worker has taken its lease or resolved it; query it later"
            )
        history = joined(entry.history if entry else "", self.history)
        return None, attrs.evolve(self.leased, sent_at=self.leased.leased_until, refused=None, history=history)


@attrs.define
class Finish(_OnLease):
    """``Journal.finish``."""

    ending: Ending
    history: str
    is_acting: bool = attrs.field(default=False, kw_only=True)
    """See :func:`perform`."""

    def apply(self, entry: Entry | None) -> tuple[Entry, Entry]:
        """Return the entry with its first outcome, or with the final outcome that replaces ACCEPTED."""
        entry = entry or self.leased  # a failover may have lost the row
        if entry.ending is None or (entry.state is State.ACCEPTED and self.ending.state in (State.FINAL, State.DONE)):
            entry = _ended(entry, self.ending, joined(entry.history, self.history), is_acting=self.is_acting)
        return entry, entry


def _ended(entry: Entry, ending: Ending, history: str, *, is_acting: bool) -> Entry:
    if is_acting and ending.state is State.DONE:
        ending = Ending(state=State.FINAL, record=ending.record)
    return attrs.evolve(entry, body=b"", refused=None, ending=ending, holder=None, leased_until=None, history=history)


@attrs.define
class Decide:
    """``Journal.decide``."""

    no_refund: str
    ending: Ending
    now: Moment
    is_acting: bool = attrs.field(default=False, kw_only=True)
    """See :func:`perform`."""

    def apply(self, entry: Entry | None) -> tuple[Entry, Entry]:
        """Return the entry with the decision. Its record keeps an earlier record as ``recorded``, in JSON."""
        refusal = None
        if entry is None:
            refusal = "it is not in this journal"
        elif _is_leased(entry, self.now):
            refusal = "another call or worker has its lease and may be sending it: decide when that call has ended"
        elif entry.state in (State.FINAL, State.DONE):
            refusal = "its outcome is final already"
        elif entry.state is State.REJECTED and self.ending.state is State.REJECTED:
            refusal = "it is rejected already"
        elif entry.ending and (entry.ending.record.get("verified") == "yes" or "evidence" in entry.ending.record):
            refusal = "the gateway signed its rejection, or its outcome was decided already"
        if refusal is not None or entry is None:
            raise JournalError(f"refund {self.no_refund}: {refusal}; nothing was changed")
        record = dict(self.ending.record)
        if entry.ending is not None:
            record["recorded"] = json.dumps(dict(entry.ending.record), ensure_ascii=False)
        ending = Ending(state=self.ending.state, record=record)
        history = added(entry.history, self.now, "decided")
        entry = _ended(entry, ending, history, is_acting=self.is_acting)
        return entry, entry


@attrs.frozen
class Acted:
    """``Journal.acted``."""

    no_refund: str
    now: Moment

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """Store a FINAL entry as DONE."""
        if entry is not None and entry.ending is not None and entry.state is State.FINAL:
            history = added(entry.history, self.now, "acted")
            entry = attrs.evolve(entry, ending=attrs.evolve(entry.ending, state=State.DONE), history=history)
        return None, entry


@attrs.define
class Release(_OnLease):
    """``Journal.release``."""

    sent_at: Moment | None
    refused: Mapping[str, str] | None = None
    history: str = ""

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """Store the entry without its lease. If another call has recorded an outcome, change only the history.

        If a failover has lost the entry, store it again if the refund may have been sent.
        """
        if entry is None and self.sent_at is not None:
            entry = self.leased
        if entry is None:
            return None, None
        history = joined(entry.history, self.history)
        if entry.ending is not None and history != entry.history:
            return None, attrs.evolve(entry, history=history)
        if entry.holder is None or entry.holder != self.leased.holder:
            return None, entry
        return None, attrs.evolve(
            entry, sent_at=self.sent_at, refused=self.refused, holder=None, leased_until=None, history=history
        )


@attrs.frozen
class TakeBack:
    """Release the lease of a :class:`Begin` whose caller was cancelled before it sent anything."""

    begin: Begin

    @property
    def no_refund(self) -> str:
        """The refund's number."""
        return self.begin.no_refund

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """End the lease. If the :class:`Begin` is still in the queue, make it fail without effect."""
        found, self.begin.is_taken_back = self.begin.found, True
        return (None, entry) if found is None else Release(found, found.sent_at, found.refused).apply(entry)


@attrs.frozen
class Find:
    """``Journal.find``."""

    no_refund: str

    def apply(self, entry: Entry | None) -> tuple[Entry | None, Entry | None]:
        """Return the entry."""
        return entry, entry
