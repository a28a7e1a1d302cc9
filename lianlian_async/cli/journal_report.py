"""The state of a journal and its queue, as ``lianlian journal`` and ``lianlian worker`` show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from types import MappingProxyType
from typing import Final, NamedTuple

import attrs
from rich.console import RenderableType

from lianlian_async.journal import Entry, State
from lianlian_async.retry import RetryPolicy
from lianlian_async.worker_pool import iterate

from .output import Output, local_time, table
from .stores import is_dsn, make_reader, place_name, read_queue

_LISTED: Final = 20
_MEANING: Final = {
    State.UNRESOLVED: "begun; unknown whether it was made",
    State.ACCEPTED: "made; final state unknown",
    State.FINAL: "success or failed; on_refund has not returned",
    State.DONE: "success or failed",
    State.REJECTED: "rejected",
    State.CONFLICT: "belongs to another refund: a person must decide",
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
    queue: Mapping[str, int] = attrs.field(factory=dict)
    """See ``RefundQueue.counts``; empty if there is no queue."""
    failures: Sequence[Mapping[str, str | None]] = ()
    """The oldest failures, from ``RefundQueue.failures``."""
    unknown: int = 0
    """Unresolved refunds that may have been made."""
    not_sent: int = 0
    """Unresolved refunds that were certainly not made, because no request arrived."""
    oldest: list[UnknownRefund] = attrs.field(factory=list)

    def add(self, entry: Entry) -> None:
        """Count one pending entry."""
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


async def read_journal(place: str) -> JournalReport:
    """Read the state of the journal at ``place``."""
    async with make_reader(place) as reader:
        report = JournalReport(place, await reader.counts())
        if report.states[State.UNRESOLVED]:
            async with aclosing(iterate(reader.pending())) as entries:
                async for entry in entries:
                    report.add(entry)
    if is_dsn(place):
        report.queue, report.failures = await read_queue(place)
    return report


def show_journal(
    output: Output, report: JournalReport, reasons: Mapping[str, int] = MappingProxyType({}), **facts: int
) -> None:
    """Print the report; ``reasons``: number of unknown outcomes by reason; ``facts``: more numbers."""
    name = place_name(report.place)
    document = {
        "journal": name,
        "states": {str(state): number for state, number in report.states.items()},
        "unknown": report.unknown,
        "not_sent": report.not_sent,
        "oldest_unknown": [one._asdict() for one in report.oldest],
        "queue": dict(report.queue),
        **({"failures": list(report.failures)} if report.failures else {}),
        **({"reasons": dict(reasons)} if reasons else {}),
        **facts,
    }
    states = [(state, f"{report.states[state]:,}", meaning) for state, meaning in _MEANING.items()]
    shown: list[RenderableType] = [table(f"journal {name}", ("state", "refunds", "meaning"), states)]
    if report.unknown:
        title = f"{report.unknown:,} may have been made"
        title += f"; the oldest {_LISTED}" if report.unknown > _LISTED else ""
        shown.append(table(title, ("no_refund", "yuan", "last sent at", "resolvable from"), report.oldest))
    if reasons:
        rows = [(reason, f"{number:,}") for reason, number in reasons.items()]
        shown.append(table("unknown outcomes", ("reason", "times"), rows))
    if report.queue:
        queue = [(name.replace("_", " "), f"{number:,}") for name, number in report.queue.items()]
        shown.append(table("queue", ("refunds", "number"), queue))
    if report.failures:
        causes = [(one["no_refund"] or "?", one["cause"] or "see the log of the worker") for one in report.failures]
        shown.append(table("failed: a person must decide", ("no_refund", "cause"), causes))
    rest = {"certainly not sent": report.not_sent, **facts}
    shown += [f"{name.replace('_', ' ')}: {number:,}" for name, number in rest.items() if number or name in facts]
    output.show(document, *shown)
