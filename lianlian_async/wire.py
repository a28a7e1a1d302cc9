"""The formats of the wire: strict JSON in and out, and text ↔ Decimal, datetime (UTC+8) and date.

No other module knows how a value looks on the wire. Parsers raise ``ValueError`` whose text is the
broken rule; the caller knows the field and says it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final, NoReturn

from .errors import MalformedMessage

__all__ = [
    "CHINA_STANDARD_TIME",
    "MAX_MESSAGE_BYTES",
    "decode",
    "encode",
    "format_money",
    "format_timestamp",
    "parse_date",
    "parse_decimal",
    "parse_money",
    "parse_timestamp",
]

MAX_MESSAGE_BYTES: Final = 1024 * 1024

# The pages name no time zone; the gateway is in China, which has had no daylight saving since 1991.
CHINA_STANDARD_TIME: Final = timezone(timedelta(hours=8), "CST")

_MONEY: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,2}0{0,30})?")
_DECIMAL: Final = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")
_LARGEST: Final = Decimal("100000000.00")
_SMALLEST: Final = Decimal("0.01")


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise MalformedMessage("a key stands twice in the JSON object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedMessage(f"{name} is not JSON")


# A number keeps its literal text: the signature is over text, so a lenient gateway's 200.01 and "200.01"
# are the same field, and the signature decides whether that text is right.
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str, parse_constant=_refuse_constant
)


def decode(body: bytes) -> dict[str, str]:
    """The flat object of strings in ``body`` (UTF-8 JSON, at most 1 MiB).

    A null is as good as absent (the signature's rule leaves both out) and is dropped; a number keeps its
    literal text. Anything else (true, lists, objects, duplicate keys, lone surrogates) raises
    :class:`~lianlian_async.errors.MalformedMessage`.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"longer than {MAX_MESSAGE_BYTES} bytes")
    try:
        message: object = _DECODER.decode(body.decode())
    except UnicodeDecodeError:
        raise MalformedMessage("not UTF-8") from None
    except RecursionError:
        raise MalformedMessage("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedMessage(f"not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(message, dict):
        raise MalformedMessage("not a JSON object")
    if set(map(type, message.values())) != {str}:
        message = _only_strings(message)
    if b"\\" in body:  # only an escape can smuggle in what UTF-8 cannot carry
        try:
            "".join((*message, *message.values())).encode()
        except UnicodeEncodeError:
            raise MalformedMessage("a lone surrogate stands in a string") from None
    return message


def _only_strings(message: dict[str, Any]) -> dict[str, str]:
    fields = {key: value for key, value in message.items() if value is not None}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise MalformedMessage(f"the value of {key[:32]!r} is not a string")
    return fields


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode(fields: Mapping[str, str]) -> bytes:
    """``fields`` as one compact JSON object in UTF-8, in the order given."""
    return _ENCODER.encode(dict(fields)).encode()


# ── money ────────────────────────────────────────────────────────────────────────────────────────


def parse_money(value: Decimal | int | str) -> Decimal:
    """An amount in yuan, 0.01 to 100,000,000.00, with exactly two decimals; never rounded.

    What counts is the value: ``0.1`` and ``0.100`` are 0.10. A third decimal has to be zero.
    """
    match value:
        case str() if _MONEY.fullmatch(value):
            amount = Decimal(value)
        case str():
            raise ValueError("must be digits with at most 2 decimals, such as 200.01")
        case bool() | float():
            raise ValueError("must be a Decimal, not a float or bool: floats cannot hold yuan and fen exactly")
        case Decimal() | int():
            amount = Decimal(value)
            if not amount.is_finite():
                raise ValueError("must be a finite number")
        case _:
            raise ValueError("must be a Decimal")
    if not _SMALLEST <= amount <= _LARGEST:
        raise ValueError("must be between 0.01 and 100000000.00 yuan")
    if isinstance(value, str) and value[-3:-2] == ".":
        return amount  # it has its two decimals
    with_two = Decimal(f"{amount:.2f}")  # free of the precision of the caller's decimal context
    if with_two != amount:
        raise ValueError("must have at most 2 decimals (it is never rounded)")
    return with_two


def format_money(amount: Decimal) -> str:
    """The wire form of an amount: always two decimals."""
    return f"{amount:.2f}"


def parse_decimal(text: str) -> Decimal:
    """A plain decimal number (a rate, an amount in a foreign currency)."""
    if not _DECIMAL.fullmatch(text):
        raise ValueError("must be a decimal number")
    return Decimal(text)


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


def parse_timestamp(value: datetime | str) -> datetime:
    """A moment in China Standard Time, to the second, from an aware datetime or 14 digits."""
    match value:
        case str() if len(value) == 14 and value.isascii() and value.isdigit():
            moment = _moment(value)
        case datetime() if value.utcoffset() is None:
            raise ValueError("is a naive datetime; say which zone: datetime.now(timezone.utc) or value.astimezone()")
        case datetime():
            try:
                moment = value.astimezone(CHINA_STANDARD_TIME)
            except OverflowError:
                raise ValueError("is outside of the calendar in China Standard Time") from None
            if moment.microsecond:
                moment = moment.replace(microsecond=0)
        case _:
            raise ValueError("must be an aware datetime or 14 digits yyyyMMddHHmmss (China Standard Time)")
    if moment.year < 1000:
        raise ValueError("must have a year of four digits")
    return moment


@lru_cache(maxsize=64)  # an answer repeats what was asked
def _moment(digits: str) -> datetime:
    day = int(digits[:4]), int(digits[4:6]), int(digits[6:8])
    time = int(digits[8:10]), int(digits[10:12]), int(digits[12:])
    try:
        return datetime(*day, *time, tzinfo=CHINA_STANDARD_TIME)
    except ValueError:
        raise ValueError("is no date and time of the calendar (yyyyMMddHHmmss)") from None


def format_timestamp(moment: datetime) -> str:
    """``yyyyMMddHHmmss`` in China Standard Time."""
    at = moment.astimezone(CHINA_STANDARD_TIME)
    parts = at.year, at.month, at.day, at.hour, at.minute, at.second
    return "%04d%02d%02d%02d%02d%02d" % parts  # noqa: UP031 - three times as fast as strftime


def parse_date(text: str) -> date:
    """A settlement date: 8 digits ``YYYYMMDD``."""
    if not (len(text) == 8 and text.isascii() and text.isdigit()):
        raise ValueError("must be 8 digits YYYYMMDD")
    return _day(text)


@lru_cache(maxsize=64)  # most of what is settled in a day bears the same one
def _day(text: str) -> date:
    return date(int(text[:4]), int(text[4:6]), int(text[6:]))
