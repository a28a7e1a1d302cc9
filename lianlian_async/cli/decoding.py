"""Bytes of a file as lines of text, in bounded memory; what is no text is refused by its first bytes."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["text_lines", "unreadable"]

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
