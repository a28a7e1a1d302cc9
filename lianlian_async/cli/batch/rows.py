"""Read a CSV or JSON Lines file row by row, in bounded memory, and detect identifiers that a spreadsheet changed."""

import codecs
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePath
from types import MappingProxyType
from typing import IO, Final, NamedTuple, cast

import attrs
import click

from lianlian_async import wire
from lianlian_async.cli.options import SIGNATURE_FIELDS
from lianlian_async.errors import MalformedMessage, Problem
from lianlian_async.models import RefundRequest

FIELDS: Final = tuple(field.name for field in attrs.fields(RefundRequest))


class Row(NamedTuple):
    """One row of the file, at ``line``: its fields that are not empty, or the problem that makes it unreadable."""

    line: int
    fields: Mapping[str, str]
    problem: str | None = None
    cells: Mapping[str, str] = MappingProxyType({})
    """The text of each cell by column."""
    remark: str | None = None
    """Why a person should check this row."""


@attrs.define
class Columns:
    """The mapping from columns of the file to fields of a refund."""

    renamed: Mapping[str, str]
    """Column names by field, from ``--map``."""
    ignore_unknown: bool
    has_partner: bool
    """Whether the file may have a column ``oid_partner``."""
    seen: dict[str, None] = attrs.field(factory=dict, init=False)
    """The columns found so far, in the file's order."""
    delimiter: str = attrs.field(default=",", init=False)
    """The delimiter of a CSV file."""

    def of(self, columns: Sequence[str]) -> dict[str, str]:
        """Return the field of each used column. Raises ``ValueError`` for an unknown column or a repeated field."""
        self.seen.update(dict.fromkeys(columns))
        names = {column: name for name, column in self.renamed.items()}
        read: dict[str, str] = {}
        for column in columns:
            name = names.get(column, column)
            is_known = name in FIELDS or (name == "oid_partner" and self.has_partner)
            if column in SIGNATURE_FIELDS or (self.ignore_unknown and not is_known):
                continue
            if not is_known:
                raise ValueError(f"column {column!r} is not a refund field: use --map or --ignore-unknown")
            if name in read.values():
                raise ValueError(f"more than one column for {name}: rename or remove one")
            read[column] = name
        return read


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────

_SUFFIXES: Final = {".csv": False, ".tsv": False, ".jsonl": True, ".ndjson": True, ".json": True}
"""Whether a file with this suffix is JSON Lines."""
_SEPARATOR: Final = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)


def read_rows(file: IO[bytes], name: str, columns: Columns, encoding: str) -> Iterator[Row]:
    """Yield the rows of ``file``; skip blank lines. The suffix of ``name``, or else the first line, shows the format.

    An invalid line becomes a row with a problem. Raises a usage error if the rest of the file cannot be read (such as
    bytes in another encoding, a quote without its end, an invalid header), or if a column of ``--map`` is missing.
    """
    lines = _text_lines(file, encoding)
    first = next(lines, "")
    is_json = _SUFFIXES.get(PurePath(name).suffix.lower(), first.lstrip().startswith("{"))
    if is_json and first.lstrip().startswith("["):
        raise _unreadable("line 1 is a JSON array; convert it to JSON Lines, with one object on each line")
    lines = chain([first], lines)
    yield from _json_rows(lines, columns) if is_json else _csv_rows(lines, columns)
    if unseen := columns.renamed.values() - columns.seen.keys():
        raise click.BadParameter(f"the file has no such column: {', '.join(sorted(unseen))}", param_hint="--map")


def _json_rows(lines: Iterable[str], columns: Columns) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cells = wire.decode(line.encode())
                yield Row(number, _fields(cells, columns.of(list(cells))), cells=cells)
            except (MalformedMessage, ValueError) as error:
                yield Row(number, {}, str(error))


def _csv_rows(lines: Iterator[str], columns: Columns) -> Iterator[Row]:
    """Yield the rows below the header; skip blank ones. A row may have several lines.

    The first line may name the delimiter for Excel (``sep=;``). Otherwise the delimiter is the comma, semicolon or
    tab that is most frequent in the first line.
    """
    first, skipped = next(lines), 0
    if named := _SEPARATOR.fullmatch(first):
        first, skipped = next(lines, ""), 1
    columns.delimiter = named[1] if named else max(",;\t", key=first.count)
    last_line = first

    def watched() -> Iterator[str]:
        nonlocal last_line
        for last_line in chain([first], lines):  # noqa: UP028 - remember the line
            yield last_line

    reader = csv.reader(watched(), delimiter=columns.delimiter, strict=True)
    begins, header, names = 1 + skipped, list[str](), dict[str, str]()
    try:
        for cells in reader:
            is_blank = not any(map(str.strip, cells))
            if header and not is_blank:
                by_column = dict(zip(header, cells, strict=False))
                problem, remark = None, None
                if len(cells) != len(header):
                    problem = f"has {len(cells)} cells, but the header has {len(header)}"
                elif not last_line.endswith(("\r", "\n")):
                    remark = "the file ends without a line end: check that this line is complete"
                elif any(
                    part.count(columns.delimiter) == len(header) - 1 for cell in cells for part in cell.splitlines()[1:]
                ):
                    remark = "a cell contains a line like a row of the file: check its quotation marks"
                yield Row(begins, {} if problem else _fields(by_column, names), problem, by_column, remark)
            elif not is_blank:
                header = [cell.strip() for cell in cells]
                names = columns.of(header)
                if not {"no_refund", "money_refund"}.intersection((*names.values(), *columns.renamed)):
                    raise ValueError("no column is no_refund or money_refund; add a header, or use --map to name them")
            begins = reader.line_num + 1 + skipped
    except (csv.Error, ValueError) as error:
        raise _unreadable(f"line {begins}: {error}") from None


