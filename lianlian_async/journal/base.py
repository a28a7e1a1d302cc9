"""The journal protocol: a durable record of every refund that was begun, and of its outcome.

A refund is recorded before its first byte is sent. After a crash the journal lists the refunds that must be queried
(:meth:`Journal.pending`). The steps of one call::

    begin ──► NEW ────────────────► send ──► finish (made, rejected, conflict)
         ├───► ASK_FIRST ► query ──► send ──► finish
         ├───► UNRESOLVED ► query ──► (resend, send) ──► finish
         │         ▲                   └──────► release (unknown: may have arrived; or certainly not sent)
         │         └─────────────────────────────┘
         ├───► FINISHED: return the recorded outcome, send nothing
         └───► LEASED: another call or worker has the lease; call begin again later

Cancellation is safe. ``finish`` and ``release`` are recorded even if the caller is cancelled meanwhile; a ``begin``
whose caller is cancelled is rolled back.

A journal belongs to one merchant and one apply endpoint (:meth:`Journal.bind`), so that a refund made in the sandbox is
never taken for a production refund.
"""

from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self, TypeVar

import attrs

from lianlian_async.clock import Moment
from lianlian_async.errors import ConfigurationError, JournalError

__all__ = ["Ending", "Entry", "Fact", "Intent", "Journal", "JournalError", "Owner", "Standing", "State"]

T = TypeVar("T")

MOST_FACTS: Final = 9
"""Maximum number of facts of a refund: the first three and the latest six are kept."""


class State(StrEnum):
    """The state of a refund in the journal.

    It changes only from UNRESOLVED to any other state, from ACCEPTED to FINAL or DONE, from FINAL to DONE, and when a
    person decides (:meth:`Journal.decide`).
    """

    UNRESOLVED = "unresolved"
    """The refund was begun; whether it was made is not known."""
    ACCEPTED = "accepted"
    """Made: the gateway has accepted it, but ``sta_refund`` can still change."""
    FINAL = "final"
    """Made and final, but ``on_refund`` has not returned for it yet (:meth:`Journal.begin_acting`)."""
    DONE = "done"
    """Made and final; nothing is left to do."""
    REJECTED = "rejected"
    """The gateway rejected it permanently."""
    CONFLICT = "conflict"
    """The gateway reported another refund under this number: nothing is sent or queried until a person decides."""

    @property
    def is_finished(self) -> bool:
        """Whether the outcome is known."""
        return self is not State.UNRESOLVED

    @property
    def is_made(self) -> bool:
        """Whether the refund was made, by the gateway's answer, a statement or a person's decision."""
        return self in (State.ACCEPTED, State.FINAL, State.DONE)


class Standing(StrEnum):
    """The result of :meth:`Journal.begin`."""

    NEW = "new"
    ASK_FIRST = "ask first"
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
    """The ``ret_code`` or the ``sta_refund``, or the reason why there is none."""


def facts(history: str) -> list[Fact]:
    """Return the facts of an :attr:`Entry.history`."""
    rows = (line.split(" ", 3) for line in history.splitlines())
    return [Fact(int(at), int(times), what, result) for at, times, what, result in rows]


