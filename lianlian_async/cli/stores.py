"""Places of journals and queues, functions that open them, and the receipt that records a file's journal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import attrs
import click
from click.core import ParameterSource

from lianlian_async.background import complete
from lianlian_async.errors import ConfigurationError, JournalError
from lianlian_async.journal import Journal, SqliteJournal, SqliteReader
from lianlian_async.journal.sqlite_file import sync_folders
from lianlian_async.merchant import Merchant
from lianlian_async.secret import drop_secrets, without_locals

if TYPE_CHECKING:
    from lianlian_async.contrib.procrastinate import RefundQueue

    from .options import Command

DSN: Final = "LIANLIAN_DSN"
JOURNAL: Final = "LIANLIAN_JOURNAL"


def is_dsn(place: str) -> bool:
    """Whether a place is a PostgreSQL URL."""
    return place.startswith(("postgresql://", "postgres://"))


def place_name(place: str) -> str:
    """Return a place for display, without the password of a DSN."""
    return "in PostgreSQL" if is_dsn(place) else place


class Place(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """The place of a journal: a path, or a PostgreSQL URL without a password.

    Other processes of this machine can read a password on the command line. ``exists``: refuse a path without a file;
    ``only_dsn``: refuse every path, and replace an empty place by the URL in ``LIANLIAN_DSN``.
    """

    name = "place"

    def __init__(self, *, exists: bool = False, only_dsn: bool = False) -> None:
        self._exists = exists
        self._only_dsn = only_dsn

    @without_locals
    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return ``value``; no message contains it, as it may be a connection string with a password."""
        place = value or (os.environ.get(DSN, "") if self._only_dsn else "")
        if not is_dsn(place):
            if self._only_dsn or "://" in place:
                wanted = f"URL postgresql://…, here or in {DSN}" if self._only_dsn else "path or a URL postgresql://…"
                self.fail(f"must be a {wanted}")
            if self._exists and not Path(place).is_file():
                self.fail("no such journal; for a database use postgresql://…")
        elif value and ctx and ctx.get_parameter_source(str(param and param.name)) is ParameterSource.COMMANDLINE:
            try:
                parts = urlsplit(place)
                has_password = parts.password is not None or "password" in parse_qs(parts.query)
            except ValueError:
                raise click.BadParameter("not a PostgreSQL URL") from None
            if has_password:
                self.fail(
                    f"other processes can read a password on the command line: put the URL into {DSN}, or the password "
                    "into PGPASSWORD or ~/.pgpass"
                )
        return place


place_argument: Final = click.argument("place", metavar="PATH|DSN", envvar=[DSN, JOURNAL], type=Place(exists=True))
"""The argument PATH|DSN: the place of an existing journal."""
dsn_argument: Final = click.argument("dsn", metavar="DSN", envvar=DSN, type=Place(only_dsn=True))
"""The argument DSN: the place of a queue."""


def journal_option(*, exists: bool = True) -> Callable[[Command], Command]:
    """Return a decorator that adds the option --journal: the place of a journal."""
    option: dict[str, Any] = {"metavar": "PATH|DSN", "envvar": [DSN, JOURNAL], "show_envvar": True, "required": True}
    return click.option("--journal", "place", type=Place(exists=exists), help="The journal.", **option)


def make_journal(place: str) -> Journal:
    """Create the unopened journal object for ``place``."""
    return _postgres_journal(place) if is_dsn(place) else SqliteJournal(place)


def make_reader(place: str) -> SqliteReader | Journal:
    """Create an object that reads the journal at ``place``, even while another process has it open."""
    return _postgres_journal(place) if is_dsn(place) else SqliteReader(place)


def _postgres_journal(dsn: str) -> Journal:
    with _extra():
        from lianlian_async.journal.postgres import PostgresJournal
    return PostgresJournal(dsn)


@asynccontextmanager
async def open_queue(dsn: str) -> AsyncGenerator[RefundQueue]:
    """Open the queue at ``dsn``; create its schema if it does not exist."""
    with _extra():
        from lianlian_async.contrib.procrastinate import RefundQueue
    with queue_errors():
        async with RefundQueue(dsn) as queue:
            yield queue


