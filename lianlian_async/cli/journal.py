"""``lianlian journal``: show a journal, export it, resolve or decide its open refunds, back it up, restore it."""

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
from lianlian_async.journal import Entry
from lianlian_async.journal.sqlite_file import JournalFile
from lianlian_async.journal.sqlite_file import restore as restore_file
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.recording import decision
from lianlian_async.recovery import Resumed
from lianlian_async.settings import LONGEST
from lianlian_async.worker_pool import iterate

from .exit_codes import UNKNOWN
from .explain import show_entry
from .journal_report import journal_line, journal_views, read_journal
from .options import Number, is_dsn, journal_options, load_merchant, make_session, session_options, with_output
from .output import Output, line_writer
from .signals import sigterm_interrupts
from .stores import find_journal, make_folder, make_journal, make_reader

_LONGEST_EVIDENCE: Final = 200
_SECOND_LOOK: Final = 1.0
_REQUEST: Final = tuple(field.name for field in attrs.fields(RefundRequest))
_RECORD: Final = ("ret_code", "ret_msg", "sta_refund", "oid_refundno", "settle_date", "evidence")
_EXPORTED: Final = ("no_refund", "state", "sent_at", *_REQUEST[1:], *_RECORD)


@click.group
def journal() -> None:
    """Show, back up or restore a journal; resolve refunds.

    A journal records refunds and their outcomes. It is an SQLite file, which `lianlian batch` creates, or a PostgreSQL
    database (a postgresql:// URL; put a URL with a password into LIANLIAN_DSN).
    """


@journal.command
@journal_options
@click.option(
    "--watch",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=2.0,
    type=Number(0.1, LONGEST),
    help="Redraw every SECONDS (2 if omitted) until Ctrl-C; if stdout is not a terminal, print one line each time.",
)
@with_output
def show(output: Output, /, place: str | None, config: Path | None, watch: float | None) -> None:
    """Count the refunds in a journal, and list the unknown ones.

    Other processes may use the journal meanwhile. A journal in PostgreSQL is shown with its queue and workers. The
    time left assumes the current rate and no further refunds; refunds that are due later do not count.
    """
    place, report = find_journal(place, config), None
    if watch is not None:
        with suppress(KeyboardInterrupt), sigterm_interrupts(), output.screen() as draw:
            while True:
                report = anyio.run(read_journal, place, report)
                document, shown = journal_views(report)
                draw(document, journal_line(report), shown)
                time.sleep(watch)
        return
    report = anyio.run(read_journal, place)
    if report.queue.get("at_work"):  # the rate is computed from two reports
        time.sleep(_SECOND_LOOK)
        report = anyio.run(read_journal, place, report)
    document, shown = journal_views(report)
    output.show(document, *shown)


@journal.command
@journal_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File with one line for each refund: CSV if its name ends in .csv, else JSON Lines.",
)
@with_output
def export(output: Output, /, place: str | None, config: Path | None, out: Path) -> None:
    """Write all refunds of a journal to a file, oldest first.

    Other processes may use the journal meanwhile.
    """
    place = find_journal(place, config)
    if not is_dsn(place) and out.exists() and out.samefile(place):
        raise click.BadParameter("must not be the journal", param_hint="--out")
    number = anyio.run(_export, place, out)
    output.show({"refunds": number, "out": str(out)}, f"{number:,} refunds written to {out}")


@journal.command
@journal_options
@session_options
@with_output
def resume(output: Output, /, place: str | None, config: Path | None, **settings: Any) -> None:
    """Resolve the unknown refunds, then show the journal.

    Each unknown refund is queried, and sent again if LianLian has no record of it after --not-found-grace. A refund
    that was made but is not final is queried, too. A refund that was certainly not made is not sent. Exit code 4 if
    some are still unknown.
    """
    place = find_journal(place, config)
    resumed, reasons = anyio.run(_resume, load_merchant(config), place, settings)
    report = anyio.run(read_journal, place)
    document, shown = journal_views(report, reasons, resolved=resumed.resolved, still_open=resumed.still_open)
    output.show(document, *shown)
    click.get_current_context().exit(UNKNOWN.exit_code if report.unknown else 0)


@journal.command
@click.argument("no_refund")
@click.argument("outcome", type=click.Choice(["made", "not-made"]))
@click.option("--evidence", required=True, help="Reason, in one line: a bank statement, LianLian's answer by mail …")
@journal_options
@with_output
def decide(output: Output, /, no_refund: str, outcome: str, evidence: str, **journal: Any) -> None:
    """Record by hand whether a refund was made, for example when LianLian no longer answers.

    The decision is final: a refund that was decided as not-made is never sent again. The command refuses a decision
    if LianLian has signed a final outcome, or while a call may be sending the refund.
    """
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
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have no name, and Windows no USERNAME
        return f"user {getattr(os, 'getuid', lambda: 'without a name')()}"


@journal.command
@click.argument("file", type=click.Path(path_type=Path))
@journal_options
@with_output
def backup(output: Output, /, file: Path, place: str | None, config: Path | None) -> None:
    """Copy a journal file to FILE, which must not exist.

    Other processes may use the journal meanwhile. FILE appears when the copy is complete. The inbox of notifications
    is not copied, so after a restore on_refund may be called again for the same refund.
    """
    place = find_journal(place, config)
    _check_is_file(place)
    if file.exists() or not file.parent.is_dir():
        raise click.BadParameter("exists already" if file.exists() else "its folder does not exist", param_hint="FILE")
    with closing(JournalFile(place, read_only=True)) as opened:
        opened.backup(file)
    output.show({"backup": str(file)}, f"journal {place} copied to {file}")


@journal.command
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@journal_options
@with_output
def restore(output: Output, /, file: Path, place: str | None, config: Path | None) -> None:
    """Create a journal from FILE, a backup.

    The journal is marked as restored: a refund that the backup may lack is queried before it is sent. Unresolved
    refunds count as sent now, because they may have been sent again after the backup.
    """
    found = find_journal(place, config, exists=False)
    _check_is_file(found)
    if place is None:
        make_folder(found)
    restore_file(file, Path(found), system_clock())
    output.show({"journal": found}, f"journal {found} is restored; run `lianlian journal resume`")


def _check_is_file(place: str) -> None:
    if is_dsn(place):
        raise click.UsageError(
            "for PostgreSQL use pg_dump; after pg_restore, restart the server, so that the journal detects the restore"
        )


async def _resume(merchant: Merchant, place: str, settings: dict[str, Any]) -> tuple[Resumed, Mapping[str, int]]:
    async with make_journal(place) as opened, make_session(merchant, journal=opened, **settings) as session:
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
