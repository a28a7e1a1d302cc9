"""Whether a record is about the refund that was asked for: the one comparison that every path uses.

A refund is identified by ``no_refund``, ``dt_refund`` and ``money_refund`` together. A gateway may replay its first
answer to a number that was used again: then all is signed well, and no money moves for the second refund.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from . import wire
from .errors import AnswerMismatch, RefundConflict

__all__ = ["check_identity", "has_whole_identity", "request_conflict"]

_NUMBERS: Final = ("oid_partner", "no_refund", "oid_refundno")
"""Another one means that the record answers another query."""
_CONTENT: Final[dict[str, Callable[[str], object]]] = {
    "dt_refund": wire.parse_timestamp,
    "money_refund": wire.parse_decimal,
}
"""Another one under our number, by value, means that the number stands for another refund."""


def check_identity(ours: Mapping[str, str], record: Mapping[str, str]) -> None:
    """Compare wire fields; what either side leaves out (or leaves empty) cannot disagree.

    Raises ``AnswerMismatch`` for another refund's or merchant's record, and ``RefundConflict`` where our number
    stands for another ``dt_refund`` or amount.
    """
    for name in _NUMBERS:
        asked, told = ours.get(name), record.get(name)
        if asked and told and asked != told:
            raise AnswerMismatch(name, asked=asked, answered=told)
    for name, read in _CONTENT.items():
        asked, told = ours.get(name), record.get(name)
        if not asked or not told or asked == told:
            continue
        try:
            is_same = read(told) == read(asked)
        except ValueError:  # no amount and no time at all: this tells of no other refund
            raise AnswerMismatch(name, asked=asked, answered=told) from None
        if not is_same:
            number = ours.get("no_refund") or record.get("no_refund") or ours.get("oid_refundno", "")
            raise RefundConflict(number, field=name, ours=asked, theirs=told, record=record)


def has_whole_identity(record: Mapping[str, str]) -> bool:
    """Whether a record that passed :func:`check_identity` also carries all three fields."""
    return all(record.get(name) for name in ("no_refund", *_CONTENT))


def request_conflict(no_refund: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> RefundConflict | None:
    """Return a conflict that names the first field in which two requests under one number differ."""
    field = next((name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name)), None)
    if field is None:
        return None
    return RefundConflict(no_refund, field=field, ours=ours.get(field, "nothing"), theirs=theirs.get(field, "nothing"))
