"""``lianlian journal`` and ``lianlian explain``: show, export, back up and restore a journal; resolve refunds."""

import getpass
import os
import time
from collections.abc import Mapping
from contextlib import aclosing, closing, suppress
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import anyio
import attrs
import click
from rich.table import Table
from rich.text import Text

from lianlian_async.clock import Moment, system_clock
from lianlian_async.codes import CODES
from lianlian_async.errors import LianLianError
from lianlian_async.journal import Entry, State
from lianlian_async.journal.base import MOST_FACTS, facts
from lianlian_async.journal.sqlite_file import JournalFile
from lianlian_async.journal.sqlite_file import restore as restore_file
from lianlian_async.models import RefundRequest
from lianlian_async.recording import decision, recorded_refund
from lianlian_async.recovery import Resumed
from lianlian_async.retry import RetryPolicy
from lianlian_async.worker_pool import iterate

from .exit_codes import NOT_SENT, UNKNOWN, ExitOutcome, exit_outcome_of
from .options import is_dsn, load_merchant, make_session, place_name
from .output import Output, line_writer, local_time, printable, table, tables
from .signals import sigterm_interrupts
from .stores import find_journal, make_folder, make_journal, open_reader, read_queue

_LONGEST_EVIDENCE: Final = 200
_INTERVAL: Final = 1.0
"""Seconds between two reports on a journal."""
_REQUEST: Final = tuple(field.name for field in attrs.fields(RefundRequest))
_RECORD: Final = ("ret_code", "ret_msg", "sta_refund", "oid_refundno", "settle_date", "evidence")
_EXPORTED: Final = ("no_refund", "state", "sent_at", *_REQUEST[1:], *_RECORD)
_LISTED: Final = 20
MEANING: Final = {
    State.UNRESOLVED: "begun; no outcome yet",
    State.ACCEPTED: "made; final state unknown",
    State.FINAL: "success or failed; on_refund has not returned",
    State.DONE: "success or failed",
    State.REJECTED: "rejected",
    State.CONFLICT: "its no_refund belongs to another refund: a person must decide",
}
_EVENTS: Final = {"lease": "lease taken", "resend": "to be sent again", "acted": "on_refund returned"}
"""The text for events whose name alone is not clear."""
_SHOWN: Final = ("oid_refundno", "sta_refund", "settle_date", "evidence")
_QUERY_DAYS: Final = 90
"""About three months: LianLian rejects queries about older refunds (3005)."""


def show(output: Output, /, journal: str | None, place: str | None, config: Path | None, watch: bool) -> None:
    place, report = find_journal(journal or place, config), None
    if watch:
        with suppress(KeyboardInterrupt), sigterm_interrupts(), output.screen() as draw:
            while True:
                report = anyio.run(read_journal, output, place, report)
                draw(*journal_views(report))
                time.sleep(_INTERVAL)
        return
    report = anyio.run(read_journal, output, place)
    if report.document["queue"].get("at_work"):  # the rate is computed from two reports
        time.sleep(_INTERVAL)
        report = anyio.run(read_journal, output, place, report)
    output.show(*journal_views(report))


def explain(output: Output, /, no_refund: str, place: str | None, config: Path | None) -> int:
    found = find_journal(place, config)

    async def find() -> Entry | None:
        async with open_reader(found, output.note) as reader:
            return await reader.find(no_refund)

    if (entry := anyio.run(find)) is None:
        raise LianLianError(f"refund {no_refund} is not in the journal {place_name(found)}")
    return show_entry(output, entry, system_clock()).exit_code


def export(output: Output, /, journal: str | None, place: str | None, config: Path | None, out: Path) -> None:
    place = find_journal(journal or place, config)
    if not is_dsn(place) and out.exists() and out.samefile(place):
        raise click.BadParameter("must not be the journal", param_hint="--out")

    async def write_all() -> int:
        number = 0
        async with open_reader(place, output.note) as reader, aclosing(iterate(reader.entries())) as entries:
            with line_writer(out, _EXPORTED) as write:
                async for entry in entries:
                    record = entry.ending.record if entry.ending else {}
                    facts = {"state": str(entry.state), "sent_at": entry.sent_at and entry.sent_at.wall.isoformat()}
                    write({**{name: record.get(name) for name in _RECORD}, **entry.fields, **facts})
                    number += 1
        return number

    number = anyio.run(write_all)
    output.show({"refunds": number, "out": str(out)}, f"{number:,} refunds written to {out}")


