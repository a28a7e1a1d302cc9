"""The rows of a CSV or JSON Lines file under LianLian's names, one after the other: a file of any length fits."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import PurePath
from typing import IO, Final, NamedTuple

import attrs
import click

from lianlian_async import wire
from lianlian_async.errors import MalformedMessage
from lianlian_async.models import RefundRequest

from .decoding import text_lines, unreadable
from .inputs import SIGNATURE_FIELDS

__all__ = ["Columns", "Row", "read_rows"]

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
