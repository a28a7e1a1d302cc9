"""Check all refunds of a file before the first one is sent, and look them up in the journal."""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from decimal import Decimal
from functools import cached_property
from typing import Any, Final, NamedTuple

import anyio
import anyio.to_thread
import attrs
import click

from lianlian_async import wire
from lianlian_async.cli.options import check_partner, is_dsn
from lianlian_async.cli.stores import make_reader
from lianlian_async.errors import InvalidRequest, LianLianError, Problem, RefundConflict
from lianlian_async.identity import check_request
from lianlian_async.journal import Entry, Journal, SqliteReader, State
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.worker_pool import run_workers

from .formats import plain_date, plain_money
from .rows import Columns, Row, damaged, read_rows, rounded

_PAGE: Final = 500
_KEPT: Final = 50
_SCHEMA: Final = """
PRAGMA journal_mode = off;
CREATE TABLE refunds (line INTEGER PRIMARY KEY, no_refund TEXT UNIQUE, fields TEXT, cells TEXT, problem TEXT);
BEGIN;
"""
_READ_PAGE: Final = (
    "SELECT line, no_refund, fields, cells FROM refunds WHERE line > ? AND problem IS NULL ORDER BY line LIMIT ?"
)
_READ_UNSENT: Final = "SELECT line, fields, cells, problem FROM refunds WHERE problem IS NOT NULL ORDER BY line"
_TOTALS: Final = """
WITH valid AS (
    SELECT line, coalesce(json_extract(fields, '$.no_order'), json_extract(fields, '$.oid_paybill')) AS order_number,
           CAST(replace(json_extract(fields, '$.money_refund'), '.', '') AS INTEGER) AS fen
    FROM refunds WHERE problem IS NULL
)
SELECT count(*), coalesce(sum(fen), 0), coalesce((SELECT line FROM valid ORDER BY fen DESC LIMIT 1), 0),
       coalesce(max(fen), 0), (SELECT count(*) FROM (SELECT 1 FROM valid GROUP BY order_number HAVING count(*) > 1))
FROM valid
"""


class FileTotals(NamedTuple):
    """The totals of the valid refunds in a file."""

    refunds: int
    yuan: Decimal
    largest_line: int
    largest_yuan: Decimal
    orders_with_several: int
    """Order numbers (``oid_paybill`` if there is no ``no_order``) with more than one refund."""


class Line(NamedTuple):
    """A refund of the file: its line number, its request, and the text of each cell by column."""

    line: int
    request: RefundRequest
    cells: Mapping[str, str]


def _line_of(number: int, _no_refund: str, fields: str, cells: str) -> Line:
    return Line(number, RefundRequest.from_record(json.loads(fields)), json.loads(cells))


@attrs.define
class Notes:
    """Notes about lines of the file. ``count`` counts all notes; ``lines`` keeps the first 50."""

    count: int = 0
    lines: list[tuple[int, str]] = attrs.field(factory=list)

    def add(self, line: int, text: str) -> None:
        """Add a note about a line."""
        self.count += 1
        if self.count <= _KEPT:
            self.lines.append((line, text))


