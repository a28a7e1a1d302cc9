"""The refunds of a batch, checked before anything is sent: each valid, each number once; on disk, not in memory."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from decimal import Decimal
from types import TracebackType
from typing import Final, Self

import anyio
import anyio.to_thread
import attrs

from lianlian_async import wire
from lianlian_async.cli.options import check_partner
from lianlian_async.cli.stores import is_dsn, make_reader
from lianlian_async.errors import InvalidRequest, LianLianError, Problem
from lianlian_async.journal import Entry, Journal, SqliteReader
from lianlian_async.journal.base import Owner
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.worker_pool import run_workers

from .rows import Row, damaged, rounded

__all__ = ["Checked", "Findings", "Survey", "survey"]

_PAGE: Final = 500
_SCHEMA: Final = """
PRAGMA journal_mode = off;
CREATE TABLE refunds (line INTEGER PRIMARY KEY, no_refund TEXT UNIQUE, fields TEXT, is_clear INTEGER DEFAULT 1,
    is_older INTEGER DEFAULT 0);
CREATE TABLE alike (number TEXT PRIMARY KEY, line INTEGER, times INTEGER);
BEGIN;
"""
_COUNT_ALIKE: Final = "INSERT INTO alike VALUES (?, ?, 1) ON CONFLICT (number) DO UPDATE SET times = times + 1"


@attrs.define
class Findings:
    """Remarks about lines: all are counted, the first ones are kept."""

    kept: int = 50
    count: int = 0
    lines: list[tuple[int, str]] = attrs.field(factory=list)

    def add(self, line: int, text: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= self.kept:
            self.lines.append((line, text))

    def texts(self) -> list[str]:
        """For people."""
        more = [f"… and {self.count - self.kept} more"] if self.count > self.kept else []
        return [*(f"line {line}: {text}" for line, text in self.lines), *more]


class Checked:
    """What passed, in the order of the file.

    It lies in a temporary file of SQLite's, which nobody else can open and which is gone at the end: what was
    checked, counted and agreed to is what is sent, whatever happens to the file meanwhile.
    """

    def __init__(self, merchant: Merchant | None, *, derive: bool, dt_refund: str | None) -> None:
        """``derive`` numbers without ``no_refund``; ``dt_refund`` is for those that have none."""
        self._merchant = merchant
        self._derive = derive
        self._dt_refund = dt_refund
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._file.executescript(_SCHEMA)
        self.count = 0
        self.yuan = Decimal(0)
        self.problems = Findings()
        """Lines that are not sent."""
        self.remarks = Findings()
        """Lines to think about."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    # ── in ───────────────────────────────────────────────────────────────────────────────────────

    def add(self, row: Row) -> None:
        """Check one row."""
        if row.problem is not None:
            self.problems.add(row.line, row.problem)
            return
        try:
            request = self._request(row)
        except InvalidRequest as error:
            self.problems.add(row.line, str(error))
        else:
            self._add(row.line, request)

    def _request(self, row: Row) -> RefundRequest:
        fields = dict(row.fields)
        partner = fields.pop("oid_partner", None)
        if self._dt_refund is not None:
            fields.setdefault("dt_refund", self._dt_refund)
        if problems := list(damaged(fields)):
            raise InvalidRequest(problems)
        if self._derive and "no_refund" not in fields:
            fields |= self._number(row.line, fields)
        request = RefundRequest.from_dict(fields)
        if self._merchant is not None:
            if partner is not None:
                check_partner(partner, self._merchant)
            if request.notify_url is None and self._merchant.notify_url is None:
                raise InvalidRequest([Problem("notify_url", "is required, in the file or for the merchant", "neither")])
        return request

    def _number(self, line: int, fields: Mapping[str, str]) -> dict[str, str]:
        """The ``no_refund`` that a row's own content gives, if it has enough of that."""
        order = [[name, fields[name]] for name in ("no_order", "oid_paybill") if name in fields][:1]
        try:
            money = wire.format_money(wire.parse_money(fields.get("money_refund", "")))
        except ValueError:
            return {}
        if not order:
            return {}
        alike = json.dumps([*order, money])
        self._do(_COUNT_ALIKE, alike, line)
        first, times = self._do("SELECT line, times FROM alike WHERE number = ?", alike).fetchone()
        if times > 1:
            self.remarks.add(line, f"the same order and amount as line {first}: taken for a refund of its own")
        return {"no_refund": derived_number(order, money, times)}

    def _add(self, line: int, request: RefundRequest) -> None:
        number, fields = request.no_refund, json.dumps(request.to_dict())
        if self._do("INSERT OR IGNORE INTO refunds VALUES (?, ?, ?, 1, 0)", line, number, fields).rowcount:
            self._count(1, request)
            for remark in rounded(request.to_dict()):
                self.remarks.add(line, remark)
            return
        found = self._do("SELECT line, fields, is_clear FROM refunds WHERE no_refund = ?", number)
        first, known, is_clear = found.fetchone()
        if not is_clear:
            self.problems.add(line, f"no_refund {number} stands for several refunds, see line {first}")
        elif fields == known:
            self.remarks.add(line, f"repeats line {first}: refund {number} is made once")
        else:  # which of the two is right, nobody here can tell
            earlier = RefundRequest.from_record(json.loads(known))
            field = _difference(request.to_dict(), earlier.to_dict())
            self.problems.add(line, f"no_refund {number} stands on line {first} with another {field}")
            self.problems.add(first, f"no_refund {number} stands on line {line} with another {field}")
            self._do("UPDATE refunds SET is_clear = 0 WHERE line = ?", first)
            self._count(-1, earlier)

    def _count(self, step: int, request: RefundRequest) -> None:
        self.count += step
        self.yuan += step * request.money_refund

    # ── out ──────────────────────────────────────────────────────────────────────────────────────

    async def requests(self, *, older: bool = False) -> AsyncGenerator[RefundRequest]:
        """All that passed, either those marked as ``older`` or the others; the event loop never waits for the disk."""
        async for page in self._pages():
            for _, fields, is_older in page:
                if older is bool(is_older):
                    yield RefundRequest.from_record(json.loads(fields))

    async def numbers(self) -> AsyncGenerator[list[str]]:
        """The ``no_refund`` of all that passed, some hundred at a time."""
        async for page in self._pages():
            yield [number for number, _, _ in page]

    async def mark_older(self, numbers: Iterable[str]) -> None:
        """Mark refunds that stand in an older journal only."""
        rows = [(number,) for number in numbers]
        mark = "UPDATE refunds SET is_older = 1 WHERE no_refund = ?"
        await anyio.to_thread.run_sync(self._file.executemany, mark, rows)

    async def _pages(self) -> AsyncGenerator[list[tuple[str, str, int]]]:
        line = 0
        while page := await anyio.to_thread.run_sync(self._page, line):
            line = page[-1][0]
            yield [row[1:] for row in page]

    def _page(self, after: int) -> list[tuple[int, str, str, int]]:
        wanted = (
            "SELECT line, no_refund, fields, is_older FROM refunds WHERE line > ? AND is_clear ORDER BY line LIMIT ?"
        )
        return self._do(wanted, after, _PAGE).fetchall()

    def _do(self, statement: str, *parameters: object) -> sqlite3.Cursor:
        try:
            return self._file.execute(statement, parameters)
        except sqlite3.Error as error:
            raise LianLianError(f"temporary file: {error}; SQLITE_TMPDIR names a folder with more room") from error