def resume(output: Output, /, journal: str | None, place: str | None, config: Path | None, **settings: Any) -> int:
    place = find_journal(journal or place, config)
    merchant = load_merchant(config)

    async def query_all() -> tuple[Resumed, Mapping[str, int]]:
        async with make_journal(place) as opened, make_session(merchant, opened, settings) as session:
            return await session.resume(concurrency=session.max_connections), session.unknown_reasons

    resumed, reasons = anyio.run(query_all)
    report = anyio.run(read_journal, output, place)
    output.show(*journal_views(report, reasons, resolved=resumed.resolved, still_open=resumed.still_open))
    return UNKNOWN.exit_code if report.document["unknown"] else 0


def decide(output: Output, /, no_refund: str, outcome: str, evidence: str, **journal: Any) -> None:
    if not evidence.strip() or not evidence.isprintable() or len(evidence) > _LONGEST_EVIDENCE:
        raise click.BadParameter(f"must be one line of 1 to {_LONGEST_EVIDENCE} characters", param_hint="--evidence")
    now = system_clock()
    ending, found = decision(outcome == "made", evidence, _user(), now), find_journal(**journal)

    async def record() -> Entry:
        async with make_journal(found) as opened:
            return await opened.decide(no_refund, ending, now)

    show_entry(output, anyio.run(record), now)


def _user() -> str:
    try:
        return printable(getpass.getuser())  # a journal stores only UTF-8
    except (ImportError, KeyError, OSError):  # a container's user may have no name, and Windows no USERNAME
        return f"user {getattr(os, 'getuid', lambda: 'without a name')()}"


def backup(output: Output, /, file: Path, place: str | None, config: Path | None) -> None:
    place = find_journal(place, config)
    _check_is_file(place)
    if file.exists() or not file.parent.is_dir():
        raise click.BadParameter("exists already" if file.exists() else "its folder does not exist", param_hint="FILE")
    with closing(JournalFile(place, read_only=True)) as opened:
        opened.backup(file)
    output.show({"backup": str(file)}, f"journal {place} copied to {file}")


def restore(output: Output, /, file: Path, place: str | None, config: Path | None) -> None:
    found = find_journal(place, config, exists=False)
    _check_is_file(found)
    if place is None:
        make_folder(found)
    restore_file(file, Path(found), system_clock())
    output.show({"journal": found}, f"journal {found} is restored; run `lianlian journal resume`")


def _check_is_file(place: str) -> None:
    if is_dsn(place):
        raise click.UsageError(
            "for PostgreSQL use pg_dump, and stop all workers before pg_restore; the journal detects the restore"
        )


class JournalReport(NamedTuple):
    """The state of a journal and its queue."""

    document: dict[str, Any]
    finished: int
    """The number of refunds with an outcome."""
    read_at: float
    """The time, in seconds of ``time.monotonic``."""


async def read_journal(output: Output, place: str, earlier: JournalReport | None = None) -> JournalReport:
    """Read the state of the journal at ``place`` and of its queue; the rate is that since an ``earlier`` report.

    Unresolved refunds count as ``unknown`` if they may have been made, else as ``not_sent``. The ``ask_again_at`` of
    the oldest unknown ones assumes the default ``not_found_grace``.
    """
    unknown, not_sent, oldest = 0, 0, []
    async with open_reader(place, output.note if earlier is None else str) as reader:
        states = await reader.counts()
        if states[State.UNRESOLVED]:
            async with aclosing(iterate(reader.pending())) as entries:
                async for entry in entries:
                    if entry.state is not State.UNRESOLVED:
                        continue
                    if entry.sent_at is None:
                        not_sent += 1
                        continue
                    unknown += 1
                    if unknown <= _LISTED:
                        fields = {name: entry.fields[name] for name in ("no_refund", "money_refund")}
                        moments = {"sent_at": entry.sent_at.wall, "ask_again_at": _asks_at(entry.sent_at)}
                        oldest.append(fields | {name: local_time(moment) for name, moment in moments.items()})
    queue = await read_queue(place) if is_dsn(place) else {"queue": {}}
    finished, now = sum(number for state, number in states.items() if state is not State.UNRESOLVED), time.monotonic()
    if jobs := queue["queue"]:
        rate = None if earlier is None else (finished - earlier.finished) / (now - earlier.read_at)
        left = jobs["waiting"] + jobs["at_work"]
        queue |= {"refunds_per_second": rate, "eta_seconds": left / rate if left and rate else None}
    document = {
        "journal": place_name(place),
        "states": {str(state): number for state, number in states.items()},
        "unknown": unknown,
        "not_sent": not_sent,
        "oldest_unknown": oldest,
    }
    return JournalReport(document | queue, finished, now)