class Checked:
    """The lines of a file, in its order: valid refunds, and lines that cannot be sent.

    A temporary SQLite database stores them, so an edit of the input file cannot change what is sent after the check.
    """

    def __init__(self, merchant: Merchant | None, options: Mapping[str, Any]) -> None:
        """``options``: values of ``READING_OPTIONS``, and ``queue`` for a queue.

        Without merchant, a wrong oid_partner and a missing notify_url are not detected.
        """
        read_date, read_money = options["read_date"] or plain_date, options["read_money"] or plain_money
        self._merchant = merchant
        self._readers = {"dt_refund": read_date, "dt_order": read_date, "money_refund": read_money}
        self._derive: bool = options["derive"]
        self._dt_refund: str | None = options["dt_refund"]
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._file.executescript(_SCHEMA)
        # A queue's merchant is not known here, so its number could not be checked.
        self.columns = Columns(options["renamed"], options["ignore_unknown"], has_partner=not options.get("queue"))
        self.problems = Notes()
        """Lines that cannot be sent."""
        self.remarks = Notes()
        """Valid lines that a person should check."""

    def close(self) -> None:
        """Delete the temporary file."""
        self._file.close()

    def add(self, row: Row) -> None:
        """Check one row, and store it with its problem, if it has one."""
        cells = json.dumps(dict(row.cells))
        try:
            problem = row.problem or self._store(row, self._request(row), cells)
        except InvalidRequest as error:
            problem = str(error)
        if problem:
            self.problems.add(row.line, problem)
            self._do("INSERT OR IGNORE INTO refunds VALUES (?, NULL, NULL, ?, ?)", row.line, cells, problem)
        elif row.remark:
            self.remarks.add(row.line, row.remark)

    def _request(self, row: Row) -> RefundRequest:
        fields = dict(row.fields)
        partner = fields.pop("oid_partner", None)
        if self._dt_refund is not None:
            fields.setdefault("dt_refund", self._dt_refund)
        problems = list(damaged(fields))
        for name in [name for name in self._readers if name in fields]:
            try:
                fields[name] = self._readers[name](text := fields[name])
            except ValueError as error:
                problems.append(Problem(name, str(error), repr(text[:40])))
        if problems:
            raise InvalidRequest(problems)
        if self._derive and "no_refund" not in fields:
            if {"no_order", "oid_paybill"} <= fields.keys():  # with only one of the two, the number would differ
                rule = "is required in a line with no_order and oid_paybill"
                raise InvalidRequest([Problem("no_refund", rule, "no")])
            request = RefundRequest.from_dict({**fields, "no_refund": "derived"})
            request = attrs.evolve(request, no_refund=derived_number(request))
        else:
            request = RefundRequest.from_dict(fields)
        if self._merchant is not None:
            if partner is not None:
                check_partner(partner, self._merchant)
            if request.notify_url is None and self._merchant.notify_url is None:
                raise InvalidRequest([Problem("notify_url", "required in the file or for the merchant", "neither")])
        return request

    def _store(self, row: Row, request: RefundRequest, cells: str) -> str | None:
        """Store a request; return a problem if an earlier line has the same ``no_refund`` and other fields.

        Two lines with the same derived ``no_refund`` are always a problem: they may be one refund or two.
        """
        line, number, record = row.line, request.no_refund, request.to_dict()
        fields = json.dumps(record)
        if self._do("INSERT OR IGNORE INTO refunds VALUES (?, ?, ?, ?, NULL)", line, number, fields, cells).rowcount:
            for remark in rounded(record):
                self.remarks.add(line, remark)
            return None
        find = "SELECT line, fields, problem FROM refunds WHERE no_refund = ?"
        first, known, problem = self._do(find, number).fetchone()
        if problem:
            return f"no_refund {number} is used for different refunds, see line {first}"
        is_derived = "no_refund" not in row.fields
        if fields == known and not is_derived:
            remark = f"repeats line {first}: refund {number} is made at most once"
            self.remarks.add(line, remark)
            self._do("INSERT INTO refunds VALUES (?, NULL, ?, ?, ?)", line, fields, cells, remark)
            return None
        # Refuse both lines: the file does not show which one is correct.
        other = json.loads(known)
        field = next((name for name in (*record, *other) if record.get(name) != other.get(name)), "")
        problem = f"no_refund {number} has a different {field} on line"
        if is_derived:
            problem = "no_refund is required in both lines, because the order and the amount are the same on line"
        self.problems.add(first, f"{problem} {line}")
        self._do("UPDATE refunds SET problem = ?, fields = NULL WHERE line = ?", f"{problem} {line}", first)
        return f"{problem} {first}"

    @cached_property
    def totals(self) -> FileTotals:
        """The totals of the valid refunds, after the last line was added."""
        count, fen, line, largest, orders = self._do(_TOTALS).fetchone()
        return FileTotals(count, Decimal(fen) / 100, line, Decimal(largest) / 100, orders)

    async def lines(self) -> AsyncGenerator[Line]:
        """Yield the valid refunds. Another thread reads them from disk."""
        async for page in self.pages():
            for row in page:
                yield _line_of(*row)

    async def pages(self) -> AsyncGenerator[list[tuple[int, str, str, str]]]:
        """Yield pages of up to 500 rows: line, ``no_refund``, fields and cells as JSON. Another thread reads them."""
        line = 0
        while rows := await anyio.to_thread.run_sync(lambda after: self._do(_READ_PAGE, after, _PAGE).fetchall(), line):
            line = rows[-1][0]
            yield rows

    def lines_after(self, line: int) -> Iterator[Line]:
        """Yield the valid refunds after a line. The calling thread reads them from disk."""
        for row in self._do(_READ_PAGE, line, -1):
            yield _line_of(*row)

    def unsent_lines(self) -> Iterator[tuple[int, dict[str, str] | None, dict[str, str], str]]:
        """Yield line, fields, cells and problem of each line not to be sent. The calling thread reads from disk.

        The fields are None if the line is invalid. Otherwise the line repeats an earlier line.
        """
        for line, fields, cells, problem in self._do(_READ_UNSENT):
            yield line, json.loads(fields or "null"), json.loads(cells), problem

    def _do(self, statement: str, *parameters: object) -> sqlite3.Cursor:
        try:
            return self._file.execute(statement, parameters)
        except sqlite3.Error as error:
            raise LianLianError(f"temporary file: {error}; set SQLITE_TMPDIR to a folder with more space") from error


