"""The state of a journal and its queue, as ``lianlian journal`` and ``lianlian worker`` show it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from math import ceil
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import attrs
from rich.console import RenderableType

from lianlian_async.journal import Entry, State
from lianlian_async.retry import RetryPolicy
from lianlian_async.worker_pool import iterate

from .options import is_dsn, place_name
from .output import local_time, table
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
    report: JournalReport, reasons: Mapping[str, int] = MappingProxyType({}), **facts: int
) -> tuple[dict[str, Any], list[RenderableType]]:
    """Return the report as a JSON document, and as tables for a terminal.

    ``reasons``: number of unknown outcomes by reason; ``facts``: more numbers.
    """
    name, failures = place_name(report.place), report.failures
    document = {
        "journal": name,
        "states": {str(state): number for state, number in report.states.items()},
        "unknown": report.unknown,
        "not_sent": report.not_sent,
        "oldest_unknown": [one._asdict() for one in report.oldest],
        "queue": report.queue,
        **({"refunds_per_second": report.rate, "eta_seconds": report.eta} if report.queue else {}),
        **report.activity,
        **({"failures": list(failures)} if failures else {}),
        **({"reasons": dict(reasons)} if reasons else {}),
        **facts,
    }
    states = [(state, f"{report.states[state]:,}", meaning) for state, meaning in MEANING.items()]
    shown: list[RenderableType] = [table(f"journal {name}", ("state", "refunds", "meaning"), states)]
    if report.queue:
        shown += _queue_tables(report)
    if report.unknown:
        title = f"{report.unknown:,} may have been made"
        title += f"; the oldest {_LISTED}" if report.unknown > _LISTED else ""
        shown.append(table(title, ("no_refund", "yuan", "last sent at", "query again at"), report.oldest))
    if reasons:
        shown.append(table("unknown outcomes", ("reason", "times"), _by_number(reasons)))
    if failures:
        causes = [(one["no_refund"] or "?", one["cause"] or "see the log of the worker") for one in failures]
        shown.append(table("failed: a person must decide", ("no_refund", "cause"), causes))
    rest = {"certainly not made": report.not_sent, **facts}
    shown += [f"{name.replace('_', ' ')}: {number:,}" for name, number in rest.items() if number or name in facts]
    return document, shown


def _queue_tables(report: JournalReport) -> Iterator[RenderableType]:
    activity = report.activity
    rows = [(name.replace("_", " "), f"{number:,}") for name, number in report.queue.items()]
    rows += [("finished per second", f"{report.rate:,.1f}")] if report.rate is not None else []
    periods = {"time left": report.eta, "oldest waits for": activity["oldest_waiting_seconds"]}
    rows += [(name, _duration(seconds)) for name, seconds in periods.items() if seconds is not None]
    yield table("queue", ("refunds", "number"), rows)
    if again := activity["queued_again"]:
        yield table("queued again", ("reason", "refunds"), _by_number(again))
    if workers := activity["workers"]:
        cells = [(one["id"], _duration(one["heartbeat_seconds"]), one["slices"]) for one in workers]
        yield table("workers", ("worker", "since last heartbeat", "slices"), cells)


def journal_line(report: JournalReport) -> str:
    """Return the report as one line of text."""
    numbers = {"finished": report.finished, "unresolved": report.states[State.UNRESOLVED], **report.queue}
    words = [f"{number:,} {name.replace('_', ' ')}" for name, number in numbers.items()]
    words += [f"{report.rate:,.1f}/s"] if report.rate is not None else []
    words += [f"time left {_duration(report.eta)}"] if report.eta is not None else []
    return f"{local_time(datetime.now(UTC))}  {'  '.join(words)}"


def _by_number(reasons: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(reason, f"{number:,}") for reason, number in sorted(reasons.items(), key=lambda pair: -pair[1])]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=ceil(seconds)))
