"""Operations on one journal entry: begin, resend, finish, acted, decide, release, find.

They do no I/O, and are the same for every journal. An operation gets the stored entry of its refund, or None, and
whether the journal records final refunds as FINAL until ``on_refund`` has returned. It returns the entry to store: the
same object if nothing changes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import uuid4

import attrs

from lianlian_async import wire
from lianlian_async.clock import Moment, elapsed
from lianlian_async.identity import check_request

from .base import Ending, Entry, Intent, JournalError, Standing, State, added, joined

E_co = TypeVar("E_co", bound=Entry | None, covariant=True)


@attrs.frozen
class Operation(Generic[E_co]):
    """An operation on the journal entry of one refund."""

    no_refund: str
    apply: Callable[[Entry | None, bool], E_co]
    """A :class:`Begin` or its ``take_back``, or a function of this module without its last two arguments."""


class Result(NamedTuple):
    """The outcome of an operation: the entry as stored, or the error to raise."""

    value: Any
    error: Exception | None = None


def perform(
    operations: Iterable[Operation[Any]], entries: dict[str, Entry], *, is_acting: bool = False
) -> list[Result]:
    """Apply ``operations`` in order to ``entries`` (in place). An operation that fails changes nothing."""
    results = []
    for operation in operations:
        try:
            entry = operation.apply(entries.get(operation.no_refund), is_acting)
        except Exception as error:  # noqa: BLE001 - raised in the operation's caller
            results.append(Result(None, error))
        else:
            results.append(Result(entry))
            if entry is not None:
                entries[operation.no_refund] = entry
    return results


@attrs.define
class Begin:
    """``Journal.begin``. Sets ``standing`` and ``found``, which the caller receives."""

    intent: Intent
    now: Moment
    holder: str = attrs.field(factory=lambda: uuid4().hex)
    """Identifies this call among the calls of all processes."""
    query_first: bool = attrs.field(default=False, kw_only=True)
    """Whether the journal may have lost an entry of this refund."""
    sent_at: Moment | None = attrs.field(default=None, kw_only=True)
    """Latest time at which a call whose entry was lost may have sent the refund; None: no such call, or grace over."""
    standing: Standing = attrs.field(default=Standing.NEW, init=False)
    found: Entry | None = attrs.field(default=None, init=False)
    is_taken_back: bool = attrs.field(default=False, init=False)
    """Whether the caller was cancelled: the operation then records nothing."""

    def postpone(self, boot: float) -> None:
        """Move ``now`` forward to the boot-clock reading ``boot``, but do not move the end of the lease."""
        seconds = boot - self.now.boot
        self.now, self.intent = self.now.after(seconds), attrs.evolve(self.intent, lease=self.intent.lease - seconds)

    def allow_for_restore(self, restored_at: Moment) -> None:
        """Set ``query_first`` and ``sent_at`` for a backup that was restored at ``restored_at``.

        The backup may lack any refund: neither ``dt_refund`` nor the wall clock proves when a refund was begun.
        """
        if self.intent.grace is not None:
            self.query_first, seconds = True, elapsed(restored_at, self.now)
            self.sent_at = restored_at if seconds is None or seconds < self.intent.grace else None

    def allow_for_failover(self, lost_at: datetime, now: datetime) -> None:
        """Set ``query_first`` and ``sent_at`` for a database that may have lost its latest entries at ``lost_at``.

        Until the grace ends, every refund is queried first, and counts as sent now if its ``dt_refund`` is before
        ``lost_at``. Later, a refund is queried first if its ``dt_refund`` is before the end of the grace.
        """
        if self.intent.grace is not None:
            until, dt_refund = lost_at + timedelta(seconds=self.intent.grace), self.intent.fields.get("dt_refund", "")
            self.query_first = now < until or dt_refund < wire.format_timestamp(until)
            is_sent = now < until and dt_refund < wire.format_timestamp(lost_at)
            self.sent_at = self.now if is_sent else None

    def __call__(self, entry: Entry | None, _is_acting: bool) -> Entry:
        """Take the lease, unless the outcome is known or another call has the lease."""
        if self.is_taken_back:
            raise JournalError(f"refund {self.intent.no_refund}: not begun, because its call was cancelled")
        if entry is None:
            return self._new(added("", self.now, "begun"))
        check_request(self.intent.no_refund, self.intent.fields, entry.fields)
        self.found = entry
        if entry.ending is not None:
            self.standing = Standing.FINISHED
        elif entry.sent_at is None:
            # No attempt can have made the refund, so store this call's body: the signing key may have changed since.
            return self._new(added(entry.history, self.now, "lease"))
        elif _is_leased(entry, self.now):
            self.standing = Standing.LEASED
        else:
            self.standing = Standing.UNRESOLVED
            self.found = attrs.evolve(
                entry,
                sent_at=measurable(entry.sent_at, self.now),  # the lease is over, so earlier calls send nothing more
                holder=self.holder,
                leased_until=self.now.after(self.intent.lease),
                history=added(entry.history, self.now, "lease"),
            )
        return self.found

    def _new(self, history: str) -> Entry:
        """Return the entry with the end of the lease as ``sent_at``: the caller may send until then, and then crash."""
        self.standing = Standing.QUERY_FIRST if self.query_first else Standing.NEW
        self.found = Entry(
            no_refund=self.intent.no_refund,
            fields=self.intent.fields,
            body=self.intent.body,
            sent_at=self.sent_at,
            holder=self.holder,
            leased_until=self.now.after(self.intent.lease),
            history=history,
        )
        return attrs.evolve(self.found, sent_at=self.found.leased_until)

    def take_back(self, entry: Entry | None, is_acting: bool) -> Entry | None:
        """End the lease that a cancelled caller took. If this ``Begin`` is still in the queue, make it fail."""
        self.is_taken_back = True
        if self.found is None or self.found.holder != self.holder:
            return entry
        return release(self.found, self.found.sent_at, self.found.refused, "", entry, is_acting)


def _is_leased(entry: Entry, now: Moment) -> bool:
    return entry.holder is not None and entry.leased_until is not None and _is_ahead(entry.leased_until, now)


def _is_ahead(moment: Moment, now: Moment) -> bool:
    """Return whether ``moment`` is later than ``now``, by the boot clock or, across boots, by the wall clock."""
    return moment.boot > now.boot if moment.timeline == now.timeline else moment.wall > now.wall


def measurable(moment: Moment, now: Moment) -> Moment:
    """Return ``moment``; return ``now`` if it is earlier, or if no clock can measure the time since ``moment``."""
    is_comparable = moment.timeline == now.timeline or moment.gateway is not None
    return moment if is_comparable and not _is_ahead(moment, now) else now


def resend(leased: Entry, history: str, entry: Entry | None, _is_acting: bool) -> Entry:
    """``Journal.resend``: store that ``leased`` may be sent until its lease ends."""
    if entry is not None and (entry.holder != leased.holder or entry.ending is not None):
        raise JournalError(
            f"refund {leased.no_refund}: another call or worker has taken its lease or resolved it; query it later"
        )
    history = joined(entry.history if entry else "", history)
    return attrs.evolve(leased, sent_at=leased.leased_until, refused=None, history=history)


def finish(leased: Entry, ending: Ending, history: str, entry: Entry | None, is_acting: bool) -> Entry:
    """``Journal.finish``: store the first outcome, or the final outcome that replaces ACCEPTED."""
    entry = entry or leased  # a failover may have lost the row
    if entry.ending is None or (entry.state is State.ACCEPTED and ending.state in (State.FINAL, State.DONE)):
        return _ended(entry, ending, joined(entry.history, history), is_acting=is_acting)
    return entry


def _ended(entry: Entry, ending: Ending, history: str, *, is_acting: bool) -> Entry:
    if is_acting and ending.state is State.DONE:
        ending = Ending(state=State.FINAL, record=ending.record)
    return attrs.evolve(entry, body=b"", refused=None, ending=ending, holder=None, leased_until=None, history=history)


def decide(no_refund: str, ending: Ending, now: Moment, entry: Entry | None, is_acting: bool) -> Entry:
    """``Journal.decide``: store the decision. Its record keeps an earlier record as ``recorded``, in JSON."""
    refusal = None
    if entry is None:
        refusal = "it is not in this journal"
    elif _is_leased(entry, now):
        refusal = "another call or worker has its lease and may be sending it: decide when that call has ended"
    elif entry.state in (State.FINAL, State.DONE):
        refusal = "its outcome is final already"
    elif entry.state is State.REJECTED and ending.state is State.REJECTED:
        refusal = "it is rejected already"
    elif entry.ending and (entry.ending.record.get("verified") == "yes" or "evidence" in entry.ending.record):
        refusal = "the gateway signed its rejection, or its outcome was decided already"
    if refusal is not None or entry is None:
        raise JournalError(f"refund {no_refund}: {refusal}; nothing was changed")
    record = dict(ending.record)
    if entry.ending is not None:
        record["recorded"] = json.dumps(dict(entry.ending.record), ensure_ascii=False)
    decided = Ending(state=ending.state, record=record)
    return _ended(entry, decided, added(entry.history, now, "decided"), is_acting=is_acting)


def acted(now: Moment, entry: Entry | None, _is_acting: bool) -> Entry | None:
    """``Journal.acted``: store a FINAL entry as DONE."""
    if entry is None or entry.ending is None or entry.state is not State.FINAL:
        return entry
    ending = attrs.evolve(entry.ending, state=State.DONE)
    return attrs.evolve(entry, ending=ending, history=added(entry.history, now, "acted"))


def release(
    leased: Entry,
    sent_at: Moment | None,
    refused: Mapping[str, str] | None,
    history: str,
    entry: Entry | None,
    _is_acting: bool,
) -> Entry | None:
    """``Journal.release``: store the entry without its lease; if another call has resolved it, with its history only.

    If a failover has lost the entry, store it again if the refund may have been sent.
    """
    if entry is None and sent_at is not None:
        entry = leased
    if entry is None:
        return None
    history = joined(entry.history, history)
    if entry.ending is not None and history != entry.history:
        return attrs.evolve(entry, history=history)
    if entry.holder is None or entry.holder != leased.holder:
        return entry
    return attrs.evolve(entry, sent_at=sent_at, refused=refused, holder=None, leased_until=None, history=history)


def find(entry: Entry | None, _is_acting: bool) -> Entry | None:
    """``Journal.find``."""
    return entry
