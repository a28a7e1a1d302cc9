"""``lianlian explain``: everything that a journal knows about one refund."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import anyio

from lianlian_async.clock import Moment, system_clock
from lianlian_async.codes import CODES
from lianlian_async.errors import LianLianError
from lianlian_async.journal import Entry, State
from lianlian_async.journal.base import MOST_FACTS, facts
from lianlian_async.models import RefundRequest
from lianlian_async.recording import recorded_refund
from lianlian_async.retry import RetryPolicy

from .exit_codes import NOT_SENT, UNKNOWN, ExitOutcome, exit_outcome_of
from .journal_report import MEANING
from .options import place_name
from .output import Output, local_time, table
from .stores import find_journal, make_reader

_EVENTS: Final = {"lease": "lease taken", "resend": "to be sent again", "acted": "on_refund returned"}
"""The text for events whose name alone is not clear."""
_SHOWN: Final = ("oid_refundno", "sta_refund", "settle_date", "evidence")
_QUERY_DAYS: Final = 90
"""LianLian rejects queries about older refunds (3005)."""


def explain(output: Output, /, no_refund: str, place: str | None, config: Path | None) -> int:
    """Run ``lianlian explain``."""
    place = find_journal(place, config)
    if (entry := anyio.run(_find, place, no_refund)) is None:
        raise LianLianError(f"refund {no_refund} is not in the journal {place_name(place)}")
    return show_entry(output, entry, system_clock()).exit_code


async def _find(place: str, no_refund: str) -> Entry | None:
    async with make_reader(place) as reader:
        return await reader.find(no_refund)


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
    output.show(document, table(f"refund {entry.no_refund}: {outcome.word}", ("", ""), rows), events, meaning)
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
    resume = "`lianlian journal resume` queries the refund, and sends it again if LianLian has no record of it after"
    return UNKNOWN, f"{unknown}{sending}. {resume} {local_time(asks_at)}", asks_at
