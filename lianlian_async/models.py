"""Requests and refunds as frozen attrs classes. A new request is validated when it is created.

Field names and lengths come from LianLian's apply and query pages.
"""

import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from functools import cache, partial, wraps
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self, TypeAlias, TypeVar, cast

import attrs

from . import text_rules, wire
from .errors import InvalidRequest, LastExchange, Problem, printable

Rules: TypeAlias = Mapping[str, Callable[[Any], object]]
"""How to convert each field; the function raises ``ValueError`` with the broken rule."""

Request = TypeVar("Request", bound="_Request")
Record = TypeVar("Record", bound="RefundRecord")

_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")


@cache
def _defaults(cls: type[Any]) -> dict[str, Any]:
    """Return the default of each field of ``cls``; ``attrs.NOTHING`` if the field is required."""
    return {field.name: field.default for field in attrs.fields(cls)}


def _values(instance: Any) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in _defaults(instance.__class__)}


def _shown(value: object) -> str:
    """Return ``value`` for an error message, cut off after 80 characters."""
    if value is attrs.NOTHING:
        return "nothing"
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


def expect(value: object, kind: type, name: str) -> None:
    """Raise :class:`~lianlian_async.InvalidRequest` about the argument ``name`` unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        rule = f"must be a {kind.__name__}"
        if isinstance(value, Mapping) and hasattr(kind, "from_dict"):
            rule += f" ({kind.__name__}.from_dict reads a mapping)"
        raise InvalidRequest([Problem(name, rule, f"{_shown(value)} of type {type(value).__name__}")])


def check_storable(value: Any, name: str) -> str:
    """Return ``value``. Raises ``InvalidRequest`` about ``name`` unless it is a string that can be stored."""
    # A journal writes many refunds at once: one value that it cannot store would make all their writes fail.
    expect(value, str, name)
    if _NOT_STORABLE.search(value):
        raise InvalidRequest([Problem(name, "must not contain NUL or a lone surrogate", _shown(value))])
    return cast("str", value)


def _wire_text(value: object) -> str:
    match value:
        case datetime():
            return wire.format_timestamp(value)
        case Decimal():
            return wire.format_money(value)
        case _:
            return str(value)


class _Request:
    """The common part of both requests: the checks, and the wire form. One of the fields ``_either`` is required."""

    __slots__ = ()
    _rules: ClassVar[Rules]
    _either: ClassVar[tuple[str, str]]

    def __attrs_post_init__(self) -> None:  # attrs calls it in a user's subclass
        self._set(_values(self), self._rules)

    def _set(self, given: Mapping[str, Any], rules: Rules) -> Self:
        """Set every field, and return the request. Raises ``InvalidRequest`` with the problems of all fields."""
        expect(given, Mapping, "data")
        cls: Any = self.__class__
        defaults = _defaults(cls)
        problems = [
            Problem(printable(str(key)), f"is not a field of {cls.__name__}", _shown(given[key]))
            for key in given
            if key not in defaults
        ]
        for name, default in defaults.items():
            value = given.get(name, default)
            if hasattr(value, "factory"):  # of a field that a user's subclass adds
                value = value.factory()
            try:
                if value is attrs.NOTHING or (value is None and default is attrs.NOTHING):
                    raise ValueError("is required")
                if name in rules and value is not None:
                    value = rules[name](value)
            except InvalidRequest as error:
                problems += error.problems
            except ValueError as error:
                problems.append(Problem(name, str(error), _shown(value)))
            object.__setattr__(self, name, value)
        one, other = self._either
        if getattr(self, one) is None and getattr(self, other) is None:
            problems.append(Problem(one, f"{one} or {other} is required", "neither"))
        if problems:
            raise InvalidRequest(problems)
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the request that :meth:`to_dict` wrote, with all checks; unknown keys raise ``InvalidRequest``."""
        return cls.__new__(cls)._set(data, cls._rules)  # noqa: SLF001 - of this class

    @classmethod
    def from_record(cls, data: Mapping[str, Any]) -> Self:
        """Return the request that :meth:`to_dict` wrote into a journal or a queue, without checking it again.

        A release with stricter rules must still be able to query earlier refunds. Raises ``InvalidRequest`` only for a
        wrong type, a missing or unknown field, an invalid amount or time, or a string that cannot be stored.
        """
        return cls.__new__(cls)._set(data, _RECORDED)  # noqa: SLF001 - of this class

    def to_dict(self) -> dict[str, str]:
        """Return the present fields in wire form (strings), for JSON logs, queues and the gateway.

        Fields that a subclass adds are omitted.
        """
        present = ((name, value) for name, value in _values(self).items() if value is not None)
        return {name: _wire_text(value) for name, value in present if name in DOCUMENTED}


def _checked(cls: type[Request]) -> type[Request]:
    """Decorate ``cls``, so that one ``InvalidRequest`` reports every invalid, missing and unknown field."""

    @wraps(cls.__init__)
    def init(self: Request, /, **fields: Any) -> None:
        self._set(fields, cls._rules)

    cls.__init__ = init  # type: ignore[assignment,method-assign]
    return cls


def _time(value: datetime | str) -> datetime:
    """Declare for type checkers that a field accepts text; ``_PARSED`` converts it."""
    return cast("datetime", value)


def _money(value: Decimal | int | str) -> Decimal:
    """Declare the types of an amount, as :func:`_time` does."""
    return cast("Decimal", value)


