"""``lianlian journal``: show a journal, export it, resolve its open refunds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import click

from lianlian_async.journal import Entry
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.recovery import Resumed
from lianlian_async.worker_pool import iterate

from .exit_codes import UNKNOWN
from .journal_report import journal_line, journal_views, read_journal
from .options import config_option, load_merchant, make_session, session_options
from .output import Output, json_option, line_writer, pass_output
from .signals import sigterm_interrupts
from .stores import is_dsn, make_journal, make_reader, place_argument

_SECOND_LOOK: Final = 1.0
_REQUEST: Final = tuple(field.name for field in attrs.fields(RefundRequest))
_RECORD: Final = ("ret_code", "ret_msg", "sta_refund", "oid_refundno", "settle_date")
_EXPORTED: Final = ("no_refund", "state", "sent_at", *_REQUEST[1:], *_RECORD)


@click.group
def journal() -> None:
    """Show, export or resume a journal.

    A journal records refunds and their outcomes. It is an SQLite file, created by `lianlian batch`, or a PostgreSQL
    database (postgresql://…, preferably in LIANLIAN_DSN).
    """


@journal.command
@place_argument
@click.option(
    "--watch",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=2.0,
    type=click.FloatRange(min=0.1),
    help="Redraw every SECONDS (2 if omitted) until Ctrl-C; if stdout is not a terminal, print one line each time.",
)
@json_option
@pass_output
def show(output: Output, /, place: str, watch: float | None) -> None:
    """Count the refunds in a journal, and list the unknown ones.

    Other processes may use the journal meanwhile. In PostgreSQL, show the queue and its workers, too. The time left
    assumes the current rate and no further refunds; refunds that are due later do not count.
    """
    report = None
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
@place_argument
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File with one line for each refund: CSV if its name ends in .csv, else JSON Lines.",
)
@json_option
@pass_output
def export(output: Output, /, place: str, out: Path) -> None:
    """Write all refunds of a journal to a file, oldest first.

    Other processes may use the journal meanwhile.
    """
    if not is_dsn(place) and out.exists() and out.samefile(place):
        raise click.BadParameter("must not be the journal", param_hint="--out")
    number = anyio.run(_export, place, out)
    output.show({"refunds": number, "out": str(out)}, f"{number:,} refunds written to {out}")


@journal.command
@place_argument
@session_options
@config_option
@json_option
@pass_output
def resume(output: Output, /, place: str, config: Path | None, **settings: Any) -> None:
    """Resolve all open refunds, then show the journal.

    Unresolved refunds are queried, and sent if no earlier request can still arrive; refunds that were made are
    queried for their final state. Exit code 4 if some are still unknown.
    """
    _show_resumed(output, place, *anyio.run(_resume, load_merchant(config), place, settings))


def _show_resumed(output: Output, place: str, resumed: Resumed, reasons: Mapping[str, int]) -> None:
    report = anyio.run(read_journal, place)
    document, shown = journal_views(report, reasons, resolved=resumed.resolved, still_open=resumed.still_open)
    output.show(document, *shown)
    if report.unknown:
        click.get_current_context().exit(UNKNOWN.exit_code)


async def _resume(merchant: Merchant, place: str, settings: dict[str, Any]) -> tuple[Resumed, Mapping[str, int]]:
    async with make_journal(place) as opened, make_session(merchant, journal=opened, **settings) as session:
        return await session.resume(), session.unknown_reasons


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