def _difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    return next(name for name in (*one, *other) if one.get(name) != other.get(name))


def derived_number(order: object, money: str, times: int) -> str:
    """A ``no_refund`` for the ``times``-th refund of ``money`` yuan for one order: always the same.

    Whatever else the row holds plays no part: a later run with more columns, or with another ``dt_refund``, must
    not make a second refund of it.
    """
    content = json.dumps([order, money, times])
    return "LL" + hashlib.sha256(content.encode()).hexdigest()[:30].upper()


_AT_ONCE = 500


@attrs.define
class Survey:
    """How the refunds of a batch stand in its journal, and in an older one that lies beside the file."""

    place: str
    older: str | None
    """``FILE.journal``, as earlier releases made it; None if there is none."""
    journal_id: str | None = None
    """None: the journal is not made yet."""
    total: int = 0
    resolved: int = 0
    open: int = 0
    in_older: int = 0
    """How many of the resolved and open ones stand only in ``older``."""

    @property
    def new(self) -> int:
        """How many were never sent, as far as the journals know."""
        return self.total - self.resolved - self.open

    @property
    def name(self) -> str:
        """The journal's place, without a password."""
        return "in PostgreSQL" if is_dsn(self.place) else self.place

    def counts(self) -> dict[str, int]:
        """For tables and JSON."""
        return {"new": self.new, "resolved": self.resolved, "open": self.open}

    def notes(self, *, query_first: bool) -> list[str]:
        """For people, before they agree."""
        counts = f"{self.new:,} of these refunds are new, {self.resolved:,} resolved, {self.open:,} open"
        told = [f"journal {self.name}: {counts}"]
        if self.in_older:
            told.append(f"{self.in_older:,} of them stand in {self.older} only, and are carried on there")
        if self.journal_id is None and not query_first:
            told.append(
                "this journal is new, so all count as never sent; if some may have been sent before, say "
                "--query-first: each is asked about before it is sent"
            )
        return told


async def survey(checked: Checked, owner: Owner, place: str, older: str | None) -> Survey:
    """Look up all refunds, in bounded memory; marks in ``checked`` those that stand only in ``older``.

    An older journal of another merchant or endpoint than ``owner`` says nothing about these refunds.
    """
    found = Survey(place, None, total=checked.count)
    async with AsyncExitStack() as stack:
        journals = list[SqliteReader | Journal]()
        if is_dsn(place) or await anyio.Path(place).exists():
            journals.append(await stack.enter_async_context(make_reader(place)))
            found.journal_id = journals[0].id
        if older is not None:
            reader = await stack.enter_async_context(SqliteReader(older))
            if reader.owner in (None, owner):
                journals.append(reader)
                found.older = older
        async for numbers in checked.numbers():
            rest = set(numbers)
            for journal in journals:
                begun = [entry for entry in await _find(journal, sorted(rest)) if entry.ending or entry.sent_at]
                found.resolved += sum(entry.ending is not None for entry in begun)
                found.open += sum(entry.ending is None for entry in begun)
                rest.difference_update(entry.no_refund for entry in begun)
                if found.older is not None and journal is journals[-1]:
                    found.in_older += len(begun)
                    await checked.mark_older(entry.no_refund for entry in begun)
    return found


async def _find(journal: SqliteReader | Journal, numbers: Sequence[str]) -> list[Entry]:
    if isinstance(journal, SqliteReader):
        return await journal.find_all(numbers)
    entries = list[Entry]()

    async def find(number: str) -> None:
        if (entry := await journal.find(number)) is not None:
            entries.append(entry)

    await run_workers(numbers, find, workers=_AT_ONCE, intake=anyio.CancelScope())  # in a few queries
    return entries
