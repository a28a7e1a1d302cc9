"""``lianlian journal`` and ``lianlian explain``: show, export, back up and restore a journal; resolve refunds."""

import getpass
import os
import time
from collections.abc import Mapping
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import click

from lianlian_async.clock import system_clock
from lianlian_async.errors import LianLianError
from lianlian_async.journal import Entry, SqliteReader
from lianlian_async.journal.sqlite_file import JournalFile
from lianlian_async.journal.sqlite_file import restore as restore_file
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.recording import decision
from lianlian_async.recovery import Resumed
from lianlian_async.worker_pool import iterate

from .exit_codes import UNKNOWN
from .journal_report import journal_line, journal_views, read_journal, show_entry
from .options import is_dsn, load_merchant, make_session, place_name
from .output import Output, line_writer, printable
from .signals import sigterm_interrupts
from .stores import find_journal, make_folder, make_journal, make_reader

_LONGEST_EVIDENCE: Final = 200
_SECOND_LOOK: Final = 1.0
_REQUEST: Final = tuple(field.name for field in attrs.fields(RefundRequest))
_RECORD: Final = ("ret_code", "ret_msg", "sta_refund", "oid_refundno", "settle_date", "evidence")
_EXPORTED: Final = ("no_refund", "state", "sent_at", *_REQUEST[1:], *_RECORD)


def show(output: Output, /, place: str | None, config: Path | None, watch: float | None) -> None:
    place, report = find_journal(place, config), None
    if watch is not None:
        with suppress(KeyboardInterrupt), sigterm_interrupts(), output.screen() as draw:
            while True:
                report = anyio.run(read_journal, place, report)
                draw(journal_line(report), *journal_views(report))
                time.sleep(watch)
        return
    report = anyio.run(read_journal, place)
    if report.queue.get("at_work"):  # the rate is computed from two reports
        time.sleep(_SECOND_LOOK)
        report = anyio.run(read_journal, place, report)
    output.show(*journal_views(report))


def explain(output: Output, /, no_refund: str, place: str | None, config: Path | None) -> int:
    found = find_journal(place, config)

    async def find() -> Entry | None:
        async with make_reader(found) as reader:
            if isinstance(reader, SqliteReader) and reader.problem:
                output.note(f"warning: {found}: {reader.problem}")
            return await reader.find(no_refund)

    if (entry := anyio.run(find)) is None:
        raise LianLianError(f"refund {no_refund} is not in the journal {place_name(found)}")
    return show_entry(output, entry, system_clock()).exit_code


def export(output: Output, /, place: str | None, config: Path | None, out: Path) -> None:
    place = find_journal(place, config)
    if not is_dsn(place) and out.exists() and out.samefile(place):
        raise click.BadParameter("must not be the journal", param_hint="--out")
    number = anyio.run(_export, place, out)
    output.show({"refunds": number, "out": str(out)}, f"{number:,} refunds written to {out}")


def resume(output: Output, /, place: str | None, config: Path | None, **settings: Any) -> int:
    place = find_journal(place, config)
    resumed, reasons = anyio.run(_resume, load_merchant(config), place, settings)
    report = anyio.run(read_journal, place)
    output.show(*journal_views(report, reasons, resolved=resumed.resolved, still_open=resumed.still_open))
    return UNKNOWN.exit_code if report.unknown else 0


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


async def _resume(merchant: Merchant, place: str, settings: dict[str, Any]) -> tuple[Resumed, Mapping[str, int]]:
    async with make_journal(place) as opened, make_session(merchant, opened, settings) as session:
        return await session.resume(concurrency=session.max_connections), session.unknown_reasons


async def _export(place: str, out: Path) -> int:
    number = 0
    async with make_reader(place) as reader:
        with line_writer(out, _EXPORTED) as write:
            async with aclosing(iterate(reader.entries())) as entries:
                async for entry in entries:
                    write(_line(entry))
                    number += 1
    return number


def _line(entry: Entry) -> dict[str, Any]:
    record = entry.ending.record if entry.ending else {}
    return {
        **{name: record.get(name) for name in _RECORD},
        **entry.fields,
        "state": str(entry.state),
        "sent_at": entry.sent_at and entry.sent_at.wall.isoformat(),
    }
