"""Damage that spreadsheets do to identifiers: they take long numbers for quantities and write them in other ways."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from lianlian_async.errors import Problem

__all__ = ["damaged", "rounded"]

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
