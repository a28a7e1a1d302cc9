"""Requests and refunds as frozen attrs classes. Requests are validated when they are created.

Field names and lengths come from LianLian's apply and query pages.
"""

from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self, TypeVar, cast

import attrs
from attrs.converters import optional

from . import request_fields as rules
from . import wire
from .errors import InvalidRequest, LastExchange, Problem

Record = TypeVar("Record", bound="RefundRecord")


class _Request:
    """The common part of both requests: the wire form, and the check that one of the fields ``_either`` is given."""

    __slots__ = ()
    _either: ClassVar[tuple[str, str]]

    def __attrs_post_init__(self) -> None:
        problems = [
            Problem(name, value.rule, rules.shown(value.value))
            for name, value in rules.values(self).items()
            if isinstance(value, rules.Broken)
        ]
        one, other = self._either
        if getattr(self, one) is None and getattr(self, other) is None:
            problems.append(Problem(one, f"{one} or {other} is required", "neither"))
        if problems:
            raise InvalidRequest(problems)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the request that :meth:`to_dict` wrote, with all checks; unknown keys raise ``InvalidRequest``."""
        return rules.call(cls, cls, data)

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> Self:
        """Return the request that :meth:`to_dict` wrote into a journal or a queue, without checking it again.

        A release with stricter rules must still be able to query earlier refunds. Raises ``InvalidRequest`` only for a
        missing or unknown field, an invalid amount or time, or a string that cannot be stored.
        """
        given, unknown = rules.given(cls, data)
        if unknown:
            raise InvalidRequest(unknown)
        given, _ = rules.given(cls, {name: value for name, value in given.items() if value is not None})
        request: Any = cls.__new__(cls)
        for name in rules.names(request.__class__):
            value = given.get(name)
            if name in _PARSED:
                value = _PARSED[name](value)
            elif value is not None and value is not rules.MISSING:
                rules.check_storable(value, name)
            object.__setattr__(request, name, value)
        request.__attrs_post_init__()
        return cast("Self", request)

    def to_dict(self) -> dict[str, str]:
        """Return the present fields in wire form (strings), for JSON logs, queues and the gateway.

        Fields that a subclass adds are omitted.
        """
        present = ((name, value) for name, value in rules.values(self).items() if value is not None)
        return {name: rules.wire_text(value) for name, value in present if name in DOCUMENTED}


_PARSED: Final[dict[str, Callable[[Any], object]]] = {
    "dt_refund": rules.timestamp,
    "money_refund": rules.money,
    "dt_order": optional(rules.timestamp),
}
"""The parsers of the fields that are not strings."""


@rules.fields_by_name
@attrs.frozen(kw_only=True)
class RefundRequest(_Request):
    """One refund (LianLian's *Apply API*). Raises ``InvalidRequest`` if a field is invalid.

    ``no_refund``, ``dt_refund`` and ``money_refund`` identify it: choose and store them once, and never change them.
    """

    no_refund: str = attrs.field(converter=rules.new_number)
    """The merchant's refund number: at most 32 visible letters, decimal digits and ASCII characters (0x21 to 0x7E),
    NFKC-normal. It should differ from ``no_order``."""
    dt_refund: datetime = attrs.field(converter=rules.timestamp)
    """The time of the refund request: an aware datetime or 14 digits; stored in UTC+8, to the second."""
    money_refund: Decimal = attrs.field(converter=rules.money)
    """Yuan (CNY), 0.01 to 100,000,000.00, at most two decimals, not a float."""
    no_order: str | None = attrs.field(default=None, converter=optional(rules.string_32))
    """The merchant's order number; this or ``oid_paybill`` is required."""
    dt_order: datetime | None = attrs.field(default=None, converter=optional(rules.timestamp))
    """The date and time of ``no_order``."""
    oid_paybill: str | None = attrs.field(default=None, converter=optional(rules.string_32))
    """LianLian's payment number; this or ``no_order`` is required."""
    notify_url: str | None = attrs.field(default=None, converter=optional(rules.url))
    """The URL to which LianLian POSTs the result, at most 128 characters; None: the merchant's default."""
    trader_refund: str | None = attrs.field(default=None, converter=optional(rules.string_18))
    """The merchant for whom the refund is made, at most 18 characters; None: ``oid_partner``."""

    _either = ("no_order", "oid_paybill")

    def query(self) -> "RefundQuery":
        """Return the query about this refund."""
        asked = {"no_refund": self.no_refund, "dt_refund": self.dt_refund, "trader_refund": self.trader_refund}
        return RefundQuery.from_record(asked)


@rules.fields_by_name
@attrs.frozen(kw_only=True)
class RefundQuery(_Request):
    """A query about one refund (LianLian's *Refund Status API*): ``no_refund`` or ``oid_refundno`` is required."""

    no_refund: str | None = attrs.field(default=None, converter=optional(rules.string_32))
    """The merchant's refund number."""
    dt_refund: datetime = attrs.field(converter=rules.timestamp)
    """The refund's own ``dt_refund``: an aware datetime or 14 digits."""
    oid_refundno: str | None = attrs.field(default=None, converter=optional(rules.string_16))
    """LianLian's refund number, at most 16 characters."""
    trader_refund: str | None = attrs.field(default=None, converter=optional(rules.string_18))
    """The ``trader_refund`` of the refund, if it has one."""

    _either = ("no_refund", "oid_refundno")


class RefundStatus(StrEnum):
    """``sta_refund``. An unknown value is accepted: it compares equal to its text, and is not final."""

    INITIALIZED = "0"
    PROCESSING = "1"
    SUCCESS = "2"
    FAILED = "3"

    @property
    def is_final(self) -> bool:
        """Whether the status can no longer change: success (the bank accepted the refund) or failed."""
        return self in (RefundStatus.SUCCESS, RefundStatus.FAILED)

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = "UNKNOWN"
        unknown._value_ = value
        return unknown

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return RefundStatus, (self.value,)  # early releases of Python 3.11 look up an unknown status by its name


def _read_only(fields: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(fields))


@attrs.frozen(kw_only=True)
class RefundRecord:
    """A refund's record, from a verified answer or notification, or from an unsigned source (``evidence``).

    A field that the record lacks has the request's value, or None if the request is not known or lacks it, too.
    Success means that the bank accepted the refund, not that the customer has received the money.
    """

    ret_code: str | None = None
    ret_msg: str | None = attrs.field(default=None, repr=False)
    """The gateway's text, in Chinese."""
    oid_partner: str | None = None
    no_refund: str | None = None
    dt_refund: datetime | None = None
    """In UTC+8; None only if the record lacks it and the request is not known."""
    money_refund: Decimal | None = None
    """Yuan (CNY)."""
    money_foreign_refund: Decimal | None = None
    """The amount in the order's currency (cross-border product)."""
    rate_id: str | None = None
    rate: Decimal | None = None
    exchange_bankcode: str | None = None
    oid_refundno: str | None = None
    """LianLian's number of this refund."""
    sta_refund: RefundStatus | None = None
    """None if the message has no status. Use ``is_final`` to tell whether it can still change."""
    settle_date: date | None = None
    """The settlement date of a refund that has succeeded."""
    trader_refund: str | None = attrs.field(default=None, repr=False, eq=False)
    extra: Mapping[str, str] = attrs.field(factory=dict, converter=_read_only, repr=False, eq=False)
    """Unknown fields, and known fields whose text does not have the documented form."""
    raw: Mapping[str, str] = attrs.field(factory=dict, converter=_read_only, repr=False, eq=False)
    """The mapping as received, including the signature."""
    last_exchange: LastExchange | None = attrs.field(default=None, repr=False, eq=False)
    """The HTTP exchange of the answer, for support tickets; None for a refund from a journal or a notification."""

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, str],
        asked: Mapping[str, str] = MappingProxyType({}),
        *,
        last_exchange: LastExchange | None = None,
    ) -> Self:
        """Return the record in a received mapping; :meth:`to_dict` returns this mapping.

        A missing field has the value in ``asked``, the wire fields of the request; the caller must have compared both.
        The result is a :class:`Refund` if ``no_refund`` and ``money_refund`` are known; else ``Refund.from_dict``
        raises ``InvalidRequest``. A value that is neither a string nor None raises it, too. An unreadable field is
        None, and its text is in ``extra``.
        """
        rules.expect(data, Mapping, "data")
        for name, value in cast("Mapping[str, object]", data).items():
            if value is not None:
                rules.expect(value, str, name)  # the JSON of another program may contain numbers
        known = ("sign", "sign_type", *_READERS)
        extra, values = {name: text for name, text in data.items() if name not in known}, dict[str, Any]()
        for name, read in _READERS.items():
            if text := data.get(name) or asked.get(name):
                try:
                    values[name] = read(text)
                except ValueError:  # an unreadable exchange rate must not hide that a refund was made
                    extra[name] = text
        missing = {"no_refund", "money_refund"} - values.keys()
        if missing and issubclass(cls, Refund):
            raise InvalidRequest(Problem(name, "is required", "nothing") for name in sorted(missing))
        kind = RefundRecord if missing else Refund
        return cast("Self", kind(**values, extra=extra, raw=data, last_exchange=last_exchange))

    def completed(self, asked: Mapping[str, str]) -> "RefundRecord":
        """Return this record with the missing fields from ``asked``, as :meth:`from_dict` does."""
        return RefundRecord.from_dict(self.raw, asked, last_exchange=self.last_exchange)

    def to_dict(self) -> dict[str, str]:
        """Return the received mapping, for JSON logs and queues."""
        return dict(self.raw)

    @property
    def is_final(self) -> bool:
        """Whether ``sta_refund`` can no longer change."""
        return self.sta_refund is not None and self.sta_refund.is_final

    @property
    def evidence(self) -> str | None:
        """The unsigned source of this record: a statement's line or a person's decision; None if it is signed."""
        return None if "sign" in self.raw else self.extra.get("evidence")

    def identity(self) -> dict[str, str]:
        """Return the wire fields that identify the refund, as far as they are known."""
        names = (*rules.names(RefundQuery), "money_refund")
        return {name: rules.wire_text(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def query(self) -> RefundQuery:
        """Return the query about this refund. Raises ``InvalidRequest`` if its ``dt_refund`` is unknown."""
        known = self.identity()
        known.pop("money_refund", None)
        if "no_refund" in known:
            known.pop("oid_refundno", None)
        return RefundQuery.from_record(known)

    def __reduce__(self) -> tuple[Any, ...]:
        # MappingProxyType cannot be pickled: pickle its content.
        return partial(type(self), **rules.values(self) | {"extra": dict(self.extra), "raw": dict(self.raw)}), ()


@attrs.frozen(kw_only=True)
class Refund(RefundRecord):
    """A record with a known refund number and amount. If ``apply_refund`` returns it, ``dt_refund`` is known, too."""

    no_refund: str
    money_refund: Decimal
    """Yuan (CNY)."""


_READERS: Final[dict[str, Callable[[str], object]]] = {
    **dict.fromkeys(("ret_code", "ret_msg", "oid_partner", "no_refund", "rate_id"), str),
    "dt_refund": wire.parse_timestamp,
    "money_refund": lambda text: wire.parse_money(wire.parse_decimal(text)),  # 0000000088.00 equals 88.00, too
    "money_foreign_refund": wire.parse_decimal,
    "rate": wire.parse_decimal,
    **dict.fromkeys(("exchange_bankcode", "oid_refundno", "trader_refund"), str),
    "sta_refund": RefundStatus,
    "settle_date": wire.parse_date,
}
"""The fields of an answer and their parsers."""

DOCUMENTED: Final = {"sign", "sign_type", *_READERS, *rules.names(RefundRequest), *rules.names(RefundQuery)}
"""Every refund field on LianLian's pages."""
