"""How an entry moves: begun, settled, released, taken back. Pure: the same rules for every journal.

An operation is given the entry of its refund as it stands, or None; it gives its answer and the entry as it
has to stand afterwards: the same object, if nothing changes. What every refund goes through makes its entries
from scratch: ``attrs.evolve`` takes three times as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

import attrs

from lianlian_async.errors import RefundConflict

from .base import Ending, Entry, Intent, JournalError, Standing, State

__all__ = ["Answer", "Begin", "Look", "Operation", "Release", "Settle", "TakeBack", "perform"]

T_co = TypeVar("T_co", covariant=True)


class Operation(Protocol[T_co]):
    """Something that is done to one refund."""

    @property
    def no_refund(self) -> str:
        """Which refund."""

    def apply(self, entry: Entry | None) -> tuple[T_co, Entry | None]:
        """The answer, and the entry as it then stands. Raises what the journal's caller is told."""


class Answer(NamedTuple):
    """What one operation comes to: a value, or the error that is raised."""

    value: Any
    error: Exception | None = None


def perform(operations: Iterable[Operation[Any]], entries: dict[str, Entry]) -> list[Answer]:
    """Do ``operations`` in order to ``entries`` (in place). One that fails does so alone, and changes nothing."""
    answers = []
    for operation in operations:
        try:
            value, entry = operation.apply(entries.get(operation.no_refund))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is awaited
            answers.append(Answer(None, error))
        else:
            answers.append(Answer(value))
            if entry is not None:
                entries[operation.no_refund] = entry
    return answers


@attrs.define
class Begin:
    """``Journal.intend``."""

    intent: Intent
    now: datetime
    holder: str = attrs.field(factory=lambda: uuid4().hex)
    """Of this call only, over all processes."""
    found: Entry | None = attrs.field(default=None, init=False)
    """The entry that the caller was given to hold."""

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.intent.no_refund

    def apply(self, entry: Entry | None) -> tuple[tuple[Standing, Entry], Entry]:
        """What was found; the caller holds the entry if it is NEW or UNSETTLED."""
        intent = self.intent
        if entry is None:
            return self._hold(Standing.NEW, None)
        if entry.digest != intent.digest:
            raise _conflict(intent, entry)
        if entry.ending is not None:
            return (Standing.SETTLED, entry), entry
        if entry.sent_at is None:
            # Nothing of the earlier call was ever sent: what this one signed, maybe with another key, stands.
            return self._hold(Standing.NEW, None)
        if entry.holder is not None and entry.sent_at > self.now:
            return (Standing.HELD, entry), entry
        return self._hold(Standing.UNSETTLED, entry)

    def begun(self) -> Entry:
        """The refund as long as nothing was sent."""
        return self._entry(self.intent, sent_at=None, holder=None)

    def _hold(self, standing: Standing, earlier: Entry | None) -> tuple[tuple[Standing, Entry], Entry]:
        """What stays of ``earlier``, for the caller; on record it may be sent until the hold ends, come what may."""
        sent_at = None if earlier is None or earlier.sent_at is None else min(earlier.sent_at, self.now)
        begun = self.intent if earlier is None else earlier
        self.found = self._entry(begun, sent_at=sent_at, holder=self.holder)
        return (standing, self.found), self._entry(begun, sent_at=self.intent.held_until, holder=self.holder)

    @staticmethod
    def _entry(begun: Intent | Entry, *, sent_at: datetime | None, holder: str | None) -> Entry:
        return Entry(
            no_refund=begun.no_refund,
            digest=begun.digest,
            fields=begun.fields,
            body=begun.body,
            sent_at=sent_at,
            holder=holder,
        )


@attrs.frozen
class Settle:
    """``Journal.settle``."""

    no_refund: str
    ending: Ending

    def apply(self, entry: Entry | None) -> tuple[Entry, Entry]:
        """The entry with its first ending, or with the final one that followed an ACCEPTED."""
        if entry is None:
            raise JournalError(f"refund {self.no_refund} is not in the journal: it cannot be settled there")
        state = self.ending.state
        if entry.ending is None or (entry.state, state) == (State.ACCEPTED, State.DONE):
            entry = Entry(
                no_refund=entry.no_refund,
                digest=entry.digest,
                fields=entry.fields,
                body=b"",
                sent_at=entry.sent_at,
                ending=self.ending,
            )
        return entry, entry


@attrs.frozen
class Release:
    """``Journal.release``."""

    held: Entry
    sent_at: datetime | None

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.held.no_refund

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """The entry without its holder."""
        if entry is None or entry.holder is None or entry.holder != self.held.holder:
            return None, entry
        return None, attrs.evolve(entry, sent_at=self.sent_at, holder=None)


@attrs.frozen
class TakeBack:
    """What follows a :class:`Begin` whose caller was cancelled: nobody will send, so it is as it was before."""

    begin: Begin

    @property
    def no_refund(self) -> str:
        """Which refund."""
        return self.begin.no_refund

    def apply(self, entry: Entry | None) -> tuple[None, Entry | None]:
        """The entry without its holder."""
        found = self.begin.found
        return (None, entry) if found is None else Release(found, found.sent_at).apply(entry)


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
    field = next(name for name in (*intent.fields, *entry.fields, "digest") if ours.get(name) != theirs.get(name))
    return RefundConflict(
        intent.no_refund, field=field, ours=ours.get(field, "nothing"), theirs=theirs.get(field, "nothing")
    )
