"""LianLian's documented rules for a request: a readable body, a valid signature, valid fields.

This module repeats the rules of ``models`` on purpose: a sandbox that imported them could not detect their mistakes.
A request that breaks a rule raises :class:`~.answers.Rejection`. No function here does I/O.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Final

from lianlian_async import wire
from lianlian_async.errors import MalformedMessage
from lianlian_async.signing import VerifyingKey, signature_source

from .answers import Rejection
from .faults import Call

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
    _check(fields, ["oid_partner"])
    if fields["oid_partner"] != oid_partner:
        raise Rejection("3001")
    _check(fields, ["sign_type", "sign"])
    # The signature also covers undocumented fields.
    if not key.verify(signature_source(fields), fields["sign"]):
        raise Rejection("1001")


def check(call: Call, fields: Mapping[str, str]) -> None:
    """Check a request; 1004 names the first parameter that breaks a rule of LianLian's page."""
    required, optional, one_of = _FIELDS[call]
    _check(fields, required, optional)
    if not any(fields.get(name) for name in one_of):
        raise Rejection("1004", one_of[0])


def _check(fields: Mapping[str, str], required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Check each field; an empty field counts as absent, as in the signature source."""
    for name in (*required, *optional):
        text = fields.get(name)
        if not _RULES[name](text) if text else name in required:
            raise Rejection("1004", name)


def _at_most(length: int) -> Callable[[str], bool]:
    return lambda text: len(text) <= length


def _is_timestamp(text: str) -> bool:
    try:
        wire.parse_timestamp(text)
    except ValueError:
        return False
    return True


_RULES: Final[Mapping[str, Callable[[str], bool]]] = {
    "oid_partner": _at_most(18),
    "sign_type": lambda text: text == "RSA",
    "sign": bool,
    "no_refund": _at_most(32),
    "dt_refund": _is_timestamp,
    "money_refund": lambda text: bool(_MONEY.fullmatch(text)) and Decimal("0.01") <= Decimal(text) <= 100_000_000,
    "notify_url": lambda text: len(text) <= 128 and text.startswith(("http://", "https://")),
    "no_order": _at_most(32),
    "dt_order": _is_timestamp,
    "oid_paybill": _at_most(32),
    "oid_refundno": _at_most(16),
    "trader_refund": _at_most(18),
}
_FIELDS: Final[Mapping[Call, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]] = {
    "apply": (
        ("no_refund", "dt_refund", "money_refund", "notify_url"),
        ("no_order", "dt_order", "oid_paybill", "trader_refund"),
        ("no_order", "oid_paybill"),
    ),
    "query": (("dt_refund",), ("no_refund", "oid_refundno", "trader_refund"), ("no_refund", "oid_refundno")),
}
"""The required fields of a call, the optional ones, and those of which it needs at least one."""