_PARSED: Final[Rules] = {
    "dt_refund": wire.parse_timestamp,
    "money_refund": wire.parse_money,
    "dt_order": wire.parse_timestamp,
}
_CHECKED: Final[Rules] = {
    **_PARSED,
    "no_refund": partial(text_rules.existing, longest=32),
    "no_order": partial(text_rules.existing, longest=32),
    "oid_paybill": partial(text_rules.existing, longest=32),
    "oid_refundno": partial(text_rules.existing, longest=16),
    "trader_refund": partial(text_rules.existing, longest=18),
    "notify_url": partial(text_rules.url, longest=128),
}
_RECORDED: Final[Rules] = {name: partial(check_storable, name=name) for name in _CHECKED} | {**_PARSED}


@_checked
@attrs.frozen(kw_only=True)
class RefundRequest(_Request):
    """One refund (LianLian's *Apply API*). Raises ``InvalidRequest`` if a field is invalid.

    ``no_refund``, ``dt_refund`` and ``money_refund`` identify it: choose and store them once, and never change them.
    """

    no_refund: str
    """The merchant's refund number: at most 32 visible letters, decimal digits and ASCII characters (0x21 to 0x7E),
    NFKC-normal. It should differ from ``no_order``."""
    dt_refund: datetime = attrs.field(converter=_time)
    """The time of the refund request: an aware datetime or 14 digits; stored in UTC+8, to the second."""
    money_refund: Decimal = attrs.field(converter=_money)
    """Yuan (CNY), 0.01 to 100,000,000.00, at most two decimals, not a float."""
    no_order: str | None = None
    """The merchant's order number; this or ``oid_paybill`` is required."""
    dt_order: datetime | None = attrs.field(default=None, converter=attrs.converters.optional(_time))
    """The date and time of ``no_order``."""
    oid_paybill: str | None = None
    """LianLian's payment number; this or ``no_order`` is required."""
    notify_url: str | None = None
    """The URL to which LianLian POSTs the result, at most 128 characters; None: the merchant's default."""
    trader_refund: str | None = None
    """The merchant for whom the refund is made, at most 18 characters; None: ``oid_partner``."""

    _rules: ClassVar[Rules] = {**_CHECKED, "no_refund": text_rules.new_number}
    _either = ("no_order", "oid_paybill")

    def query(self) -> "RefundQuery":
        """Return the query about this refund."""
        asked = {"no_refund": self.no_refund, "dt_refund": self.dt_refund, "trader_refund": self.trader_refund}
        return RefundQuery.from_record(asked)


@_checked
@attrs.frozen(kw_only=True)
class RefundQuery(_Request):
    """A query about one refund (LianLian's *Refund Status API*): ``no_refund`` or ``oid_refundno`` is required."""

    no_refund: str | None = None
    """The merchant's refund number."""
    dt_refund: datetime = attrs.field(converter=_time)
    """The refund's own ``dt_refund``: an aware datetime or 14 digits."""
    oid_refundno: str | None = None
    """LianLian's refund number, at most 16 characters."""
    trader_refund: str | None = None
    """The ``trader_refund`` of the refund, if it has one."""

    _rules = _CHECKED
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

    A field that the message lacks has the request's value, or None if the request is not known or lacks it, too.
    Success means that the bank accepted the refund, not that the customer has received the money.
    """

    ret_code: str | None = None
    ret_msg: str | None = attrs.field(default=None, repr=False)
    """The gateway's text, in Chinese."""
    oid_partner: str | None = None
    no_refund: str | None = None
    dt_refund: datetime | None = None
    """In UTC+8; None if neither the message nor the request has a readable one."""
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
    """The HTTP exchange of the answer, for support tickets; None for a record from a journal or a notification."""

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, str],
        asked: Mapping[str, str] = MappingProxyType({}),
        *,
        last_exchange: LastExchange | None = None,
    ) -> Self:
        """Return the record in a received mapping; :meth:`to_dict` returns this mapping.

        A missing field has the value in ``asked``, the wire fields of the request; the caller has
        checked that ``data`` and ``asked`` agree.
        The result is a :class:`Refund` if ``no_refund`` and ``money_refund`` are known; else ``Refund.from_dict``
        raises ``InvalidRequest``. A value that is neither a string nor None raises it, too. An unreadable field is
        None, and its text is in ``extra``.
        """
        expect(data, Mapping, "data")
        for name, value in cast("Mapping[str, object]", data).items():
            if value is not None:
                expect(value, str, name)  # the JSON of another program may contain numbers
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
        names = (*_defaults(RefundQuery), "money_refund")
        return {name: _wire_text(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def query(self) -> RefundQuery:
        """Return the query about this refund. Raises ``InvalidRequest`` without a ``dt_refund`` or without a number."""
        known = {name: getattr(self, name) for name in _defaults(RefundQuery)}
        if self.no_refund is not None:
            del known["oid_refundno"]
        return RefundQuery.from_record(known)

    def __reduce__(self) -> tuple[Any, ...]:
        # MappingProxyType cannot be pickled: pickle its content.
        return partial(type(self), **_values(self) | {"extra": dict(self.extra), "raw": dict(self.raw)}), ()


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

DOCUMENTED: Final = {"sign", "sign_type", *_READERS, *_defaults(RefundRequest), *_defaults(RefundQuery)}
"""Every refund field on LianLian's pages."""
