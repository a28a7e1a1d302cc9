"""A look at a journal, and at the queue beside it: how far all is, and what is not known yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, NamedTuple

import attrs
from rich.console import RenderableType

from lianlian_async.journal import Entry, State
from lianlian_async.retry import RetryPolicy
from lianlian_async.worker_pool import iterate

from .output import Output, table
from .stores import is_dsn, make_reader, read_queue

__all__ = ["JournalReport", "read_journal", "show_journal"]

_LISTED: Final = 20
_MEANING: Final = {
    State.UNRESOLVED: "begun; whether it was made is not known",
    State.ACCEPTED: "made; its final state is not known",
    State.FINAL: "final; on_refund has not returned for it yet",
    State.DONE: "final: success or failed",
    State.REJECTED: "refused for good",
    State.CONFLICT: "another refund stands under this number: a person has to decide",
}


class Open(NamedTuple):
    """A refund that may have been made."""

    no_refund: str
    money_refund: str
    sent_at: str
    ask_again_at: str
    """When the gateway's "no such record" may be believed, if nobody lowered the grace."""


@attrs.define
class JournalReport:
    """What was seen."""

    place: str
    states: Mapping[State, int]
    queue: Mapping[str, int] = attrs.field(factory=dict)
    """As ``RefundQueue.counts``; empty where there is no queue."""
    failures: Sequence[Mapping[str, str | None]] = ()
    """The oldest ``RefundQueue.failures``."""
    unknown: int = 0
    """Unsettled, and may have been made."""
    not_sent: int = 0
    """Unsettled, and certainly not made: nothing ever arrived."""
    oldest: list[Open] = attrs.field(factory=list)

    def add(self, entry: Entry) -> None:
        """One more entry that is not final."""
        if entry.state is not State.UNRESOLVED:
            return
        if entry.sent_at is None:
            self.not_sent += 1
            return
        self.unknown += 1
        if len(self.oldest) < _LISTED:
            grace = timedelta(seconds=RetryPolicy().not_found_grace)
            moments = (_moment(entry.sent_at.wall), _moment(entry.sent_at.wall + grace))
            self.oldest.append(Open(entry.no_refund, entry.fields["money_refund"], *moments))


def _moment(moment: datetime) -> str:
    return moment.astimezone().isoformat(sep=" ", timespec="seconds")


async def read_journal(place: str) -> JournalReport:
    """JournalReport into the journal at ``place``."""
    async with make_reader(place) as reader:
        found = JournalReport(place, await reader.counts())
        if found.states[State.UNRESOLVED]:
            async with aclosing(iterate(reader.pending())) as entries:
                async for entry in entries:
                    found.add(entry)
    if is_dsn(place):
        found.queue, found.failures = await read_queue(place)
    return found


def show_journal(
    output: Output, found: JournalReport, reasons: Mapping[str, int] = MappingProxyType({}), **facts: int
) -> None:
    """Print it, with what else there is to say; ``reasons``: how often a refund was left unknown, and why."""
    name = "in PostgreSQL" if is_dsn(found.place) else found.place
    document = {
        "journal": name,
        "states": {str(state): number for state, number in found.states.items()},
        "unknown": found.unknown,
        "not_sent": found.not_sent,
        "oldest_unknown": [one._asdict() for one in found.oldest],
        "queue": dict(found.queue),
        **({"failures": list(found.failures)} if found.failures else {}),
        **({"reasons": dict(reasons)} if reasons else {}),
        **facts,
    }
    states = [(state, f"{found.states[state]:,}", meaning) for state, meaning in _MEANING.items()]
    shown: list[RenderableType] = [table(f"journal {name}", ("state", "refunds", "meaning"), states)]
    if found.unknown:
        title = f"{found.unknown:,} may have been made"
        title += f"; the oldest {_LISTED}" if found.unknown > _LISTED else ""
        shown.append(table(title, ("no_refund", "yuan", "last sent at", "asking decides from"), found.oldest))
    if reasons:
        rows = [(reason, f"{number:,}") for reason, number in reasons.items()]
        shown.append(table("why outcomes were unknown", ("reason", "times"), rows))
    if found.queue:
        queue = [(name.replace("_", " "), f"{number:,}") for name, number in found.queue.items()]
        shown.append(table("queue, all workers", ("refunds", "number"), queue))
    if found.failures:
        causes = [(one["no_refund"] or "?", one["cause"] or "see the log of the worker") for one in found.failures]
        shown.append(table("failed: a person has to decide", ("no_refund", "cause"), causes))
    rest = {"certainly not sent yet": found.not_sent, **facts}
    shown += [f"{name.replace('_', ' ')}: {number:,}" for name, number in rest.items() if number or name in facts]
    output.show(document, *shown)
