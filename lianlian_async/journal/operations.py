"""How an entry moves: begun, sent again, resolved, acted on, released, taken back.

Pure: the same rules for every journal. An operation is given the entry of its refund as it stands, or None; it gives
its answer and the entry as it has to stand afterwards: the same object, if nothing changes. What every refund goes
through makes its entries from scratch: ``attrs.evolve`` takes three times as long.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

import attrs

from lianlian_async.clock import Moment
from lianlian_async.errors import RefundConflict
from lianlian_async.identity import difference

from .base import Ending, Entry, Intent, JournalError, Standing, State

__all__ = ["Acted", "Begin", "Finish", "Look", "Operation", "Release", "Resend", "Result", "TakeBack", "perform"]

T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """Something that is done to one refund."""

    @property
    def no_refund(self) -> str:
        """Which refund."""

    def apply(self, entry: Entry | None) -> tuple[T_co, Entry | None]:
        """The answer, and the entry as it then stands. Raises what the journal's caller is told."""


class Result(NamedTuple):
    """What one operation comes to: a value, or the error that is raised."""

    value: Any
    error: Exception | None = None
    later: Callable[[], Awaitable[Result]] | None = None
    """Waits for the answer of an operation that has to wait apart from its batch."""


def perform(
    operations: Iterable[Operation[Any]], entries: dict[str, Entry], *, is_acting: bool = False
) -> list[Result]:
    """Do ``operations`` in order to ``entries`` (in place). One that fails does so alone, and changes nothing.

    ``is_acting``: whether acting on final refunds has begun.
    """
    answers = []
    for operation in operations:
        if isinstance(operation, Finish):
            operation.is_acting = is_acting
        try:
            value, entry = operation.apply(entries.get(operation.no_refund))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            answers.append(Result(None, error))
        else:
            answers.append(Result(value))
            if entry is not None:
                entries[operation.no_refund] = entry
    return answers


@attrs.define
class Begin:
    """``Journal.begin``."""

    intent: Intent
    now: Moment
    holder: str = attrs.field(factory=lambda: uuid4().hex)
    """Of this call only, over all processes."""
    ask_first: bool = attrs.field(default=False, kw_only=True)
    """Whether the journal may have lost its last commits."""
    found: Entry | None = attrs.field(default=None, init=False)
    """The entry that the caller was given the lease of."""
    is_taken_back: bool = attrs.field(default=False, init=False)
    """Whether its caller is gone, so that it has to do nothing any more."""

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.intent.no_refund

    def postpone(self, boot: float) -> None:
        """Judge by a later reading of the boot clock; the lease ends when it would have ended."""
        seconds = boot - self.now.boot
        self.now, self.intent = self.now.after(seconds), attrs.evolve(self.intent, lease=self.intent.lease - seconds)

    def apply(self, entry: Entry | None) -> tuple[tuple[Standing, Entry], Entry]:
        """What was found; the caller has the lease if it is NEW, ASK_FIRST or UNRESOLVED."""
        intent = self.intent
        if self.is_taken_back:
            raise JournalError(f"refund {self.no_refund}: the call that would have begun it is gone")
        if entry is None:
            return self._new()
        if entry.digest != intent.digest:
            raise _conflict(intent, entry)
        if entry.ending is not None:
            return (Standing.FINISHED, entry), entry
        if entry.sent_at is None:
            # Nothing of the earlier call was ever sent: what this one signed, maybe with another key, stands.
            return self._new()
        if entry.holder is not None and entry.leased_until is not None and _is_ahead(entry.leased_until, self.now):
            return (Standing.LEASED, entry), entry
        return self._unresolved(entry, entry.sent_at)

    def _new(self) -> tuple[tuple[Standing, Entry], Entry]:
        """On record it may be sent until the lease ends, come what may."""
        leased_until = self.now.after(self.intent.lease)
        self.found = self._entry(self.intent, sent_at=None, refused=None, leased_until=leased_until)
        standing = Standing.ASK_FIRST if self.ask_first else Standing.NEW
        return (standing, self.found), self._entry(
            self.intent, sent_at=leased_until, refused=None, leased_until=leased_until
        )

    def _unresolved(self, entry: Entry, sent_at: Moment) -> tuple[tuple[Standing, Entry], Entry]:
        """What nobody sends any more counts as sent until now at the latest, or at this moment if no clock can tell."""
        if _is_ahead(sent_at, self.now) or not _is_comparable(sent_at, self.now):
            sent_at = self.now
        self.found = self._entry(
            entry, sent_at=sent_at, refused=entry.refused, leased_until=self.now.after(self.intent.lease)
        )
        return (Standing.UNRESOLVED, self.found), self.found

    def _entry(
        self, begun: Intent | Entry, *, sent_at: Moment | None, refused: Mapping[str, str] | None, leased_until: Moment
    ) -> Entry:
        return Entry(
            no_refund=begun.no_refund,
            digest=begun.digest,
            fields=begun.fields,
            body=begun.body,
            sent_at=sent_at,
            refused=refused,
            holder=self.holder,
            leased_until=leased_until,
        )


