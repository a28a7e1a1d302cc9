"""Compare LianLian's statements with a journal: find refunds that one of the two lacks, and refunds that differ.

The input is lines of text and journal entries, the output is a verdict for each refund. The rows are kept in a
temporary SQLite file, so that memory grows by little more than a byte per agreeing row. All methods block their thread.

A statement is not signed, and no public sample of a refund row exists. So a row counts only if every column that is
used has its documented form. Rows that lack it are reported with their line; no column is guessed.
"""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Final, NamedTuple

from . import wire
from .errors import AnswerMismatch, RefundConflict
from .identity import check_identity
from .journal import Entry, State
from .models import RefundStatus

_NAME: Final = re.compile(r"JYMX_([A-Za-z0-9]{1,18})_([0-9]{6}(?:[0-9]{2})?)\.txt")
_SUMMARY: Final = re.compile(r"(?:[^|]*\|){3}([0-9]*)\|(-?[0-9]+(?:\.[0-9]+)?)?(?:\|[^|]*){2}")
"""7 columns. Column 4 is the number of refunds in the statement, column 5 their sum, which is negative."""
_FORMS: Final = {
    "status": (re.compile("[05]"), "0 or 5"),
    "direction": (re.compile("[01]"), "0 or 1"),
    "no_refund": (re.compile(r".{1,32}"), "1 to 32 characters"),
    "oid_partner": (re.compile("[A-Za-z0-9]{1,18}"), "1 to 18 letters or digits"),
    "dt_refund": (re.compile("[0-9]{8} ?[0-9]{2}:?[0-9]{2}:?[0-9]{2}"), "a time such as 20261101 10:20:30"),
    "currency": (re.compile("CNY"), "CNY"),
    "money_refund": (re.compile(r"-[0-9]{1,9}(\.[0-9]{1,9})?"), "a negative amount such as -88.5"),
}
"""The documented forms of the columns that are used."""
_STORED: Final = ("no_refund", "oid_partner", "dt_refund", "money_refund", "evidence")


class StatementError(ValueError):
    """A file is not a statement, or does not match the other files."""


class Verdict(StrEnum):
    """The result of the comparison for one refund."""

    AGREES = "agrees"
    AMOUNT_DIFFERS = "amount_differs"
    NOT_IN_JOURNAL = "not_in_journal"
    """In the statement, but the journal has no refund that was made with this number, merchant and ``dt_refund``."""
    TWICE_IN_STATEMENT = "twice_in_statement"
    MISSING_IN_STATEMENT = "missing_in_statement"
    """Successful in the journal; the statements of its day and of the next day lack it."""
    UNKNOWN_PROVED = "unknown_proved"
    """In the statement; the journal does not know whether it was made."""
    OUTSIDE_PERIOD = "outside_period"
    """Successful in the journal; the statement of its day or of the next day was not given."""


_NOT_LISTED: Final = (Verdict.AGREES, Verdict.OUTSIDE_PERIOD)


class _Layout(NamedTuple):
    """The columns of a statement: their delimiter, their number, and the index of each field (from 0)."""

    delimiter: str
    width: int
    columns: Mapping[str, int]

    @classmethod
    def of(cls, line: str, place: str) -> "tuple[_Layout, bool]":
        """Return the layout of a statement, and whether its first ``line`` is a header; ``place`` names the line."""
        cells = line.split(",")
        if len(cells) >= _DOMESTIC.width:
            return _DOMESTIC, not re.search("[0-9]", "".join(cells[:9]))
        names = [name.strip() for name in line.split("|")]
        columns = dict[str, int]()
        for field, known in _HEADER.items():
            if not (found := [name for name in known if name in names]):
                wanted = f"a row of {_DOMESTIC.width} columns nor a header with {' or '.join(known)}"
                raise StatementError(f"{place}: is neither {wanted}")
            columns[field] = names.index(found[0])
        if "money_refund" in names:
            del columns["currency"]
        return cls("|", len(names), columns), True

    def read(self, line: str) -> tuple[str, str, str, str] | None:
        """Return number, merchant, time, amount of a refund; None: a payment. ``ValueError`` says what is wrong."""
        cells = line.split(self.delimiter)
        if len(cells) < self.width or (len(cells) > self.width and self is not _DOMESTIC):
            raise ValueError(f"the row has {len(cells)} columns, but needs {self.width}")
        fields = dict[str, str]()
        for field, column in self.columns.items():
            if field == "no_refund" and fields["status"] == "0":  # the row is a payment, not a refund
                return None
            text, (form, example) = cells[column].strip(), _FORMS[field]
            if text.startswith('="') and text.endswith('"'):  # for Excel: the cell is text
                text = text[2:-1]
            if not form.fullmatch(text):
                raise ValueError(f"column {column + 1} ({field}): {text!r} is not {example}")
            fields[field] = text
        time, money = fields["dt_refund"].replace(" ", "").replace(":", ""), fields["money_refund"].removeprefix("-")
        return fields["no_refund"], fields["oid_partner"], time, money


