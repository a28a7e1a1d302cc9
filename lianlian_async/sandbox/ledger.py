"""The sandbox's ledger: orders, refunds and their states. No I/O and no clock: time is an argument.

Times are seconds of the gateway's clock. An unacceptable request raises :class:`~.answers.Rejection`. The sum of an
order's refunds, except failed ones, never exceeds the order's amount.
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import Enum
from itertools import count
from typing import Any, Final

import attrs

from lianlian_async import wire
from lianlian_async.models import RefundStatus

from .answers import Rejection

_THREE_MONTHS: Final = 92 * 86_400.0
"""Seconds in the longest three months."""
_COPIED: Final = ("no_refund", "dt_refund", "no_order", "oid_paybill", "notify_url")


class Repeated(Enum):
    """The effect of a second apply request with the same ``no_refund``. LianLian does not document it."""

    REJECT = "reject"
    """1002 (duplicate number); no money moves."""
    REPLAY = "replay"
    """The answer to the first request again, even if the second one differs; no money moves."""
    AGAIN = "again"
    """A second refund, if the order's amount (see ``default_order``) allows it."""


@attrs.define(kw_only=True)
class Record:
    """One refund that was made, with the strings of its request unchanged."""

    no_refund: str
    dt_refund: str
    money_refund: Decimal
    """Yuan, with the decimals of the request."""
    no_order: str | None
    oid_paybill: str | None
    notify_url: str
    domestic: bool
    """Whether the request used the domestic endpoint, whose answers have no foreign currency."""
    oid_refundno: str
    """LianLian's refund number."""
    received_at: float
    settles_at: float
    """When the refund becomes final."""
    fails: bool
    """Whether the final state is failed."""

    def status(self, now: float) -> RefundStatus:
        """Return ``sta_refund``: initialized for half of the time until ``settles_at``, then processing, then final."""
        if now >= self.settles_at:
            return RefundStatus.FAILED if self.fails else RefundStatus.SUCCESS
        if now >= (self.received_at + self.settles_at) / 2:
            return RefundStatus.PROCESSING
        return RefundStatus.INITIALIZED

    def moved(self, now: float) -> Decimal:
        """Return the yuan that the refund moved: the whole amount, or 0 after it failed."""
        return Decimal(0) if self.status(now) is RefundStatus.FAILED else self.money_refund


@attrs.define(kw_only=True)
class Order:
    """A paid order and its refunds."""

    no_order: str | None
    oid_paybill: str
    """LianLian's payment number."""
    money_order: Decimal = attrs.field(converter=wire.parse_money)
    """The customer's payment in yuan."""
    refunds: list[Record] = attrs.field(factory=list, init=False)

    def rest(self, now: float) -> Decimal:
        """Return the yuan that can still be refunded."""
        return self.money_order - sum((record.moved(now) for record in self.refunds), Decimal(0))


@attrs.define(kw_only=True)
class Ledger:
    """All orders and refunds of one merchant. No method awaits, so each method is atomic."""

    repeated: Repeated = attrs.field(converter=Repeated)
    settle_after: float = attrs.field(validator=attrs.validators.ge(0))
    """Seconds until a refund is final."""
    default_order: Decimal | None = attrs.field(converter=attrs.converters.optional(wire.parse_money))
    """Amount in yuan of each order that was not added; None: such an order does not exist."""
    records: list[Record] = attrs.field(factory=list, init=False)
    """Every refund that was made, oldest first."""
    _orders: dict[tuple[str, str], Order] = attrs.field(factory=dict, init=False)
    """By the name and the value of a number: an order has an ``oid_paybill``, and may have a ``no_order``."""
    _refunds: dict[str, list[Record]] = attrs.field(factory=dict, init=False)  # by no_refund
    _failing: set[str] = attrs.field(factory=set, init=False)  # no_refund
    _sequence: Iterator[int] = attrs.field(factory=lambda: count(1_000_000_000_000_001), init=False)

    def add_order(self, order: Order) -> Order:
        """Add ``order`` and return it. Raises ``ValueError`` if another order has one of its numbers."""
        numbers = _numbers(order)
        for number in numbers:
            if number in self._orders:
                raise ValueError(f"{' '.join(number)} exists already")
        self._orders |= dict.fromkeys(numbers, order)
        return order

    def new_number(self) -> str:
        """Return a new number of a payment or of a refund."""
        return str(next(self._sequence))

    def apply(self, fields: Mapping[str, str], now: float, *, domestic: bool = False) -> Record:
        """Make the refund of a well-formed request; return its record, or the first one with ``Repeated.REPLAY``."""
        earlier = self.made(fields["no_refund"])
        if earlier and self.repeated is Repeated.REJECT:
            raise Rejection("1002")
        if earlier and self.repeated is Repeated.REPLAY:
            return earlier[0]
        copied: dict[str, Any] = {name: fields.get(name) or None for name in _COPIED}
        record = Record(
            **copied,
            money_refund=Decimal(fields["money_refund"]),
            domestic=domestic,
            oid_refundno=self.new_number(),
            received_at=now,
            settles_at=now + self.settle_after,
            fails=fields["no_refund"] in self._failing,
        )
        order = self._find_order(record)
        if record.money_refund > order.money_order:
            raise Rejection("5003")
        if record.money_refund > order.rest(now):
            raise Rejection("5007")
        for records in (order.refunds, self._refunds.setdefault(record.no_refund, []), self.records):
            records.append(record)
        return record

    def _find_order(self, record: Record) -> Order:
        order, *others = [self._orders.get(number) for number in _numbers(record)]
        if any(other is not order for other in others):
            raise Rejection("9092")
        if order is None:
            if self.default_order is None:
                raise Rejection("5002")
            number = record.oid_paybill or self.new_number()
            order = self.add_order(Order(no_order=record.no_order, oid_paybill=number, money_order=self.default_order))
        return order

    def query(self, fields: Mapping[str, str], now: float) -> Record:
        """Return the newest refund that matches ``dt_refund`` and every number of a query."""
        no_refund, oid_refundno = fields.get("no_refund"), fields.get("oid_refundno")
        known = self.made(no_refund) if no_refund else self.records
        found = [
            record
            for record in known
            if record.dt_refund == fields["dt_refund"] and (not oid_refundno or oid_refundno == record.oid_refundno)
        ]
        if not found:
            raise Rejection("8901")
        if now - found[-1].received_at > _THREE_MONTHS:
            raise Rejection("3005")
        return found[-1]

    def fail(self, no_refund: str, now: float) -> None:
        """Let an existing or future refund fail when it becomes final; raises ``ValueError`` if it is already final."""
        made = self.made(no_refund)
        if any(record.status(now).is_final for record in made):
            raise ValueError(f"refund {no_refund} is already final")
        self._failing.add(no_refund)
        for record in made:
            record.fails = True

    def made(self, no_refund: str) -> list[Record]:
        """Return the refunds with ``no_refund``, oldest first."""
        return self._refunds.get(no_refund, [])


def _numbers(owner: Order | Record) -> list[tuple[str, str]]:
    """Return name and value of each number that identifies an order."""
    numbers = {"no_order": owner.no_order, "oid_paybill": owner.oid_paybill}
    return [(name, number) for name, number in numbers.items() if number is not None]
