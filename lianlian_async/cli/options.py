"""Options and arguments of several commands, and the functions that read their values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import reduce, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeVar
from urllib.parse import parse_qs, urlsplit

import click
from click.core import ParameterSource

from lianlian_async import wire
from lianlian_async.errors import InvalidRequest, MalformedMessage, Problem
from lianlian_async.secret import without_locals
from lianlian_async.settings import LONGEST

from . import AS_JSON

if TYPE_CHECKING:
    from lianlian_async.journal import Journal
    from lianlian_async.merchant import Merchant
    from lianlian_async.session import RefundSession

Command = TypeVar("Command", bound=Callable[..., Any])
"""A command's function, which options decorate."""

# The session adds these fields itself. LianLian's sample requests spell sign_type with a trailing blank.
SIGNATURE_FIELDS: Final = ("sign_type", "sign_type ", "sign")

JOURNAL: Final = "LIANLIAN_JOURNAL"
_KEYWORDS: Final = re.compile(r"\b(?:host|hostaddr|dbname|user|password|service)\s*=")
"""The keyword form of libpq, such as ``host=db password=…``: it is not a path, and may contain a password."""


def is_dsn(place: str) -> bool:
    """Return whether ``place``, a path or a URL, is a PostgreSQL URL."""
    return place.startswith(("postgresql://", "postgres://"))


def place_name(place: str) -> str:
    """Return ``place`` for display. A PostgreSQL URL is not shown, because it may contain a password."""
    return "in PostgreSQL" if is_dsn(place) else place


class Number(click.FloatRange):
    """A number in a range. ``FloatRange`` would also accept NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class Place(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """The place of a journal: a path, or a PostgreSQL URL.

    On the command line the URL must have no password, because other processes can read it there. ``only_dsn``: refuse
    every path, and replace an empty place by the URL in ``LIANLIAN_JOURNAL``.
    """

    name = "place"

    def __init__(self, *, only_dsn: bool = False) -> None:
        self._only_dsn = only_dsn

    @without_locals
    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the place. An error message contains ``value`` only if it looks like a path."""
        place = value or (os.environ.get(JOURNAL, "") if self._only_dsn else "")
        if not is_dsn(place):
            if self._only_dsn or "://" in place or _KEYWORDS.search(place):
                wanted = f"postgresql:// URL, here or in {JOURNAL}" if self._only_dsn else "path or postgresql://…"
                # Other text than a path may contain a password.
                given = f", not {place!r}" if re.fullmatch(r"[\w./\\-]+", place) else ""
                self.fail(f"must be a {wanted}{given}")
        elif value and ctx and ctx.get_parameter_source(str(param and param.name)) is ParameterSource.COMMANDLINE:
            try:
                parts = urlsplit(place)
                has_password = parts.password is not None or "password" in parse_qs(parts.query)
            except ValueError:
                raise click.BadParameter("is not a PostgreSQL URL such as postgresql://user@host/database") from None
            if has_password:
                self.fail(
                    f"other processes can read a password on the command line: put the URL into {JOURNAL}, or the "
                    "password into PGPASSWORD or ~/.pgpass"
                )
        return place