_DOMESTIC: Final = _Layout(
    ",", 14, {"status": 8, "direction": 7, "no_refund": 0, "oid_partner": 1, "dt_refund": 2, "money_refund": 6}
)
"""The last column, ``info_order``, may contain commas. In a refund, a comma before ``status`` makes the row invalid."""
_HEADER: Final = {
    "status": ("transaction_status", "payment_status"),
    "no_refund": ("no_refund",),  # LianLian documents no other name
    "oid_partner": ("oid_partner",),
    "dt_refund": ("dt_refund", "dt_order"),
    "money_refund": ("money_refund", "money_order"),
    "currency": ("currency_order", "money_refund"),
}
"""The possible column names of a cross-border statement, by field."""


class Reconciliation:
    """One comparison: add all statements, compare every entry of the journal, then call :meth:`finish`."""

    def __init__(self) -> None:
        self.oid_partner = ""
        """The merchant of the statements."""
        self.counts: Counter[Verdict] = Counter()
        self.yuan: dict[Verdict, Decimal] = dict.fromkeys(Verdict, Decimal(0))
        self.numbers: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict if verdict not in _NOT_LISTED}
        """Each ``no_refund`` whose verdict needs attention, by verdict."""
        self.unreadable: list[tuple[int, str]] = []
        """Rows that do not count: (line number, message with file and line)."""
        self._periods: set[str] = set()
        self._seen = bytearray()
        """Whether a row was compared, by row id."""
        self._file = sqlite3.connect("", isolation_level=None)
        self._file.executescript(
            f"PRAGMA journal_mode = off; BEGIN; CREATE TABLE refunds (id INTEGER PRIMARY KEY, {', '.join(_STORED)})"
        )

    def add_statement(self, name: str, lines: Iterable[str], summary: str | None = None) -> None:
        """Read the statement with the file name ``name``; ``summary`` is the content of its ``JYMXSUM`` file, if any.

        Raises ``StatementError``: this comparison cannot be used further.
        """
        if (found := _NAME.fullmatch(name)) is None:  # only the file name contains the day
            raise StatementError(f"{name}: must be called JYMX_<oid_partner>_<YYYYMMDD or YYYYMM>.txt")
        partner, period = found.groups()
        if self.oid_partner not in ("", partner):
            raise StatementError(f"{name}: the other statements belong to merchant {self.oid_partner}")
        if any(period.startswith(other) or other.startswith(period) for other in self._periods):
            raise StatementError(f"{name}: another statement covers the same day")
        self.oid_partner = partner
        self._periods.add(period)
        unreadable, sums = len(self.unreadable), [Decimal(0), Decimal(0)]
        self._file.executemany("INSERT INTO refunds VALUES (NULL, ?, ?, ?, ?, ?)", self._rows(name, lines, sums))
        if summary is not None and len(self.unreadable) == unreadable:
            totals = _SUMMARY.fullmatch(summary.strip())
            if totals is None or [Decimal(text or 0) for text in totals.groups()] != sums:
                raise StatementError(f"{name}: {sums[0]} refunds sum to {sums[1]} yuan, but JYMXSUM says {summary!r}")

    def _rows(self, name: str, lines: Iterable[str], sums: list[Decimal]) -> Iterator[tuple[str, ...]]:
        layout = None
        for number, line in enumerate(lines, 1):
            place = f"{name}, line {number}"
            if not line.strip():
                continue
            if layout is None:
                layout, is_header = _Layout.of(line, place)
                if is_header:
                    continue
            try:
                row = layout.read(line)
            except ValueError as error:
                self.unreadable.append((number, f"{place}: {error}"))
                continue
            if row is not None:
                sums[:] = sums[0] + 1, sums[1] - Decimal(row[3])
                yield *row, place

    def compare(self, entry: Entry) -> None:
        """Compare a journal entry with the rows of the statements."""
        records = self.records(entry.no_refund)
        ours = {**entry.fields, "oid_partner": self.oid_partner}
        verdicts = [_verdict(entry, ours, record) for record in records]
        if verdicts:
            self._count(verdicts[0], entry.no_refund, [record["money_refund"] for record in records])
        if all(verdict is Verdict.NOT_IN_JOURNAL for verdict in verdicts) and (verdict := self._without_row(entry)):
            self._count(verdict, entry.no_refund, [entry.fields["money_refund"]])

    def _without_row(self, entry: Entry) -> Verdict | None:
        """Return the verdict for a refund that no given statement has; None if the statements need not have it."""
        if (made_on := _statement_day(entry)) is None:
            return None
        days = (f"{made_on:%Y%m%d}", f"{made_on + timedelta(1):%Y%m%d}")
        is_covered = all(not self._periods.isdisjoint((day, day[:6])) for day in days)
        return Verdict.MISSING_IN_STATEMENT if is_covered else Verdict.OUTSIDE_PERIOD

    def finish(self) -> None:
        """Count the rows that have no entry in the journal."""
        self._prepare()
        for row, no_refund in self._file.execute("SELECT id, no_refund FROM refunds"):
            if not self._seen[row]:
                amounts = [record["money_refund"] for record in self.records(no_refund)]
                self._count(Verdict.NOT_IN_JOURNAL, no_refund, amounts)

    def records(self, no_refund: str) -> list[dict[str, str]]:
        """Return the statements' rows about a refund as records, each with its file and line as ``evidence``."""
        self._prepare()
        found = self._file.execute("SELECT * FROM refunds WHERE no_refund = ?", [no_refund]).fetchall()
        for row, *_ in found:
            self._seen[row] = 1
        return [{"sta_refund": "2", **dict(zip(_STORED, row[1:], strict=True))} for row in found]

    def _prepare(self) -> None:
        if not self._seen:
            [(rows,)] = self._file.execute("SELECT count(*) FROM refunds")
            self._seen = bytearray(rows + 1)
            self._file.execute(f"CREATE INDEX numbers ON refunds ({', '.join(_STORED)})")

    def _count(self, verdict: Verdict, no_refund: str, amounts: Sequence[str]) -> None:
        verdict = verdict if len(amounts) == 1 else Verdict.TWICE_IN_STATEMENT
        self.counts[verdict] += 1
        self.yuan[verdict] += sum(map(Decimal, amounts))
        if verdict in self.numbers:
            self.numbers[verdict].append(no_refund)


def _verdict(entry: Entry, ours: Mapping[str, str], record: Mapping[str, str]) -> Verdict:
    try:
        check_identity(ours, record)
    except (AnswerMismatch, RefundConflict) as error:
        return Verdict.AMOUNT_DIFFERS if error.field == "money_refund" else Verdict.NOT_IN_JOURNAL
    if entry.state is State.UNRESOLVED:
        return Verdict.UNKNOWN_PROVED
    is_made = entry.state is State.ACCEPTED or _statement_day(entry) is not None
    return Verdict.AGREES if is_made else Verdict.NOT_IN_JOURNAL


def _statement_day(entry: Entry) -> date | None:
    """Return the day whose statement, or the next one, must have the refund; None: not final, not made, or failed."""
    record = entry.ending.record if entry.ending is not None else {}
    if entry.state not in (State.FINAL, State.DONE) or record.get("sta_refund") == RefundStatus.FAILED:
        return None
    try:
        return wire.parse_date(record.get("settle_date", ""))
    except ValueError:
        return wire.parse_date(entry.fields["dt_refund"][:8])
