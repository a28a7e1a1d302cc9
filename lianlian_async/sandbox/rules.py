"""LianLian's documented rules for a request: a readable body, a valid signature, valid fields.

This module repeats the rules of ``models`` on purpose: a sandbox that imported them could not detect their mistakes.
A request that breaks a rule raises :class:`~.answers.Rejection`. No function here does I/O.
"""

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Final

from lianlian_async import wire
from lianlian_async.errors import MalformedMessage
from lianlian_async.signing import VerifyingKey, signature_source

from .answers import Rejection

_MONEY: Final = re.compile(r"(?=.{1,12}$)[0-9]{1,9}(\.[0-9]{1,2}0*)?")  # String(12)
_CONTENT_TYPE: Final = re.compile(r'application/json(;charset="?utf-8"?)?')


def read_body(content_type: str, body: bytes) -> dict[str, str]:
    """Return the fields of a request; 9002 if it is not a flat JSON object of strings in UTF-8.

    A null field counts as absent. A number is rejected: LianLian's pages give every field the type String.
    """
    if not _CONTENT_TYPE.fullmatch(content_type.replace(" ", "").lower()):
        raise Rejection("9002")
    try:
        fields = wire.decode(body)
    except MalformedMessage:
        raise Rejection("9002") from None
    as_sent = json.loads(body, parse_int=float)  # int() raises for too many digits
    if fields != {name: value for name, value in as_sent.items() if value is not None}:
        raise Rejection("9002")
    return fields


def authenticate(fields: Mapping[str, str], oid_partner: str, key: VerifyingKey) -> None:
    """Check merchant and signature: 1004 for a bad field, 3001 for another merchant, 1001 for a wrong signature."""
    _check(fields, {"oid_partner": _at_most(18)})
    if fields["oid_partner"] != oid_partner:
        raise Rejection("3001")
    _check(fields, {"sign_type": lambda text: text == "RSA", "sign": bool})
    # The signature also covers undocumented fields.
    if not key.verify(signature_source(fields), fields["sign"]):
        raise Rejection("1001")


def check_apply(fields: Mapping[str, str]) -> None:
    """Check an apply request; 1004 names the first parameter that breaks a rule of the apply page."""
    _check(fields, _APPLY, _APPLY_OPTIONAL)
    if not fields.get("no_order") and not fields.get("oid_paybill"):
        raise Rejection("1004", "no_order")


def check_query(fields: Mapping[str, str]) -> None:
    """Check a query; 1004 names the first parameter that breaks a rule of the query page."""
    _check(fields, _QUERY, _QUERY_OPTIONAL)
    if not fields.get("no_refund") and not fields.get("oid_refundno"):
        raise Rejection("1004", "no_refund")


def _at_most(length: int) -> Callable[[str], bool]:
    return lambda text: len(text) <= length


def _is_timestamp(text: str) -> bool:
    try:
        wire.parse_timestamp(text)
    except ValueError:
        return False
    return True


_Rules = dict[str, Callable[[str], bool]]

_APPLY: Final[_Rules] = {
    "no_refund": _at_most(32),
    "dt_refund": _is_timestamp,
    "money_refund": lambda text: bool(_MONEY.fullmatch(text)) and Decimal("0.01") <= Decimal(text) <= 100_000_000,
    "notify_url": lambda text: len(text) <= 128 and text.startswith(("http://", "https://")),
}
_APPLY_OPTIONAL: Final[_Rules] = {
    "no_order": _at_most(32),
    "dt_order": _is_timestamp,
    "oid_paybill": _at_most(32),
    "trader_refund": _at_most(18),
}
_QUERY: Final[_Rules] = {"dt_refund": _is_timestamp}
_QUERY_OPTIONAL: Final[_Rules] = {
    "no_refund": _at_most(32),
    "oid_refundno": _at_most(16),
    "trader_refund": _at_most(18),
}


def _check(fields: Mapping[str, str], required: _Rules, optional: _Rules | None = None) -> None:
    """Check each field; an empty field counts as absent, as in the signature source."""
    for name, is_valid in (required | (optional or {})).items():
        text = fields.get(name)
        if not is_valid(text) if text else name in required:
            raise Rejection("1004", name)