def _is_ahead(moment: Moment, now: Moment) -> bool:
    """Whether ``moment`` is still to come, on the same boot clock or on another machine's wall clock."""
    return moment.boot > now.boot if moment.timeline == now.timeline else moment.wall > now.wall


def _is_comparable(moment: Moment, now: Moment) -> bool:
    """Whether some clock will tell the time since ``moment``, once the gateway has told its own."""
    return moment.timeline == now.timeline or moment.gateway is not None


@attrs.frozen
class Resend:
    """``Journal.resend``."""

    leased: Entry

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.leased.no_refund

    def apply(self, entry: Entry | None) -> tuple[None, Entry]:
        """The entry as one that may be sent until its lease ends."""
        if entry is not None and (entry.holder != self.leased.holder or entry.ending is not None):
            raise JournalError(f"refund {self.no_refund}: another call or worker has taken the lease; ask again later")
        return None, attrs.evolve(self.leased, sent_at=self.leased.leased_until, refused=None)


@attrs.define
class Finish:
    """``Journal.finish``."""

    leased: Entry
    ending: Ending
    is_acting: bool = attrs.field(default=False, kw_only=True)
    """Whether acting on final refunds has begun."""

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.leased.no_refund

    def apply(self, entry: Entry | None) -> tuple[Entry, Entry]:
        """The entry with its first ending, or with the final one that followed an ACCEPTED."""
        entry = entry or self.leased  # what a failover lost is written again
        ending = self.ending
        if self.is_acting and ending.state is State.DONE:
            ending = Ending(state=State.FINAL, record=ending.record)
        if entry.ending is None or (entry.state is State.ACCEPTED and ending.state in (State.FINAL, State.DONE)):
            entry = Entry(
                no_refund=entry.no_refund,
                digest=entry.digest,
                fields=entry.fields,
                body=b"",
                sent_at=entry.sent_at,
                ending=ending,
            )
        return entry, entry


@attrs.frozen
class Acted:
    """``Journal.acted``."""

    no_refund: str

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """The entry as DONE, if it is FINAL."""
        if entry is not None and entry.ending is not None and entry.state is State.FINAL:
            entry = attrs.evolve(entry, ending=attrs.evolve(entry.ending, state=State.DONE))
        return None, entry


@attrs.frozen
class Release:
    """``Journal.release``."""

    leased: Entry
    sent_at: Moment | None
    refused: Mapping[str, str] | None = None

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.leased.no_refund

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """The entry without its holder; one that may have been sent is written again if a failover lost it."""
        if entry is None and self.sent_at is not None:
            entry = self.leased
        if entry is None or entry.holder is None or entry.holder != self.leased.holder:
            return None, entry
        return None, attrs.evolve(entry, sent_at=self.sent_at, refused=self.refused, holder=None, leased_until=None)


@attrs.frozen
class TakeBack:
    """What follows a :class:`Begin` whose caller was cancelled: nobody will send, so it is as it was before."""

    begin: Begin

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.begin.no_refund

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """The entry without its holder; if it is carried out first, the :class:`Begin` does nothing later."""
        found, self.begin.is_taken_back = self.begin.found, True
        return (None, entry) if found is None else Release(found, found.sent_at, found.refused).apply(entry)


@attrs.frozen
class Look:
    """``Journal.find``."""

    no_refund: str

    def apply(self, entry: Entry | None) -> tuple[Entry | None, Entry | None]:
        """The entry."""
        return entry, entry


def _conflict(intent: Intent, entry: Entry) -> RefundConflict:
    """Names the first field in which the two differ; ``digest``, if they differ in nothing that can be shown."""
    ours: dict[str, str] = {**intent.fields, "digest": intent.digest}
    theirs: dict[str, str] = {**entry.fields, "digest": entry.digest}
    field = difference(intent.fields, entry.fields) or "digest"
    return RefundConflict(
        intent.no_refund, field=field, ours=ours.get(field, "nothing"), theirs=theirs.get(field, "nothing")
    )
