"""Compare the gateway's record with the requested refund; all code paths use this one comparison.

``no_refund``, ``dt_refund`` and ``money_refund`` together identify a refund. If two refunds have the same number, the
gateway may repeat its signed answer about the first one, and no money moves for the second one.
"""

from collections.abc import Callable, Mapping
from typing import Final

from . import wire
from .errors import AnswerMismatch, RefundConflict

NUMBERS: Final = ("oid_partner", "no_refund", "oid_refundno")
"""If one of these fields differs, the record belongs to another refund or merchant."""
_CONTENT: Final[dict[str, Callable[[str], object]]] = {
    "dt_refund": wire.parse_timestamp,
    "money_refund": wire.parse_decimal,
}
"""If one of these fields differs by value, the gateway has another refund with our number."""


def check_identity(ours: Mapping[str, str], record: Mapping[str, str]) -> None:
    """Compare wire fields; a field that is absent or empty on either side is not compared.

    Raises ``AnswerMismatch`` for the record of another refund or merchant, or an unreadable value; ``RefundConflict``
    if our number belongs to a refund with another ``dt_refund`` or amount.
    """
    for name in NUMBERS:
        asked, answered = ours.get(name), record.get(name)
        if asked and answered and asked != answered:
            raise AnswerMismatch(name, asked=asked, answered=answered)
    for name, read in _CONTENT.items():
        asked, answered = ours.get(name), record.get(name)
        if not asked or not answered or asked == answered:
            continue
        try:
            is_same = read(answered) == read(asked)
        except ValueError:  # an unreadable value does not prove that there is another refund
            raise AnswerMismatch(name, asked=asked, answered=answered) from None
        if not is_same:
            number = ours.get("no_refund") or record.get("no_refund") or ours.get("oid_refundno", "")
            raise RefundConflict(number, field=name, ours=asked, theirs=answered, record=record)


def has_whole_identity(record: Mapping[str, str]) -> bool:
    """Return whether a record, which must have passed :func:`check_identity`, has all three identifying fields."""
    return all(record.get(name) for name in ("no_refund", *_CONTENT))


def check_request(no_refund: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Compare the fields of two requests with the same number; ``notify_url`` may differ.

    Raises ``RefundConflict`` with the first field that differs.
    """
    for name in (*ours, *theirs):
        if name != "notify_url" and ours.get(name) != theirs.get(name):
            raise RefundConflict(
                no_refund, field=name, ours=ours.get(name, "nothing"), theirs=theirs.get(name, "nothing")
            )