async def read_queue(dsn: str) -> tuple[dict[str, int], Sequence[Mapping[str, str | None]], Mapping[str, Any]]:
    """Return counts, oldest failures and activity of the queue at ``dsn``; empty ones if there is no queue."""
    with _extra():
        from lianlian_async.contrib.procrastinate import RefundQueue
    queue = RefundQueue(dsn)
    with queue_errors():
        async with AsyncExitStack() as stack:
            stack.push_async_callback(complete, queue.app.close_async)  # also if opening is cancelled
            await queue.app.open_async()
            if await queue.app.check_connection_async():
                return dict(await queue.counts()), await queue.failures(), await queue.activity()
    return {}, (), {}


@contextmanager
def queue_errors() -> Iterator[None]:
    """Convert errors of the queue's database to ``JournalError``."""
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


_CONTAINER_FILES: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))
_HOME: Final = "HOME" if os.name == "posix" else "LOCALAPPDATA"
_NAME_IT: Final = f"name the journal with --journal or {JOURNAL}: a file on a persistent disk, or postgresql://…"
_LOST: Final = (
    "if that journal is lost, use --accept-new-journal --query-first: it queries each refund before sending it"
)


def default_place(merchant: Merchant) -> str:
    """Return the path of the default journal: one for each merchant and apply endpoint.

    Raises a usage error if the file would not persist.
    """
    if os.environ.get("KUBERNETES_SERVICE_HOST") or any(path.exists() for path in _CONTAINER_FILES):
        raise click.UsageError(f"a container loses its files when it ends: {_NAME_IT}")
    if not Path(os.environ.get(_HOME) or os.devnull).is_dir():
        raise click.UsageError(f"{_HOME} is not a folder: {_NAME_IT}")
    endpoint = hashlib.sha256(merchant.endpoints.apply.encode()).hexdigest()[:8]
    folder = Path(click.get_app_dir("lianlian", roaming=False), "journals")
    return str(folder / f"{merchant.oid_partner}-{endpoint}.sqlite")


def make_folder(place: str) -> None:
    """Create the folder of a default journal with mode 0700, durably; raises a usage error."""
    folder = Path(place).parent
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folders(*(each.parent for each in missing))  # SQLite syncs the names in its own folder only
    except OSError as error:
        raise click.UsageError(f"{place}: {error.strerror}; {_NAME_IT}") from None


@attrs.frozen
class Receipt:
    """The journal used for a file: one JSON line in ``FILE.receipt`` for each merchant and endpoint."""

    journal: str
    """Id of the journal."""
    place: str
    oid_partner: str
    apply_url: str
    written_at: str = attrs.field(factory=lambda: datetime.now().astimezone().isoformat(timespec="seconds"))

    def check(self, path: Path, *, accept_new: bool) -> list[Receipt]:
        """Return the receipts of other merchants and endpoints, which :meth:`write` keeps.

        Raises a usage error if the file was sent with another journal before, unless ``accept_new``.
        """
        try:
            known = [Receipt(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        except FileNotFoundError:
            return []
        except (OSError, TypeError, ValueError):
            if accept_new:
                return []
            raise click.UsageError(f"{path} cannot be read as a receipt; {_LOST}") from None
        ours = [one for one in known if (one.oid_partner, one.apply_url) == (self.oid_partner, self.apply_url)]
        for other in ours:
            if other.journal != self.journal and not accept_new:
                raise click.UsageError(
                    f"{path}: on {other.written_at} this file was sent with the journal {other.place}. The journal "
                    f"{self.place} may not know its refunds: use --journal {other.place}; {_LOST}"
                )
        return [one for one in known if one not in ours]

    def write(self, path: Path, others: Iterable[Receipt]) -> None:
        """Replace the file with this receipt and ``others``."""
        path.write_text("".join(json.dumps(attrs.asdict(one)) + "\n" for one in (*others, self)), "utf-8")
