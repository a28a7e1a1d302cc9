"""The values of a journal: states, entries and their histories."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple, Self, TypeVar

import attrs

from lianlian_async.clock import Moment
from lianlian_async.errors import ConfigurationError, JournalError

__all__ = ["Ending", "Entry", "Fact", "Intent", "JournalError", "Owner", "Standing", "State"]

T = TypeVar("T")

MOST_FACTS: Final = 9
"""Maximum number of facts of a refund: the first three and the latest six are kept."""


class State(StrEnum):
    """The state of a refund in the journal.

    It changes only from UNRESOLVED to any other state, from ACCEPTED to FINAL or DONE, from FINAL to DONE, and when a
    person decides (:meth:`.Journal.decide`).
    """

    UNRESOLVED = "unresolved"
    """The refund was begun, and no outcome is recorded."""
    ACCEPTED = "accepted"
    """Made: the gateway has accepted it, but ``sta_refund`` can still change."""
    FINAL = "final"
    """Made and final, but no return of ``on_refund`` is recorded yet (:meth:`.Journal.begin_acting`)."""
    DONE = "done"
    """Made and final; nothing is left to do."""
    REJECTED = "rejected"
    """Not made: the gateway rejected it permanently, or a person decided so."""
    CONFLICT = "conflict"
    """The gateway reported another refund under this number: nothing is done automatically until a person decides."""

    @property
    def is_made(self) -> bool:
        """Whether the refund was made, according to the gateway, a statement or a person. It may have failed later."""
        return self in (State.ACCEPTED, State.FINAL, State.DONE)


class Standing(StrEnum):
    """The result of :meth:`.Journal.begin`."""

    NEW = "new"
    QUERY_FIRST = "query first"
    """As NEW, but the journal may have lost an entry of this refund: query before sending."""
    UNRESOLVED = "unresolved"
    FINISHED = "finished"
    LEASED = "leased"


class Fact(NamedTuple):
    """One event of a refund, or equal events in a row. Facts are for people: the library does not decide by them."""

    at: int
    """When the last of these events occurred, in seconds since 1970 by the wall clock."""
    times: int
    """The number of these events."""
    what: str
    """*begun*, *lease*, *apply*, *resend*, *query*, *notification*, *statement*, *acted* or *decided*."""
    result: str
    """The ``ret_code``, the ``sta_refund``, or the reason why there is neither; empty if there was no exchange."""


def facts(history: str) -> list[Fact]:
    """Return the facts of an :attr:`Entry.history`."""
    rows = (line.split(" ", 3) for line in history.splitlines())
    return [Fact(int(at), int(times), what, result) for at, times, what, result in rows]


def added(history: str, now: Moment, what: str, result: str = "") -> str:
    """Return ``history`` with one more event; ``result`` is shortened to 32 characters."""
    event = f"{what} {' '.join(result[:32].split())}\n"
    lines = history.splitlines(keepends=True)
    times = 1
    if lines and lines[-1].endswith(f" {event}"):
        times += int(lines.pop().split(" ", 2)[1])
    return _bounded([*lines, f"{now.wall.timestamp():.0f} {times} {event}"])


def joined(stored: str, other: str) -> str:
    """Return the history ``stored`` with those facts of the history ``other`` that it lacks."""
    if other.startswith(stored):
        return other
    known = stored.splitlines(keepends=True)
    return _bounded([*known, *(line for line in other.splitlines(keepends=True) if line not in known)])


def _bounded(lines: list[str]) -> str:
    return "".join(lines if len(lines) <= MOST_FACTS else (*lines[:3], *lines[-6:]))


def upgrade_steps(journal: str, version: int, newest: int, steps: Mapping[int, T]) -> list[T]:
    """Return the ``steps`` from schema ``version`` to ``newest``; raises :class:`JournalError` if there is no way."""
    if version > newest:
        raise JournalError(
            f"journal {journal} has schema version {version}, and this release supports {newest} at most; install the "
            "release that upgraded it, or a later one"
        )
    if not steps.keys() >= set(range(version, newest)):
        raise JournalError(
            f"journal {journal} has schema version {version}, but this release needs {newest}; "
            "resolve its open refunds with the release that created it"
        )
    return [steps[number] for number in range(version, newest)]


@attrs.frozen
class Owner:
    """The merchant and the apply endpoint that a journal belongs to."""

    oid_partner: str
    apply_url: str

    def confirm(self, recorded: "Owner | None", journal: str) -> Self:
        """Return this owner if ``recorded`` is the same or None; else raise ``ConfigurationError``."""
        if recorded not in (None, self):
            raise ConfigurationError(
                f"journal {journal} belongs to merchant {recorded.oid_partner} at {recorded.apply_url}, this session "
                f"to {self.oid_partner} at {self.apply_url}: use another journal for this session"
            )
        return self


@attrs.frozen(kw_only=True)
class Intent:
    """A refund that its caller is about to send; in an inbox, to act on."""

    no_refund: str
    fields: Mapping[str, str]
    """The request in wire form (``RefundRequest.to_dict``). For one ``no_refund`` only ``notify_url`` may change."""
    body: bytes
    """The exact signed bytes to send; in an inbox, the refund as JSON."""
    lease: float
    """Length of the lease in seconds: until it ends, only this caller may send."""
    grace: float | None
    """``RetryPolicy.not_found_grace`` of the call; None in an inbox, which sends nothing."""


@attrs.frozen(kw_only=True)
class Ending:
    """A known outcome."""

    state: State = attrs.field(validator=attrs.validators.not_(attrs.validators.in_([State.UNRESOLVED])))
    record: Mapping[str, str]
    """``Refund.to_dict()`` (in a conflict, of the other refund), or the fields of the rejection. The key ``evidence``
    without the key ``sign``: the outcome comes from a statement or from a person's decision, not from the gateway."""


@attrs.frozen(kw_only=True)
class Entry:
    """One refund in the journal."""

    no_refund: str
    fields: Mapping[str, str]
    body: bytes
    """The signed bytes to send, or to send again; empty once the outcome is known."""
    sent_at: Moment | None
    """Upper bound for the time at which an attempt that may have made the refund was sent. While the lease holder may
    send, this is the end of the lease. None: there was no such attempt."""
    refused: Mapping[str, str] | None = None
    """The gateway's last answer *duplicate* or *in progress* (``ret_code``, ``ret_msg``, ``verified``). None: no such
    answer, or an attempt may have succeeded."""
    ending: Ending | None = None
    """The outcome; None while the refund is unresolved."""
    holder: str | None = attrs.field(default=None, repr=False)
    """Identifies the call that has the lease."""
    leased_until: Moment | None = attrs.field(default=None, repr=False)
    """The end of the lease."""
    history: str = attrs.field(default="", repr=False)
    """The facts about the refund, one in each line; see :func:`facts`."""

    @property
    def state(self) -> State:
        """The refund's state."""
        return State.UNRESOLVED if self.ending is None else self.ending.state

    @property
    def is_canary(self) -> bool:
        """Whether the gateway itself has said that the refund was made: then its query service must find the refund."""
        return self.ending is not None and self.state.is_made and "evidence" not in self.ending.record
