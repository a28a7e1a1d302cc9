"""Find and open journals and queues. A receipt records which journal was used to send a file of refunds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import attrs
import click

from lianlian_async.background import complete
from lianlian_async.errors import ConfigurationError, JournalError
from lianlian_async.journal import Journal, SqliteJournal, SqliteReader
from lianlian_async.journal.files import sync_folders
from lianlian_async.journal.sqlite_file import check_file
from lianlian_async.merchant import Merchant
from lianlian_async.secret import drop_secrets

from .options import JOURNAL, is_dsn, load_merchant
from .output import local_time

if TYPE_CHECKING:
    from lianlian_async.contrib.procrastinate import RefundQueue


def make_journal(place: str) -> Journal:
    """Create the unopened journal object for ``place``."""
    return _of_extra("journal.postgres", "PostgresJournal")(place) if is_dsn(place) else SqliteJournal(place)


def make_reader(place: str) -> SqliteReader | Journal:
    """Create an object that reads the journal at ``place``, even while another process has it open."""
    return make_journal(place) if is_dsn(place) else SqliteReader(place)


@asynccontextmanager
async def open_reader(place: str, warn: Callable[[str], object]) -> AsyncGenerator[Journal]:
    """Open the journal at ``place`` for reading. ``warn`` gets the reason if this journal cannot be used to send."""
    async with make_reader(place) as reader:
        if isinstance(reader, SqliteReader) and reader.problem:
            warn(f"warning: {place}: {reader.problem}")
        yield reader


@asynccontextmanager
async def open_queue(dsn: str) -> AsyncGenerator[RefundQueue]:
    """Open the queue at ``dsn``; create its schema if it does not exist."""
    queue = _of_extra("contrib.procrastinate", "RefundQueue")(dsn)
    with queue_errors():
        async with queue:
            yield queue


async def read_queue(dsn: str) -> dict[str, Any]:
    """Return the counts (``queue``, empty if there is no queue), oldest failures and activity of the queue at ``dsn``.

    See :class:`.RefundQueue`.
    """
    queue = _of_extra("contrib.procrastinate", "RefundQueue")(dsn)
    with queue_errors():
        async with AsyncExitStack() as stack:
            stack.push_async_callback(complete, queue.app.close_async)  # also if opening is cancelled
            await queue.app.open_async()
            if await queue.app.check_connection_async():
                counts, failures = await queue.counts(), await queue.failures()
                return {"queue": dict(counts), "failures": list(failures), **await queue.activity()}
    return {"queue": {}}


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


def _of_extra(module: str, name: str) -> Any:
    """Return a class from a module that needs the extra ``postgres``."""
    try:
        return getattr(import_module(f"lianlian_async.{module}"), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigurationError(f"PostgreSQL needs {package}: pip install 'lianlian-async[postgres]'") from None


_CONTAINER_FILES: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))
_HOME: Final = "HOME" if os.name == "posix" else "LOCALAPPDATA"
_NAME_IT: Final = f"name the journal with --journal or {JOURNAL}: a file on a persistent disk, or postgresql://…"
_LOST: Final = (
    "if that is not possible, wait 15 minutes after the last run, then use --accept-new-journal --query-first, and "
    "--journal DSN in place of --queue; each refund is then queried before it is sent"
)


def default_place(merchant: Merchant) -> str:
    """Return the path of the default journal: one for each merchant and apply endpoint.

    Raises a usage error in a container, where the file would not persist, and without a home folder.
    """
    if os.environ.get("KUBERNETES_SERVICE_HOST") or any(path.exists() for path in _CONTAINER_FILES):
        raise click.UsageError(f"a container loses its files when it ends: {_NAME_IT}")
    if not Path(os.environ.get(_HOME) or os.devnull).is_dir():
        raise click.UsageError(f"{_HOME} is not a folder: {_NAME_IT}")
    endpoint = hashlib.sha256(merchant.endpoints.apply.encode()).hexdigest()[:8]
    folder = Path(click.get_app_dir("lianlian", roaming=False), "journals")
    return str(folder / f"{merchant.oid_partner}-{endpoint}.sqlite")


def find_journal(place: str | None, config: Path | None, *, exists: bool = True) -> str:
    """Return ``place``, or the default journal of the configured merchant.

    Raises a usage error if there is no default journal, or if ``exists`` and the journal is a missing file;
    ``JournalError`` if only the file's WAL is left.
    """
    try:
        found = place or default_place(load_merchant(config))
    except ConfigurationError as error:
        raise click.UsageError(f"{error}; or {_NAME_IT}") from None
    if exists and not is_dsn(found):
        check_file(Path(found))
        if not Path(found).is_file():
            raise click.UsageError(f"{found}: there is no such journal; `lianlian batch` creates it, or {_NAME_IT}")
    return found


def make_folder(place: str) -> None:
    """Create the folder of a default journal with mode 0700, durably; raises a usage error."""
    folder = Path(place).parent
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folders(*(each.parent for each in missing))  # SQLite syncs only the folder of its file
    except OSError as error:
        raise click.UsageError(f"{place}: {error.strerror}; {_NAME_IT}") from None


@attrs.frozen
class Receipt:
    """The journal used for a file: one JSON line in ``FILE.receipt`` for each merchant and endpoint."""

    journal: str
    """Id of the journal."""
    place: str
    oid_partner: str | None
    """None, like ``apply_url``, if the journal of a queue had no owner yet."""
    apply_url: str | None
    sent_until: str = ""
    """The latest time of a send, written ahead in case the batch is killed."""
    query_first: bool = False
    """Whether a run has used --query-first: the journal may lack refunds that were made."""

    def check(self, path: Path, *, accept_new: bool, grace: float) -> list[Receipt]:
        """Return the receipts of other merchants and gateways, which :meth:`write` keeps.

        Raises a usage error if an earlier run has used --query-first, but this one does not; or if the file was sent
        with another journal or to another https host before, or the receipt is unreadable, unless ``accept_new`` is
        true and ``grace`` seconds have passed since the last send: the gateway may show this refund late. A sandbox
        has no https, and another path is another product with other orders.
        """
        problem, others = "", list[Receipt]()
        try:
            known = [Receipt(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
            last = max(datetime.fromisoformat(one.sent_until) for one in known)  # ValueError if the file is empty
        except FileNotFoundError:
            return others
        except (OSError, TypeError, ValueError):
            problem = f"{path} cannot be read as a receipt of a journal: put the receipt of the last run back"
            last = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        else:
            for one in known:
                owners = {(each.oid_partner, each.apply_url) for each in (one, self)}
                if len(owners - {(None, None)}) == 2:
                    first, second = one.apply_url or "", self.apply_url or ""
                    is_real = first.startswith("https:") and second.startswith("https:")
                    is_same = one.oid_partner == self.oid_partner and urlsplit(first).path == urlsplit(second).path
                    if is_real and is_same:
                        problem = f"{path}: until {one.sent_until} this file was sent to {first}: use it, not {second}"
                    else:
                        others.append(one)
                elif one.journal != self.journal:
                    problem = (
                        f"{path}: until {one.sent_until} this file was sent with the journal {one.place}. The journal "
                        f"{self.place} may not know the refunds of this file: use the first journal"
                    )
                elif one.query_first and not self.query_first:
                    raise click.UsageError(
                        f"{path}: an earlier run has used --query-first, because the journal may lack refunds of this "
                        "file: use --query-first again, and not --queue"
                    )
        if problem and not accept_new:
            raise click.UsageError(f"{problem}; {_LOST}")
        if problem and (until := last.astimezone() + timedelta(seconds=grace)) > datetime.now().astimezone():
            raise click.UsageError(f"{problem}; LianLian may show a refund late, so wait until {local_time(until)}")
        return others

    def write(self, path: Path, others: Iterable[Receipt], seconds: float, *, is_first: bool) -> None:
        """Replace the file durably: write ``others`` and this receipt, valid for sends in the next ``seconds``.

        Raises ``FileExistsError`` if ``is_first``, and the file exists: two batches have checked it at the same time.
        """
        until = (datetime.now().astimezone() + timedelta(seconds=seconds)).isoformat(timespec="seconds")
        receipts = (*others, attrs.evolve(self, sent_until=until))
        with TemporaryDirectory(prefix="receipt-", dir=path.parent) as folder:
            new = Path(folder, path.name)
            with new.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(attrs.asdict(one)) + "\n" for one in receipts)
                file.flush()
                os.fsync(file.fileno())
            if is_first:
                path.touch(exist_ok=False)
            new.replace(path)
        sync_folders(path.parent)
