"""What ``lianlian batch`` can be told, and how each option is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from lianlian_async import wire
from lianlian_async.cli.options import Command
from lianlian_async.cli.stores import DSN, JOURNAL, check_place, is_dsn

from .rows import FIELDS

__all__ = ["batch_options", "refuse_for_queue"]


def refuse_for_queue(ctx: click.Context) -> None:
    """A usage error for options that mean nothing to who only enqueues."""
    names = (
        "journal",
        "out",
        "rate",
        "keep_going",
        "wait_unknown",
        "concurrency",
        "deadline",
        "not_found_grace",
        "no_wait",
        "query_first",
        "accept_new_journal",
    )
    given = [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"with --queue, nothing is sent here, and {options} would do nothing")


def _read_map(_ctx: click.Context, _option: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for value in values:
        name, _, column = value.partition("=")
        if name not in FIELDS or not column:
            raise click.BadParameter(f"{value!r} must be FIELD=COLUMN, FIELD one of {', '.join(FIELDS)}")
        if name in renamed or column in renamed.values():
            raise click.BadParameter(f"{value!r}: a field has one column, and a column one field")
        renamed[name] = column
    return renamed


def _read_queue(ctx: click.Context, option: click.Parameter, value: str | None) -> str | None:
    check_place(ctx, option, value)
    dsn = os.environ.get(DSN, "") if value == "" else value
    if dsn is not None and not is_dsn(dsn):
        raise click.BadParameter(f"must be a URL, postgresql://…, here or in {DSN}")
    return dsn


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    def callback(_ctx: click.Context, _option: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except (ValueError, LookupError) as error:
            raise click.BadParameter(str(error)) from None

    return callback


def _timestamp(text: str) -> str:
    return wire.format_timestamp(wire.parse_timestamp(text))


def _encoding(name: str) -> str:
    "".encode(name)
    return name


_OPTIONS: Final = (
    click.option(
        "--journal",
        metavar="PATH|DSN",
        envvar=JOURNAL,
        show_envvar=True,
        show_default="one for merchant and endpoint, in this user's application folder",
        callback=check_place,
        help="Journal that records every refund and its outcome. Do not delete it.",
    ),
    click.option("--no-wait", is_flag=True, help="Refuse to wait for another batch that is at work with the journal."),
    click.option(
        "--query-first",
        is_flag=True,
        help="Ask the gateway about each refund that is new in the journal before it is sent.",
    ),
    click.option(
        "--accept-new-journal",
        is_flag=True,
        help="Send a file again although it was sent with another journal before (see FILE.receipt).",
    ),
    click.option(
        "--out",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write one line for each refund to this file, replaced in every run: CSV by its name, else JSON Lines.",
    ),
    click.option(
        "--map",
        "renamed",
        metavar="FIELD=COLUMN",
        multiple=True,
        callback=_read_map,
        help="Which column holds a field, if it is not called like it.",
    ),
    click.option("--ignore-unknown", is_flag=True, help="Let there be columns that are no fields."),
    click.option("--encoding", default="utf-8", callback=_parsed(_encoding), help="Of a CSV file, such as gb18030."),
    click.option(
        "--derive",
        is_flag=True,
        help="Make a missing no_refund from the order's number, the amount, and how many rows above have the same "
        "two: always the same number, so in another file it means the same refund.",
    ),
    click.option(
        "--dt-refund",
        metavar="YYYYMMDDHHMMSS",
        callback=_parsed(_timestamp),
        help="For rows without one. Say the same in every run: the journal refuses a number with another time.",
    ),
    click.option("--skip-invalid", is_flag=True, help="If lines are invalid, send the others."),
    click.option(
        "--max-total", metavar="YUAN", callback=_parsed(wire.parse_decimal), help="Send nothing if the sum is more."
    ),
    click.option("--dry-run", is_flag=True, help="Check all, send nothing."),
    click.option("--yes", is_flag=True, help="Do not ask before sending."),
    click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="How many refunds may begin each second."),
    click.option("--keep-going", is_flag=True, help="Go on after a rejection that your configuration caused."),
    click.option(
        "--wait-unknown", is_flag=True, help="At the end, wait until what is unknown can be asked about again."
    ),
    click.option(
        "--queue",
        metavar="[DSN]",
        is_flag=False,
        flag_value="",
        callback=_read_queue,
        help=f"Send nothing: put the refunds into the queue there (or at {DSN}), for `lianlian worker`.",
    ),
)


def batch_options(command: Command) -> Command:
    """The options of ``lianlian batch`` that no other command has."""
    return reduce(lambda decorated, option: option(decorated), reversed(_OPTIONS), command)
