"""Where journals and queues are: a file's path, or a PostgreSQL URL whose password never stands on a command line."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, urlsplit

import click
from click.core import ParameterSource

from lianlian_async.errors import ConfigurationError, JournalError
from lianlian_async.journal import Journal, SqliteJournal, SqliteReader
from lianlian_async.secret import drop_secrets, without_locals

from .default_journal import JOURNAL
from .inputs import Command

if TYPE_CHECKING:
    from lianlian_async.contrib.procrastinate import RefundQueue

__all__ = [
    "DSN",
    "check_place",
    "dsn_argument",
    "is_dsn",
    "make_journal",
    "make_reader",
    "open_queue",
    "place_argument",
    "queue_counts",
]

DSN: Final = "LIANLIAN_DSN"


def is_dsn(place: str) -> bool:
    """Whether a place is a PostgreSQL database."""
    return place.startswith(("postgresql://", "postgres://"))


@without_locals
def check_place(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a password where every process of this machine can read it."""
    if value is not None and "://" in value and not is_dsn(value):
        raise click.BadParameter("must be a path, or a URL postgresql://…")
    given = ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    if value is not None and given and is_dsn(value):
        try:
            parts = urlsplit(value)
            has_password = parts.password is not None or "password" in parse_qs(parts.query)
        except ValueError:
            raise click.BadParameter("not a PostgreSQL URL") from None
        if has_password:
            raise click.BadParameter(
                f"a password must not stand on the command line: put the URL into {DSN}, "
                "or the password into PGPASSWORD or ~/.pgpass"
            )
    return value


@without_locals
def _check_dsn(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if not is_dsn(value):
        raise click.BadParameter("must be a URL, postgresql://…")
    check_place(ctx, parameter, value)
    return value


@without_locals
def _check_journal(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    check_place(ctx, parameter, value)
    if not (is_dsn(value) or Path(value).is_file()):
        # It is not repeated: what is no path may be a connection string of another kind, with a password.
        raise click.BadParameter("no such journal; a database is postgresql://…")
    return value


def place_argument(command: Command) -> Command:
    """The argument PLACE: a journal that is there already."""
    return click.argument("place", metavar="PATH|DSN", envvar=[DSN, JOURNAL], callback=_check_journal)(command)


def dsn_argument(command: Command) -> Command:
    """The argument DSN."""
    return click.argument("dsn", metavar="DSN", envvar=DSN, callback=_check_dsn)(command)


def make_journal(place: str) -> Journal:
    """The journal at ``place``, to be opened."""
    return _postgres_journal(place) if is_dsn(place) else SqliteJournal(place)


def make_reader(place: str) -> SqliteReader | Journal:
    """As :func:`make_journal`, but only to look into it, whoever is at work with it."""
    return _postgres_journal(place) if is_dsn(place) else SqliteReader(place)


def _postgres_journal(dsn: str) -> Journal:
    with _extra():
        from lianlian_async.journal.postgres import PostgresJournal
    return PostgresJournal(dsn)


@asynccontextmanager
async def open_queue(dsn: str) -> AsyncGenerator[RefundQueue]:
    """The queue at ``dsn``, made if it is not there."""
    with _extra():
        from lianlian_async.contrib.procrastinate import RefundQueue
    with _queue_errors():
        async with RefundQueue(dsn) as queue:
            yield queue


async def queue_counts(dsn: str) -> Mapping[str, int]:
    """How the queue at ``dsn`` is doing; nothing, if there is none."""
    with _extra():
        from lianlian_async.contrib.procrastinate import RefundQueue
    queue = RefundQueue(dsn)
    with _queue_errors():
        async with queue.app.open_async():
            return await queue.counts() if await queue.app.check_connection_async() else {}


@contextmanager
def _queue_errors() -> Iterator[None]:
    """What befalls the queue's database is a ``JournalError``."""
    from procrastinate.exceptions import ConnectorException
    from psycopg import Error

    try:
        yield
    except (ConnectorException, Error) as error:
        drop_secrets(error)
        raise JournalError(f"queue: {error.__cause__ or error}") from error


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigurationError(f"PostgreSQL needs {package}: pip install 'lianlian-async[postgres]'") from None
