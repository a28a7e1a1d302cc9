"""Wire formats: strict JSON, and conversion between text and Decimal, datetime (UTC+8) and date.

``parse_…`` raises ``ValueError``, whose message is the broken rule; the caller adds the name of the field.
"""

import json
import re
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final, NoReturn

from .errors import MalformedMessage

# A genuine message has about 1 KiB. A hostile one must not exhaust memory: parsed JSON takes up to 45 times its size.
MAX_MESSAGE_BYTES: Final = 64 * 1024

# LianLian's pages name no time zone; the gateway is in China, which has had no daylight saving since 1991.
CHINA_STANDARD_TIME: Final = timezone(timedelta(hours=8), "CST")

_MONEY: Final = re.compile(r"[0-9]{1,9}(\.[0-9]{1,2}0{0,30})?")
_DECIMAL: Final = re.compile(r"-?[0-9]{1,30}(\.[0-9]{1,30})?")
_LARGEST: Final = Decimal("100000000.00")
_SMALLEST: Final = Decimal("0.01")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise MalformedMessage("the JSON object has a duplicate key")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedMessage(f"{name} is not a JSON value")


# A number keeps its literal text, because the signature covers text: 200.01 and "200.01" are the same value.
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_int=str, parse_float=str, parse_constant=_refuse_constant
)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def decode(body: bytes) -> dict[str, str]:
    """Return the flat object of strings in ``body`` (UTF-8 JSON, at most 64 KiB).

    A field with the value null is dropped, because the signature does not cover it. A number keeps its literal text.
    Anything else (true, lists, objects, duplicate keys, lone surrogates, NUL) raises ``MalformedMessage``.
    """
    if len(body) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"the message is longer than {MAX_MESSAGE_BYTES} bytes")
    try:
        message: object = _DECODER.decode(body.decode())
    except UnicodeDecodeError:
        raise MalformedMessage("the message is not UTF-8") from None
    except RecursionError:
        raise MalformedMessage("the message is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedMessage(f"the message is not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(message, dict):
        raise MalformedMessage("the message is not a JSON object")
    fields = {key: value for key, value in message.items() if value is not None}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise MalformedMessage(f"the value of {key[:32]!r} is not a string")
    text = "".join((*fields, *fields.values()))
    if "\0" in text:  # PostgreSQL stores none: one answer would make the writes of other refunds fail, too
        raise MalformedMessage("a string contains NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MalformedMessage("a string contains a lone surrogate") from None
    return fields


def encode(fields: Mapping[str, str]) -> bytes:
    """Return ``fields`` as one compact JSON object in UTF-8, in the given order."""
    return _ENCODER.encode(dict(fields)).encode()


def parse_money(value: Decimal | int | str) -> Decimal:
    """Return an amount in yuan, 0.01 to 100,000,000.00, with exactly two decimals; the value is never rounded.

    ``0.1`` and ``0.100`` are read as 0.10. Every decimal after the second must be zero.
    """
    match value:
        case str() if _MONEY.fullmatch(value):
            amount = Decimal(value)
        case str():
            raise ValueError("must be digits with at most 2 decimals, such as 200.01")
        case Decimal() | int() if not isinstance(value, bool):
            amount = Decimal(value)
        case _:
            raise ValueError("must be a Decimal, an int or a str: a float cannot represent every amount exactly")
    if not amount.is_finite():
        raise ValueError("must be a finite number")
    if not _SMALLEST <= amount <= _LARGEST:
        raise ValueError("must be between 0.01 and 100000000.00 yuan")
    with_two = Decimal(f"{amount:.2f}")  # quantize would depend on the precision of the caller's decimal context
    if with_two != amount:
        raise ValueError("must have at most 2 decimals (amounts are never rounded)")
    return with_two


def format_money(amount: Decimal) -> str:
    """Return the wire form of an amount, which always has two decimals."""
    return f"{amount:.2f}"


def parse_decimal(text: str) -> Decimal:
    """Return a plain decimal number (a rate, an amount in a foreign currency)."""
    if not _DECIMAL.fullmatch(text):
        raise ValueError("must be a decimal number")
    return Decimal(text)


def parse_timestamp(value: datetime | str) -> datetime:
    """Return a datetime in China Standard Time, to the second, from an aware datetime or 14 digits."""
    match value:
        case str() if len(value) == 14 and value.isascii() and value.isdigit():
            day = int(value[:4]), int(value[4:6]), int(value[6:8])
            time = int(value[8:10]), int(value[10:12]), int(value[12:])
            try:
                moment = datetime(*day, *time, tzinfo=CHINA_STANDARD_TIME)
            except ValueError:
                raise ValueError("is not a valid date and time (yyyyMMddHHmmss)") from None
        case datetime() if value.utcoffset() is None:
            raise ValueError("is a naive datetime; use an aware one: datetime.now(timezone.utc) or value.astimezone()")
        case datetime():
            try:
                moment = value.astimezone(CHINA_STANDARD_TIME).replace(microsecond=0)
            except OverflowError:
                raise ValueError("is out of range in China Standard Time (years 1000 to 9999)") from None
        case _:
            raise ValueError("must be 14 digits yyyyMMddHHmmss (China Standard Time), or an aware datetime")
    if moment.year < 1000:
        raise ValueError("must have a year of four digits")
    return moment


def format_timestamp(moment: datetime) -> str:
    """Return ``yyyyMMddHHmmss`` in China Standard Time."""
    return moment.astimezone(CHINA_STANDARD_TIME).strftime("%Y%m%d%H%M%S")


def parse_date(text: str) -> date:
    """Return a settlement date from 8 digits ``YYYYMMDD``."""
    if not (len(text) == 8 and text.isascii() and text.isdigit()):
        raise ValueError("must be 8 digits YYYYMMDD")
    return date(int(text[:4]), int(text[4:6]), int(text[6:]))