def no_workbook(_ctx: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that Excel could not open, because it would contain JSON Lines."""
    if path is not None and path.suffix.lower() in (".xls", ".xlsx"):
        raise click.BadParameter("must end in .csv; this command cannot write an Excel workbook")
    return path


def add_options(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return a decorator that adds ``options`` to a command, in this order."""
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


existing_file: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
any_file: Final = click.Path(dir_okay=False, path_type=Path)

json_option = click.option("--json", is_flag=True, expose_value=False, help="Print the result as JSON on stdout.")
file_argument: Final = click.argument("file", type=click.File("rb"))
"""The argument FILE: ``-`` is stdin."""
config_option = click.option(
    "--config",
    type=existing_file,
    help="TOML file with the merchant's number, keys and URLs; by default the LIANLIAN_ environment variables.",
)
deadline_option = click.option(
    "--deadline", metavar="SECONDS", type=Number(min=0, min_open=True), default=30.0, help="Time limit of each call."
)
session_options: Final = add_options(
    click.option(
        "--concurrency", metavar="NUMBER", type=click.IntRange(1, 10_000), default=20, help="Concurrent refunds."
    ),
    deadline_option,
    click.option(
        "--not-found-grace",
        metavar="SECONDS",
        type=Number(0, LONGEST),
        default=900.0,
        help="Time after the last attempt until the gateway's answer 'no such record' is believed; a shorter time is "
        "safe only if the gateway rejects a second refund with the same no_refund.",
    ),
)
"""The options for :func:`make_session`."""


def runs(module: str, *options: Callable[[Any], Any]) -> Callable[[Callable[[], None]], Command]:
    """Return a decorator: the command has ``options`` and ``--json``, and calls its function in ``module``.

    The function has the name of the declaration. ``module`` is imported only when the command is executed. The function
    returns the exit code; None means 0.
    """

    def decorate(declaration: Callable[[], None]) -> Any:
        @add_options(*options, json_option)
        @wraps(declaration)
        def run(**given: Any) -> None:
            from .output import Output

            function = getattr(import_module(module, __package__), declaration.__name__)
            ctx = click.get_current_context()
            ctx.exit(function(Output(as_json=ctx.meta.get(AS_JSON, False)), **given) or 0)

        return run

    return decorate


def parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return a callback that converts ``ValueError`` and ``LookupError`` of ``parse`` to usage errors."""

    def callback(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except (ValueError, LookupError) as error:
            raise click.BadParameter(str(error)) from None

    return callback


journal_option = click.option(
    "--journal",
    "place",
    metavar="PATH|DSN",
    envvar=JOURNAL,
    show_envvar=True,
    show_default="one for each merchant and endpoint, in your application folder",
    type=Place(),
    help="Journal that records every refund and its outcome: a file, or a postgresql:// URL. Do not delete it.",
)
journal_options: Final = add_options(journal_option, config_option)
"""The options --journal and --config for :func:`.stores.find_journal`."""
journal_argument: Final = click.argument("journal", metavar="[PATH|DSN]", required=False, type=Place())
"""The journal as an argument, which takes precedence over ``--journal``."""


def load_merchant(config: Path | None) -> Merchant:
    """Load the merchant from ``config`` or the environment; raises ``ConfigurationError``."""
    from lianlian_async.merchant import Merchant

    return Merchant.from_env() if config is None else Merchant.from_toml(config)


def make_session(
    merchant: Merchant, journal: Journal, options: Mapping[str, Any], *, query_first: bool = False
) -> RefundSession:
    """Create a session with the values of :func:`session_options`."""
    from lianlian_async.retry import RetryPolicy
    from lianlian_async.session import RefundSession

    return RefundSession(
        merchant,
        journal=journal,
        max_connections=options["concurrency"],
        deadline=options["deadline"],
        retry=RetryPolicy(not_found_grace=options["not_found_grace"]),
        query_first=query_first,
    )


def read_message(file: BinaryIO) -> dict[str, str]:
    """Return the fields of a JSON message. Raises a usage error if the file does not contain one."""
    try:
        # Read one byte more than allowed, to detect a message that is too long.
        return wire.decode(file.read(wire.MAX_MESSAGE_BYTES + 1).removeprefix(b"\xef\xbb\xbf"))
    except MalformedMessage as error:
        raise click.BadParameter(str(error), param_hint="FILE") from None


def check_partner(oid_partner: str, merchant: Merchant) -> None:
    """Raise ``InvalidRequest`` if ``oid_partner`` is not the merchant's number."""
    if oid_partner != merchant.oid_partner:
        rule = f"must be the configured merchant's, {merchant.oid_partner}"
        raise InvalidRequest([Problem("oid_partner", rule, repr(oid_partner))])
