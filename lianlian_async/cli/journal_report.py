"""Reports on a journal and its queue: all refunds for ``lianlian journal``, one for ``lianlian explain``."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from math import ceil
from types import MappingProxyType
from typing import Any, Final

import attrs
from rich.table import Table
from rich.text import Text

from lianlian_async.clock import Moment
from lianlian_async.codes import CODES
from lianlian_async.errors import LianLianError
from lianlian_async.journal import Entry, State
from lianlian_async.journal.base import MOST_FACTS, facts
from lianlian_async.models import RefundRequest
from lianlian_async.recording import recorded_refund
from lianlian_async.retry import RetryPolicy
from lianlian_async.worker_pool import iterate

from .exit_codes import NOT_SENT, UNKNOWN, ExitOutcome, exit_outcome_of
from .options import is_dsn, place_name
from .output import Output, local_time, printable, table, tables
from .stores import make_reader, read_queue

_LISTED: Final = 20
MEANING: Final = {
    State.UNRESOLVED: "begun; no outcome yet",
    State.ACCEPTED: "made; final state unknown",
    State.FINAL: "success or failed; on_refund has not returned",
    State.DONE: "success or failed",
    State.REJECTED: "rejected",
    State.CONFLICT: "its no_refund belongs to another refund: a person must decide",
}


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
    """Unresolved refunds that were certainly not made: not delivered, or rejected for a temporary reason."""
    oldest: list[dict[str, str]] = attrs.field(factory=list)
    """The oldest refunds that may have been made. ``ask_again_at`` assumes the default ``not_found_grace``."""

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
            ask_again_at = entry.sent_at.wall + timedelta(seconds=RetryPolicy().not_found_grace)
            moments = {"sent_at": local_time(entry.sent_at.wall), "ask_again_at": local_time(ask_again_at)}
            self.oldest.append({name: entry.fields[name] for name in ("no_refund", "money_refund")} | moments)


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
    report: JournalReport, reasons: Mapping[str, int] = MappingProxyType({}), **numbers: int | None
) -> tuple[dict[str, Any], *tuple[Table, ...]]:
    """Return the report as a JSON document, and as tables for a terminal.

    ``reasons``: number of unknown outcomes by reason; ``numbers``: more facts.
    """
    name, failures, activity = place_name(report.place), report.failures, report.activity
    document = {
        "journal": name,
        "states": {str(state): number for state, number in report.states.items()},
        "unknown": report.unknown,
        "not_sent": report.not_sent,
        "oldest_unknown": report.oldest,
        "queue": report.queue,
        **({"refunds_per_second": report.rate, "eta_seconds": report.eta} if report.queue else {}),
        **activity,
        **({"failures": list(failures)} if failures else {}),
        **({"reasons": dict(reasons)} if reasons else {}),
        **numbers,
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
        table(oldest, ("no_refund", "yuan", "last sent at", "query again at"), (one.values() for one in report.oldest)),
        table("failed: a person must decide", ("no_refund", "cause"), causes),
        *tables({"unknown outcomes": _by_number(reasons)}),
        *tables({"refunds": {"certainly_not_made": report.not_sent or None, **numbers}}),
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


_EVENTS: Final = {"lease": "lease taken", "resend": "to be sent again", "acted": "on_refund returned"}
"""The text for events whose name alone is not clear."""
_SHOWN: Final = ("oid_refundno", "sta_refund", "settle_date", "evidence")
_QUERY_DAYS: Final = 90
"""About three months: LianLian rejects queries about older refunds (3005)."""


def show_entry(output: Output, entry: Entry, now: Moment) -> ExitOutcome:
    """Print what the journal knows about a refund; return its outcome."""
    request = RefundRequest.from_record(entry.fields)
    outcome, meaning, asks_at = _conclusion(entry, request, now)
    record = {} if entry.ending is None else dict(entry.ending.record)
    history = [
        fact._asdict() | {"at": local_time(datetime.fromtimestamp(fact.at, UTC))} for fact in facts(entry.history)
    ]
    document = {
        "outcome": outcome.word,
        "no_refund": entry.no_refund,
        "state": entry.state,
        "meaning": meaning,
        "ask_again_at": asks_at and local_time(asks_at),
        "request": dict(entry.fields),
        "record": record,
        "history": history,
    }
    cells = {"state": entry.state, **entry.fields, **{name: record.get(name) for name in _SHOWN}}
    cells["dt_refund"] = str(request.dt_refund)
    title = "history" + (": only the first 3 and the latest 6 events are kept" if len(history) == MOST_FACTS else "")
    events = table(title, ("time", "event", "result"), map(_row, history))
    events.columns[0].no_wrap = True
    rows = [(name, text) for name, text in cells.items() if text and name != "no_refund"]
    output.show(
        document, table(f"refund {entry.no_refund}: {outcome.word}", ("", ""), rows), events, Text(printable(meaning))
    )
    return outcome


def _row(fact: dict[str, Any]) -> tuple[str, str, str]:
    result, times = fact["result"], fact["times"]
    text = f"{result} {CODES[result].meaning}" if result in CODES else result
    return (
        fact["at"],
        _EVENTS.get(fact["what"], fact["what"]),
        text if times == 1 else f"{text} ({times} times)".strip(),
    )


def _conclusion(entry: Entry, request: RefundRequest, now: Moment) -> tuple[ExitOutcome, str, datetime | None]:
    """Return the outcome, what it means, and the time from which "no such record" is believed."""
    if entry.ending is not None:
        try:
            refund = recorded_refund(entry)
        except LianLianError as error:
            return exit_outcome_of(error), str(error), None
        outcome = exit_outcome_of(refund)
        acting = "; on_refund has not returned" if entry.state is State.FINAL else ""
        return outcome, f"final: {outcome.word}{acting}" if refund.is_final else MEANING[entry.state], None
    if entry.sent_at is None:
        return NOT_SENT, "the refund was certainly not made: the same request can be sent", None
    unknown = "the refund may have been made: do not repeat it with another no_refund"
    if now.wall - request.dt_refund > timedelta(days=_QUERY_DAYS):
        decide = f"lianlian journal decide {entry.no_refund} made|not-made --evidence TEXT"
        return UNKNOWN, f"{unknown}. LianLian no longer answers queries about it; record its outcome: {decide}", None
    asks_at = entry.sent_at.wall + timedelta(seconds=RetryPolicy().not_found_grace)
    sending = f"; a call may send it until {local_time(entry.sent_at.wall)}" if entry.sent_at.wall > now.wall else ""
    resume = "`lianlian journal resume` queries it, and sends it again only if LianLian has no record of it after"
    return UNKNOWN, f"{unknown}{sending}. {resume} {local_time(asks_at)}", asks_at
