"""The command ``lianlian batch``: its help text, options and argument."""

from collections.abc import Iterable
from functools import partial
from typing import Final

import click
from click.core import ParameterSource

from lianlian_async import wire
from lianlian_async.cli import options

from .formats import date_reader, money_reader

_NOT_FOR_QUEUE: Final = (
    *("place", "out", "rate", "keep_going", "wait_unknown", "concurrency", "deadline", "not_found_grace"),
    *("query_first", "accept_new_journal", "no_wait", "config"),
)


def refuse_for_queue(ctx: click.Context) -> None:
    """Raise a usage error if the command line contains options that concern sending."""
    names = [name for name in _NOT_FOR_QUEUE if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given := ", ".join(option.opts[0] for option in ctx.command.params if option.name in names):
        raise click.UsageError(f"--queue sends nothing, so it cannot be combined with {given}")


def _read_map(_ctx: click.Context, _option: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    from .rows import FIELDS

    renamed: dict[str, str] = {}
    for value in values:
        name, _, column = value.partition("=")
        if name not in FIELDS or not column:
            raise click.BadParameter(f"{value!r} must be FIELD=COLUMN, with FIELD one of {', '.join(FIELDS)}")
        if name in renamed or column in renamed.values():
            raise click.BadParameter(f"{value!r}: map each field and each column only once")
        renamed[name] = column
    return renamed


def _encoding(name: str) -> str:
    "".encode(name)
    return name


_flag: Final = partial(click.option, is_flag=True)
_yuan: Final = partial(click.option, metavar="YUAN", callback=options.parsed(wire.parse_decimal))

READING_OPTIONS: Final = (
    click.option(
        "--map",
        "renamed",
        metavar="FIELD=COLUMN",
        multiple=True,
        callback=_read_map,
        help="Read a field from a column with another name.",
    ),
    click.option(
        "--date-format",
        "read_date",
        metavar="FORMAT",
        callback=options.parsed(date_reader),
        help="Format of the dates in the file, such as 'YYYY/MM/DD hh:mm', in China Standard Time.",
    ),
    click.option(
        "--money-format",
        "read_money",
        metavar="FORMAT",
        callback=options.parsed(money_reader),
        help="Format of the amounts in the file: write the number 1,234.56 as the file does, such as '¥1,234.56'.",
    ),
    _flag("--ignore-unknown", help="Ignore columns that are not refund fields."),
    click.option(
        "--encoding",
        metavar="NAME",
        default="utf-8",
        callback=options.parsed(_encoding),
        help="Text encoding of the file, such as gb18030.",
    ),
    _flag(
        "--derive",
        help="Compute a missing no_refund from order and amount: the same in every run and file. Two refunds of one "
        "order with the same amount need a no_refund, and so does a line with no_order and oid_paybill.",
    ),
    click.option(
        "--dt-refund",
        metavar="YYYYMMDDHHMMSS",
        callback=options.parsed(lambda text: wire.format_timestamp(wire.parse_timestamp(text))),
        help="dt_refund of lines that have none. Use the same value in every run: the journal refuses a no_refund with "
        "another dt_refund.",
    ),
)
"""The options for :func:`.checked.checked_file`."""
_OPTIONS: Final = (
    _flag("--dry-run", help="Check all lines and send nothing."),
    _flag("--yes", help="Send without asking for confirmation."),
    _yuan("--max-total", help="Send nothing if the sum of all refunds is greater."),
    _yuan("--max-refund", help="Send nothing if any refund is greater."),
    _flag("--skip-invalid", help="Send the valid lines even if other lines are invalid."),
    *READING_OPTIONS,
    click.option(
        "--out",
        type=options.any_file,
        callback=options.no_workbook,
        help="Write each line of FILE and its outcome to this file: CSV for a spreadsheet if the name ends in .csv, "
        "else JSON Lines. An existing file is replaced.",
    ),
    options.journal_option,
    _flag("--no-wait", help="End with an error instead of waiting while another process has the journal file open."),
    _flag("--query-first", help="Query each refund that is not in the journal before sending it."),
    _flag(
        "--accept-new-journal",
        help="Send a file even if it was sent with another journal or to another https host before (see FILE.receipt). "
        "Refused until --not-found-grace has passed since the last run. Implies --query-first.",
    ),
    click.option(
        "--rate",
        metavar="NUMBER",
        type=options.Number(min=0, min_open=True),
        help="Maximum number of refunds to start each second.",
    ),
    _flag("--keep-going", help="Continue after a rejection that every further refund would get."),
    _flag("--wait-unknown", help="At the end, wait for unknown refunds, and try to resolve them."),
    click.option(
        "--queue",
        metavar="[DSN]",
        is_flag=False,
        flag_value="",
        type=options.Place(only_dsn=True),
        help=f"Send nothing: put the refunds into the queue at DSN (default: {options.JOURNAL}) for `lianlian worker`.",
    ),
)


@click.command
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@options.add_options(*_OPTIONS)
@options.session_options
@options.config_option
@options.runs(".batch.command")
def batch() -> None:
    """Make each refund of a file once.

    FILE is CSV with a header line, or JSON Lines, with LianLian's field names (- is stdin). All lines are checked
    before anything is sent. After a crash or Ctrl-C, run the same command again: the journal shows what was sent.
    Exit codes: 0 all made; 2 invalid lines or options, nothing was sent; 3 some rejected, failed or skipped as invalid;
    4 some unknown; 5 invalid signatures; 130 interrupted; 1 other errors.
    """
