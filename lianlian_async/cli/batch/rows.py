"""The rows of a CSV or JSON Lines file under LianLian's names, one after the other: a file of any length fits."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Final, NamedTuple

import attrs
import click

from lianlian_async import wire
from lianlian_async.cli.options import SIGNATURE_FIELDS
from lianlian_async.errors import MalformedMessage, Problem
from lianlian_async.models import RefundRequest

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


__all__ = ["Columns", "Row", "damaged", "read_rows", "rounded", "text_lines", "unreadable"]

FIELDS: Final = tuple(field.name for field in attrs.fields(RefundRequest))

_SUFFIXES: Final = {".csv": False, ".tsv": False, ".jsonl": True, ".ndjson": True, ".json": True}
"""Whether a file of that name holds JSON Lines."""
_SEPARATOR: Final = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)


class Row(NamedTuple):
    """What stands on one line: fields that are not empty, or what is wrong with it."""

    line: int
    fields: Mapping[str, str]
    problem: str | None = None


@attrs.define
class Columns:
    """Which column stands for which field."""

    renamed: Mapping[str, str]
    """Wire names, and the columns that hold them."""
    ignore_unknown: bool
    has_partner: bool
    """Whether a column ``oid_partner`` is one that is looked at."""
    _unseen: set[str] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._unseen = set(self.renamed.values())

    def of(self, columns: Sequence[str]) -> dict[str, str]:
        """The columns that are read, and the field of each. Raises ``ValueError`` if that is not clear."""
        self._unseen.difference_update(columns)
        names = {column: name for name, column in self.renamed.items()}
        read: dict[str, str] = {}
        for column in columns:
            name = names.get(column, column)
            is_known = name in FIELDS or (name == "oid_partner" and self.has_partner)
            if column in SIGNATURE_FIELDS or (self.ignore_unknown and not is_known):
                continue
            if not is_known:
                raise ValueError(f"column {column!r} is no field of a refund: --map it, or --ignore-unknown")
            if name in read.values():
                raise ValueError(f"{name} stands in more than one column")
            read[column] = name
        return read

    def check_all_seen(self) -> None:
        """Raise a usage error if a column that was named does not exist."""
        if self._unseen:
            raise click.BadParameter(f"no such column: {', '.join(sorted(self._unseen))}", param_hint="--map")


def read_rows(file: IO[bytes], name: str, columns: Columns, encoding: str) -> Iterator[Row]:
    """The rows of ``file``, which is called ``name``; blank lines are none.

    A line that is wrong is a row with a problem. What makes all further lines doubtful is a usage error: bytes of
    another encoding, a quote that is never closed, a header that is not understood.
    """
    lines = text_lines(file, encoding)
    first = next(lines, "")
    is_json = _SUFFIXES.get(PurePath(name).suffix.lower(), first.lstrip().startswith("{"))
    if is_json and first.lstrip().startswith("["):
        raise unreadable(1, "JSON Lines has one object on each line, and is no array of them")
    lines = chain([first], lines)
    yield from _json_rows(lines, columns) if is_json else _csv_rows(lines, columns)
    columns.check_all_seen()


def _json_rows(lines: Iterable[str], columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cells = wire.decode(line.encode())
                yield Row(number, _fields(cells, columns.of(list(cells))))
            except (MalformedMessage, ValueError) as error:
                yield Row(number, {}, str(error))


def _csv_rows(lines: Iterator[str], columns: Columns) -> Iterator[Row]:
    table = _table(lines)
    line, header = next(table, (1, []))
    header = [cell.strip() for cell in header]
    try:
        names = columns.of(header)
    except ValueError as error:
        raise unreadable(line, str(error)) from None
    for line, cells in table:
        if len(cells) == len(header):
            yield Row(line, _fields(dict(zip(header, cells, strict=True)), names))
        else:
            yield Row(line, {}, f"has {len(cells)} cells, the header has {len(header)}")


def _table(lines: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Each row's first line and its cells, without rows that are blank.

    The delimiter is what a first line such as ``sep=;`` says (Excel's own habit), else what the header has most of.
    """
    first, skipped = next(lines), 0
    if said := _SEPARATOR.fullmatch(first):
        first, skipped = next(lines, ""), 1
    delimiter = said[1] if said else max(",;\t", key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    begins = 1 + skipped
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield begins, cells
            begins = reader.line_num + 1 + skipped
    except csv.Error as error:
        raise unreadable(begins, str(error)) from None


def _fields(cells: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: cells[column] for column, name in names.items() if cells[column]}


_NO_TEXT: Final = {
    b"PK\x03\x04": "is an Excel workbook (.xlsx) or another zip archive: open it and save it as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook (.xls): open it and save it as CSV (UTF-8)",
    b"\x1f\x8b": "is compressed with gzip: decompress it first",
}
_BOMS: Final = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_LINE_END: Final = re.compile(r"\r\n|\r|\n")


class _Replayed(io.RawIOBase):
    """A stream that begins with bytes which were read from it already: stdin cannot seek."""

    def __init__(self, first: bytes, rest: IO[bytes]) -> None:
        self._first = first
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        data = self._first or self._rest.read(len(view))
        self._first = b""
        view[: len(data)] = data
        return len(data)


def text_lines(file: IO[bytes], encoding: str) -> Iterator[str]:
    """Yield the lines of ``file`` with their ends, which are LF, CRLF or CR. A byte order mark overrides ``encoding``.

    Bytes of another encoding, workbooks and compressed files are a usage error.
    """
    first = file.read(4)
    for magic, reason in _NO_TEXT.items():
        if first.startswith(magic):
            raise unreadable(None, reason)
    for bom, name in _BOMS.items():
        if first.startswith(bom):
            first, encoding = first.removeprefix(bom), name
    number = 0
    try:
        for line in io.TextIOWrapper(io.BufferedReader(_Replayed(first, file)), encoding, newline=""):
            number += 1
            if "\0" in line:
                raise unreadable(number, "holds NUL bytes: it may be UTF-16, say --encoding utf-16-le")
            yield line
    except UnicodeDecodeError as error:
        # The lines before the chunk with the bad bytes were yielded; those within it are counted.
        before = error.object[: error.start].decode(encoding, "replace")
        line_number = number + 1 + len(_LINE_END.findall(before))
        raise unreadable(line_number, f"is not {encoding}: say --encoding, such as gb18030") from None


def unreadable(line: int | None, reason: str) -> click.BadParameter:
    """The usage error for a file that cannot be read as a whole."""
    return click.BadParameter(reason if line is None else f"line {line}: {reason}", param_hint="FILE")


_IDENTIFIERS: Final = ("no_refund", "no_order", "oid_paybill")
_CURE: Final = "a spreadsheet did this: format the column as text before the values come in, and export again"
_MONTH: Final = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"

_DAMAGE: Final = {
    "is a number in scientific notation": r"\d+([.,]\d+)?e\+\d+|\d[.,]\d+e\d+",
    "is a number with decimals": r"\d+[.,]0+",
    "is a number with thousands separators": r"\d{1,3}(,\d{3})+(\.\d+)?",
    "is an error value": r"#[^\W\d_]\S*[!?]|#n/a|#nv|#n/d|#getting_data|#+|err:\d+",
    "is a formula": r"=.*",
    "begins with a quotation mark": r"""["'`´‘’“”].*""",
    "is a date": rf"\d\d?-{_MONTH}(-\d\d(\d\d)?)?|{_MONTH}-\d\d(\d\d)?|\d\d?月\d\d?日",
    "is the mark of an empty cell": r"null|\(null\)|\\n|nil|none|-?nan|<na>|nat|n/?a|undefined",
}
_PATTERNS: Final = {reason: re.compile(pattern, re.IGNORECASE | re.DOTALL) for reason, pattern in _DAMAGE.items()}
_ROUNDED: Final = re.compile(r"[1-9]\d{14}0+", re.ASCII)
"""A spreadsheet keeps 15 digits of a number."""


def damaged(fields: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each identifier that a spreadsheet has changed."""
    for name in _IDENTIFIERS:
        text = fields.get(name, "").strip()
        for reason, pattern in _PATTERNS.items():
            if pattern.fullmatch(text):
                yield Problem(name, f"{reason}; {_CURE}", repr(text[:40]))
                break


def rounded(fields: Mapping[str, str]) -> Iterator[str]:
    """Yield a remark for each identifier that may have been rounded."""
    for name in _IDENTIFIERS:
        if _ROUNDED.fullmatch(text := fields.get(name, "")):
            yield f"{name} {text} ends in zeros: a spreadsheet may have rounded it, compare it with its source"