def journal_views(
    report: JournalReport, reasons: Mapping[str, int] = MappingProxyType({}), **numbers: int
) -> tuple[dict[str, Any], *tuple[Table, ...]]:
    """Return the report as a JSON document, and as tables for a terminal.

    ``reasons``: number of unknown outcomes by reason; ``numbers``: more facts.
    """
    document = report.document | ({"reasons": dict(reasons)} if reasons else {}) | numbers
    unknown, get = document["unknown"], document.get
    queue = {
        **document["queue"],
        "finished_per_second": get("refunds_per_second"),
        "time_left": _duration(get("eta_seconds")),
        "oldest_waits_for": _duration(get("oldest_waiting_seconds")),
    }
    oldest = f"{unknown:,} may have been made" + (f"; the oldest {_LISTED}" if unknown > _LISTED else "")
    states = [(state, document["states"][state], meaning) for state, meaning in MEANING.items()]
    workers = [(one["id"], _duration(one["heartbeat_seconds"]), one["slices"]) for one in get("workers", ())]
    causes = [(one["no_refund"] or "?", one["cause"] or "see the log of the worker") for one in get("failures", ())]
    oldest_columns = ("no_refund", "yuan", "last sent at", "query again at")
    shown = [
        table(f"journal {document['journal']}", ("state", "refunds", "meaning"), states),
        *tables({"queue": queue, "queued again": get("queued_again") or {}, "unknown outcomes": reasons}),
        *tables({"refunds": {"certainly_not_made": document["not_sent"] or None, **numbers}}),
        table("workers", ("worker", "since last heartbeat", "slices"), workers),
        table(oldest, oldest_columns, (one.values() for one in document["oldest_unknown"])),
        table("failed: a person must decide", ("no_refund", "cause"), causes),
    ]
    return document, *(drawn for drawn in shown if drawn.rows)


def _duration(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=ceil(seconds))


def _asks_at(sent_at: Moment) -> datetime:
    """Return the time from which "no such record" is believed, with the default ``not_found_grace``."""
    return sent_at.wall + timedelta(seconds=RetryPolicy().not_found_grace)


def show_entry(output: Output, entry: Entry, now: Moment) -> ExitOutcome:
    """Print what the journal knows about a refund; return its outcome."""
    outcome, meaning, asks_at = _conclusion(entry, now)
    record = {} if entry.ending is None else dict(entry.ending.record)
    moments = ((fact, datetime.fromtimestamp(fact.at, UTC)) for fact in facts(entry.history))
    history = [fact._asdict() | {"at": local_time(moment)} for fact, moment in moments]
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
    cells["dt_refund"] = str(RefundRequest.from_record(entry.fields).dt_refund)
    title = "history" + (": only the first 3 and the latest 6 events are kept" if len(history) == MOST_FACTS else "")
    events = table(title, ("time", "event", "result"), map(_row, history))
    events.columns[0].no_wrap = True
    rows = [(name, text) for name, text in cells.items() if text and name != "no_refund"]
    shown = table(f"refund {entry.no_refund}: {outcome.word}", ("", ""), rows)
    output.show(document, shown, events, Text(printable(meaning)))
    return outcome


def _row(fact: dict[str, Any]) -> tuple[str, str, str]:
    result = fact["result"]
    text = f"{result} {CODES[result].meaning}" if result in CODES else result
    times = "" if fact["times"] == 1 else f" ({fact['times']} times)"
    return fact["at"], _EVENTS.get(fact["what"], fact["what"]), (text + times).strip()


def _conclusion(entry: Entry, now: Moment) -> tuple[ExitOutcome, str, datetime | None]:
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
    if now.wall - RefundRequest.from_record(entry.fields).dt_refund > timedelta(days=_QUERY_DAYS):
        decide = f"lianlian journal decide {entry.no_refund} made|not-made --evidence TEXT"
        return UNKNOWN, f"{unknown}. LianLian no longer answers queries about it; record its outcome: {decide}", None
    asks_at = _asks_at(entry.sent_at)
    sending = f"; a call may send it until {local_time(entry.sent_at.wall)}" if entry.sent_at.wall > now.wall else ""
    resume = "`lianlian journal resume` queries it, and sends it again only if LianLian has no record of it after"
    return UNKNOWN, f"{unknown}{sending}. {resume} {local_time(asks_at)}", asks_at