def _fields(cells: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: cells[column] for column, name in names.items() if cells[column]}


# ── text ─────────────────────────────────────────────────────────────────────────────────────────

_NOT_TEXT: Final = {
    b"PK\x03\x04": "is an Excel workbook (.xlsx) or another zip archive: open it and save it as CSV (UTF-8)",
    b"\xd0\xcf\x11\xe0": "is an old Excel workbook (.xls): open it and save it as CSV (UTF-8)",
    b"\x1f\x8b": "is compressed with gzip: decompress it first",
}
_BOMS: Final = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_LINE_END: Final = re.compile(r"\r\n|\r|\n")


def _text_lines(file: IO[bytes], encoding: str) -> Iterator[str]:
    """Yield the lines of ``file`` with their line ends (LF, CRLF or CR). A byte order mark overrides ``encoding``.

    Raises a usage error for bytes that are invalid in the encoding, NUL bytes, workbooks and gzip files. It recognizes
    most UTF-8 texts that ``encoding`` would turn into other identifiers, such as Chinese read as GBK.
    """
    stream = io.BufferedReader(cast("io.RawIOBase", file))
    first = stream.peek(4)
    for magic, reason in _NOT_TEXT.items():
        if first.startswith(magic):
            raise _unreadable(reason)
    encoding = next((name for bom, name in _BOMS.items() if first.startswith(bom)), encoding)
    number, may_be_utf8, is_shorter = 0, not codecs.lookup(encoding).name.startswith("utf"), False
    try:
        with io.TextIOWrapper(stream, encoding, newline="") as text:
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise _unreadable(f"line {number} contains NUL bytes; if it is UTF-16, use --encoding utf-16-le")
                if may_be_utf8 and not line.isascii():
                    as_utf8 = line.encode(encoding).decode(errors="replace")
                    may_be_utf8 = "\ufffd" not in as_utf8
                    is_shorter |= len(as_utf8) < len(line)  # not so for Chinese in GBK that is valid UTF-8 by chance
                yield line
        if may_be_utf8 and is_shorter:
            raise _unreadable(f"the file is UTF-8, not {encoding}: omit --encoding")
    except UnicodeError as error:  # not a UnicodeDecodeError if Python 3.11 or 3.12 finds no byte order mark for utf-16
        # ``number`` counts the lines of earlier chunks. Add the lines of this chunk that precede the invalid bytes.
        before = getattr(error, "object", b"")[: getattr(error, "start", 0)].decode(encoding, "replace")
        at = number + 1 + len(_LINE_END.findall(before))
        raise _unreadable(f"line {at} is not {encoding}; give the encoding, such as --encoding gb18030") from None


def _unreadable(reason: str) -> click.BadParameter:
    return click.BadParameter(reason, param_hint="FILE")


# ── identifiers that a spreadsheet changed ───────────────────────────────────────────────────────

_IDENTIFIERS: Final = ("no_refund", "no_order", "oid_paybill", "trader_refund")
_CURE: Final = "write the identifier itself: in a spreadsheet, format the column as text before you import the values"
_MONTH: Final = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
_DAMAGE: Final = {
    "number in scientific notation": r"\d+(?:[.,]\d+)?e\+\d+|\d[.,]\d+e\d+",
    "number with decimals": r"\d+[.,]0+",
    "number with thousands separators": r"\d{1,3}(?:,\d{3})+(?:\.\d+)?",
    "error value": r"#[^\W\d_]\S*[!?]|#n/a|#nv|#n/d|#getting_data|#+|err:\d+",
    "formula": r"=.*",
    "leading quotation mark": r"""["'`´‘’“”].*""",
    "date": rf"\d\d?-{_MONTH}(?:-\d\d(?:\d\d)?)?|{_MONTH}-\d\d(?:\d\d)?|\d\d?月\d\d?日",
    "label of a row of totals": r"合\s*计|总\s*计|小\s*计|totals?|sum|summe",
    "placeholder for an empty cell": r"null|\(null\)|\\n|nil|none|-?nan|<na>|nat|n/?a|undefined",
}
_DAMAGED: Final = re.compile("|".join(f"({pattern})" for pattern in _DAMAGE.values()), re.IGNORECASE | re.DOTALL)
_ROUNDED: Final = re.compile(r"[1-9]\d{14}0+", re.ASCII)
"""A number in which all digits after the 15th are zeros: a spreadsheet keeps only 15 digits of a number."""


def damaged(fields: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each identifier that seems to be changed by a spreadsheet or an export."""
    for name in _IDENTIFIERS:
        text = fields.get(name, "").strip()
        if match := _DAMAGED.fullmatch(text):
            reason = list(_DAMAGE)[cast("int", match.lastindex) - 1]
            yield Problem(name, f"is damaged ({reason}); {_CURE}", repr(text[:40]))


def rounded(fields: Mapping[str, str]) -> Iterator[str]:
    """Yield a remark for each identifier that a spreadsheet may have rounded."""
    for name in _IDENTIFIERS:
        if _ROUNDED.fullmatch(text := fields.get(name, "")):
            yield f"{name} {text} ends in zeros: a spreadsheet may have rounded it; compare it with its source"