def added(history: str, now: Moment, what: str, result: str = "") -> str:
    """Return ``history`` with one more fact; ``result`` is shortened to 32 characters."""
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
    """Return the ``steps`` from schema ``version`` to ``newest``; raises :class:`JournalError` if one is missing."""
    if version > newest or not steps.keys() >= set(range(version, newest)):
        raise JournalError(
            f"journal {journal}: schema version {version}, but this release needs {newest}; "
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
    """A refund that its caller is about to send."""

    no_refund: str
    fields: Mapping[str, str]
    """The request in wire form (``RefundRequest.to_dict``). For one ``no_refund`` only ``notify_url`` may change."""
    body: bytes
    """The exact signed bytes to send."""
    lease: float
    """Length of the lease in seconds: until it ends, only this caller may send."""
    grace: float | None
    """``RetryPolicy.not_found_grace`` of the call; None in an inbox, which sends nothing."""


@attrs.frozen(kw_only=True)
class Ending:
    """A known outcome."""

    state: State = attrs.field(validator=attrs.validators.not_(attrs.validators.in_([State.UNRESOLVED])))
    record: Mapping[str, str]
    """``Refund.to_dict()``, or the fields of the rejection. The key ``evidence`` without the key ``sign``: the outcome
    comes from a statement or from a person's decision, and not from the gateway."""


@attrs.frozen(kw_only=True)
class Entry:
    """One refund in the journal."""

    no_refund: str
    fields: Mapping[str, str]
    body: bytes
    """The signed bytes to send, or to send again; empty once the outcome is known."""
    sent_at: Moment | None
    """Upper bound for the time at which the gateway may have received an attempt. While the lease holder may send, this
    is the end of the lease. None: the gateway received nothing."""
    refused: Mapping[str, str] | None = None
    """The gateway's rejection (``ret_code``, ``ret_msg``, ``verified``), set only if every attempt so far was rejected.
    None: there was no attempt, or an attempt may have succeeded."""
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


class Journal(Protocol):
    """A journal, opened by ``async with``. All methods raise :class:`JournalError` if the journal fails."""

    async def __aenter__(self) -> Self:
        """Open it."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
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
        """Record the owner: merchant and apply endpoint.

        Raises ``ConfigurationError`` if the journal has another owner.
        """

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        """Record ``intent`` durably and take the refund's lease, before anything is sent.

        NEW: the journal has no entry, or the refund was certainly not sent; send it. ASK_FIRST: as NEW, but query
        first. UNRESOLVED: an earlier call began the refund; query first, and send only the entry's own body, after
        :meth:`resend`. FINISHED: use the entry's ending. LEASED: another call has the lease; the entry is as stored.
        The entry's ``sent_at`` is None after NEW, and never later than ``now`` after UNRESOLVED. After ASK_FIRST it is
        None, or ``now`` if the journal is a restored backup and a lost call may have sent the refund minutes ago.

        After NEW, ASK_FIRST and UNRESOLVED, the caller has to call :meth:`finish` or :meth:`release`.
        Raises ``RefundConflict`` if the journal has the number with other fields.
        """

    async def resend(self, entry: Entry, history: str = "") -> None:
        """Record that ``entry``, as returned by :meth:`begin`, may be sent again until its lease ends.

        ``history``, here and in :meth:`finish` and :meth:`release`: the entry's history with the facts of this call.
        Raises :class:`JournalError` if another call has taken the lease or resolved the refund.
        """

    async def finish(self, entry: Entry, ending: Ending, history: str = "") -> Entry:
        """Record the outcome of ``entry``, end its lease, and return the entry as stored.

        The first outcome wins; only ACCEPTED may become FINAL or DONE later. Idempotent. An entry that the journal has
        lost is written again. After :meth:`begin_acting`, a DONE ending is recorded as FINAL until :meth:`acted`.
        """

    async def begin_acting(self) -> None:
        """Switch the journal permanently, for all processes: record a final refund as FINAL until :meth:`acted`.

        To act on a refund means to call ``on_refund``. Refunds that are DONE stay DONE. Without this call, no refund
        becomes FINAL.
        """

    async def acted(self, no_refund: str, now: Moment) -> None:
        """Record that ``on_refund`` has returned: FINAL becomes DONE; every other state stays as it is."""

    async def release(
        self, entry: Entry, sent_at: Moment | None, refused: Mapping[str, str] | None = None, history: str = ""
    ) -> None:
        """End the lease of ``entry``, as returned by :meth:`begin`, and leave the refund unresolved.

        ``sent_at`` and ``refused`` (see :class:`Entry`) cover the attempts of this call and of earlier ones. If
        ``sent_at`` is None, the next :meth:`begin` returns NEW or ASK_FIRST. Does nothing if another call has taken the
        lease; if another call has resolved the refund, only adds the history.
        """

    async def decide(self, no_refund: str, ending: Ending, now: Moment) -> Entry:
        """Record the outcome that a person has decided, DONE or REJECTED, as :meth:`finish` does.

        Raises :class:`JournalError` if the refund has no entry or is leased; if its outcome is final, a rejection that
        the gateway signed, or decided already; or if both the recorded state and ``ending`` are REJECTED.
        """

    async def canaries(self) -> list[Entry]:
        """Return a sample, of all ages, of the entries whose :attr:`~Entry.is_canary` is true, newest first."""

    def pending(self) -> AsyncIterator[Entry]:
        """Yield every UNRESOLVED, ACCEPTED or FINAL entry, oldest first, in bounded memory.

        Leaves out entries that are added during the iteration.
        """

    def entries(self) -> AsyncIterator[Entry]:
        """Yield every entry as :meth:`pending` does, whatever its state."""

    async def find(self, no_refund: str) -> Entry | None:
        """Return the entry of one refund."""

    async def counts(self) -> Mapping[State, int]:
        """Return the number of refunds in each state."""

    async def inbox(self) -> "Journal":
        """Return the inbox: a second journal, which contains the final refunds to act on.

        The first call opens it, and it closes with this journal. Its entries are UNRESOLVED until ``on_refund`` has
        returned for them, then DONE.
        """