def derived_number(request: RefundRequest) -> str:
    """Return the ``no_refund`` for ``--derive``. The same order and amount must give the same number in every release.

    No other field changes it, so a later run with more columns or another ``dt_refund`` makes no second refund.
    """
    order = ["no_order", request.no_order] if request.no_order else ["oid_paybill", request.oid_paybill]
    content = json.dumps([order, wire.format_money(request.money_refund)])
    return "LL" + hashlib.sha256(content.encode()).hexdigest()[:30].upper()


@contextmanager
def checked_file(
    file: str, merchant: Merchant | None, options: Mapping[str, Any], note: Callable[[str], object]
) -> Iterator[Checked]:
    """Check the lines of ``file``, pass the kept problems and remarks to ``note``, and yield the refunds."""
    with closing(Checked(merchant, options)) as checked:
        with click.open_file(file, "rb") as stream:
            for row in read_rows(stream, file, checked.columns, options["encoding"]):
                checked.add(row)
        for notes in (checked.problems, checked.remarks):
            for line, text in notes.lines:
                note(f"line {line}: {text}")
            if more := notes.count - len(notes.lines):
                note(f"… and {more} more")
        yield checked


@attrs.define
class InJournal:
    """What the journal knows about the refunds of a batch."""

    found: Counter[str]
    """Number of refunds by state: new (not begun, or certainly not made), made, open; rejected and conflict if any."""
    new_yuan: Decimal
    journal_id: str | None = None
    """None: the journal does not exist yet."""


async def look_up(checked: Checked, place: str) -> InJournal:
    """Look up all refunds in the journal at ``place``, in bounded memory."""
    in_journal = InJournal(Counter(new=checked.totals.refunds, made=0, open=0), checked.totals.yuan)
    if is_dsn(place) or await anyio.Path(place).exists():
        async with make_reader(place) as journal:
            in_journal.journal_id = journal.id
            async for page in checked.pages():
                requests = {number: json.loads(fields) for _, number, fields, _ in page}
                for entry in await _find_all(journal, list(requests)):
                    request = requests[entry.no_refund]
                    if (word := _word(entry, request)) is not None:
                        in_journal.found.update({word: 1, "new": -1})
                        in_journal.new_yuan -= Decimal(request["money_refund"])
    return in_journal


def _word(entry: Entry, request: Mapping[str, str]) -> str | None:
    """Return the summary's word for the state of a recorded request; None if it counts as a new refund."""
    try:
        check_request(entry.no_refund, request, entry.fields)
    except RefundConflict:
        return str(State.CONFLICT)
    if entry.ending is None and entry.sent_at is None:
        return None
    open_or_made = "made" if entry.state.is_made else "open"
    return str(entry.state) if entry.state in (State.REJECTED, State.CONFLICT) else open_or_made


async def _find_all(journal: SqliteReader | Journal, numbers: Sequence[str]) -> list[Entry]:
    if isinstance(journal, SqliteReader):
        return await journal.find_all(numbers)
    entries = list[Entry]()

    async def find(number: str) -> None:
        if (entry := await journal.find(number)) is not None:
            entries.append(entry)

    # The journal batches concurrent calls into a few database queries.
    await run_workers(numbers, find, workers=_PAGE, intake=anyio.CancelScope())
    return entries
