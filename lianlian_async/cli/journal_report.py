"""The state of a journal and its queue, as ``lianlian journal`` and ``lianlian worker`` show it."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from math import ceil
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import attrs
from rich.table import Table

from lianlian_async.journal import Entry, State
from lianlian_async.retry import RetryPolicy
from lianlian_async.worker_pool import iterate

from .options import is_dsn, place_name
from .output import local_time, table, tables
from .stores import make_reader, read_queue

_LISTED: Final = 20
MEANING: Final = {
    State.UNRESOLVED: "begun; unknown whether it was made",
    State.ACCEPTED: "made; final state unknown",
    State.FINAL: "success or failed; on_refund has not returned",
    State.DONE: "success or failed",
    State.REJECTED: "rejected",
    State.CONFLICT: "its no_refund belongs to another refund: a person must decide",
}


class UnknownRefund(NamedTuple):
    """A refund that may have been made."""

    no_refund: str
    money_refund: str
    sent_at: str
    ask_again_at: str
    """The time from which the answer "no such record" can be believed, with the default grace."""


@attrs.define
class JournalReport:
    """The state of the journal at ``place``."""

    place: str
    states: Mapping[State, int]
    queue: dict[str, int] = attrs.field(factory=dict)
    """See ``RefundQueue.counts``; empty if there is no queue."""
    failures: Sequence[Mapping[str, str | None]] = ()
    """The oldest failures, from ``RefundQueue.failures``."""
    activity: Mapping[str, Any] = attrs.field(factory=dict)
    """See ``RefundQueue.activity``."""
    rate: float | None = None
    """Refunds finished per second; None if unknown."""
    read_at: float = attrs.field(factory=time.monotonic)
    unknown: int = 0
    """Unresolved refunds that may have been made."""
    not_sent: int = 0
    """Unresolved refunds that were certainly not made: they were never sent, or rejected for a temporary reason."""
    oldest: list[UnknownRefund] = attrs.field(factory=list)

    @property
    def finished(self) -> int:
        """The number of refunds with an outcome."""
        return sum(number for state, number in self.states.items() if state.is_finished)

    @property
    def eta(self) -> float | None:
        """Seconds until all due refunds are finished, if no more are queued; None if unknown, or if none is left."""
        left = sum(self.queue.get(name, 0) for name in ("waiting", "at_work"))
        return left / self.rate if left and self.rate else None

    def add(self, entry: Entry) -> None:
        """Count a pending entry if it is unresolved."""
        if entry.state is not State.UNRESOLVED:
            return
        if entry.sent_at is None:
            self.not_sent += 1
            return
        self.unknown += 1
        if len(self.oldest) < _LISTED:
            sent_at, grace = entry.sent_at.wall, timedelta(seconds=RetryPolicy().not_found_grace)
            moments = (local_time(sent_at), local_time(sent_at + grace))
            self.oldest.append(UnknownRefund(entry.no_refund, entry.fields["money_refund"], *moments))


async def read_journal(place: str, earlier: JournalReport | None = None) -> JournalReport:
    """Read the state of the journal at ``place``, and the rate since an ``earlier`` report."""
    async with make_reader(place) as reader:
        report = JournalReport(place, await reader.counts())
        if report.states[State.UNRESOLVED]:
            async with aclosing(iterate(reader.pending())) as entries:
                async for entry in entries:
                    report.add(entry)
    if is_dsn(place):
        report.queue, report.failures, report.activity = await read_queue(place)
    if earlier is not None and report.read_at > earlier.read_at:
        report.rate = (report.finished - earlier.finished) / (report.read_at - earlier.read_at)
    return report


def journal_views(
    report: JournalReport, reasons: Mapping[str, int] = MappingProxyType({}), **facts: int | None
) -> tuple[dict[str, Any], *tuple[Table, ...]]:
    """Return the report as a JSON document, and as tables for a terminal.

    ``reasons``: number of unknown outcomes by reason; ``facts``: more numbers.
    """
    name, failures, activity = place_name(report.place), report.failures, report.activity
    document = {
        "journal": name,
        "states": {str(state): number for state, number in report.states.items()},
        "unknown": report.unknown,
        "not_sent": report.not_sent,
        "oldest_unknown": [one._asdict() for one in report.oldest],
        "queue": report.queue,
        **({"refunds_per_second": report.rate, "eta_seconds": report.eta} if report.queue else {}),
        **activity,
        **({"failures": list(failures)} if failures else {}),
        **({"reasons": dict(reasons)} if reasons else {}),
        **facts,
    }
    states = [(state, report.states[state], meaning) for state, meaning in MEANING.items()]
    queue = {
        **report.queue,
        "finished_per_second": report.rate,
        "time_left": _duration(report.eta),
        "oldest_waits_for": _duration(activity.get("oldest_waiting_seconds")),
    }
    oldest = f"{report.unknown:,} may have been made" + (f"; the oldest {_LISTED}" if report.unknown > _LISTED else "")
    workers = [(one["id"], _duration(one["heartbeat_seconds"]), one["slices"]) for one in activity.get("workers", ())]
    causes = [(one["no_refund"] or "?", one["cause"] or "see the log of the worker") for one in failures]
    shown = [
        table(f"journal {name}", ("state", "refunds", "meaning"), states),
        *tables({"queue": queue if report.queue else {}, "queued again": _by_number(activity.get("queued_again"))}),
        table("workers", ("worker", "since last heartbeat", "slices"), workers),
        table(oldest, ("no_refund", "yuan", "last sent at", "query again at"), report.oldest),
        table("failed: a person must decide", ("no_refund", "cause"), causes),
        *tables({"unknown outcomes": _by_number(reasons)}),
        *tables({"refunds": {"certainly_not_made": report.not_sent or None, **facts}}),
    ]
    return document, *(drawn for drawn in shown if drawn.rows)


def journal_line(report: JournalReport) -> str:
    """Return the report as one line of text."""
    numbers = {"finished": report.finished, "unresolved": report.states[State.UNRESOLVED], **report.queue}
    words = [f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items()]
    words += [f"{report.rate:,.1f}/s"] if report.rate is not None else []
    words += [f"time left {_duration(report.eta)}"] if report.eta is not None else []
    return f"{local_time(datetime.now(UTC))}  {'  '.join(words)}"


def _by_number(reasons: Mapping[str, int] | None) -> dict[str, int]:
    return dict(Counter(reasons).most_common())


def _duration(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=ceil(seconds))
