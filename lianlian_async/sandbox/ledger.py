"""The sandbox's books: orders, the refunds made of them, and the state of each; pure, with time as an argument.

Moments are seconds of one steady clock. What the real gateway would refuse raises :class:`~.answers.Refusal`.
Whatever is switched on, the refunds of one order that have not failed never exceed its amount.
"""

from __future__ import annotations

from decimal import Decimal
from enum import Enum
from itertools import count
from typing import Final

import attrs

from lianlian_async import wire
from lianlian_async.models import RefundStatus

from .answers import Refusal

__all__ = ["Application", "Ledger", "Order", "Question", "Record", "Repeated"]

_THREE_MONTHS: Final = 92 * 86_400.0
"""Seconds: no three months are longer."""


class Repeated(Enum):
    """What a second application under a ``no_refund`` meets: no page tells, so a client must survive each of them."""

    REJECT = "reject"
    """1002, duplicate number; nothing moves."""
    REPLAY = "replay"
    """The first answer once more, whatever the second application said; nothing moves."""
    AGAIN = "again"
    """It is a refund like any other: the money moves twice, if the order is worth as much. With a ``default_order`` of
    100,000,000.00 the gateway carries out every request that it gets, and ``times_made`` counts them."""


@attrs.frozen(kw_only=True)
class Application:
    """A well-formed application for a refund; texts are those of the wire."""

    oid_partner: str
    no_refund: str
    dt_refund: str
    money_refund: Decimal
    amount_as_sent: str
    """What answers repeat: ``0.1`` is not made ``0.10``."""
    no_order: str | None
    dt_order: str | None
    oid_paybill: str | None
    notify_url: str
    domestic: bool
    """Applied for at the domestic product's endpoint: answers tell of no foreign currency."""


@attrs.frozen(kw_only=True)
class Question:
    """A well-formed question about a refund."""

    oid_partner: str
    dt_refund: str
    no_refund: str
    """The merchant's number, empty if not given."""
    oid_refundno: str
    """LianLian's number, empty if not given."""


@attrs.define(kw_only=True)
class Record:
    """One refund that was carried out."""

    application: Application
    oid_refundno: str
    """LianLian's number of it."""
    received_at: float
    settles_at: float
    fails: bool
    """Whether it will turn out as failed when it settles."""

    def status(self, now: float) -> RefundStatus:
        """``sta_refund`` at a moment: initialized for the first half of its way, processing for the second."""
        if now >= self.settles_at:
            return RefundStatus.FAILED if self.fails else RefundStatus.SUCCESS
        if now >= (self.received_at + self.settles_at) / 2:
            return RefundStatus.PROCESSING
        return RefundStatus.INITIALIZED

    def moved(self, now: float) -> Decimal:
        """Yuan that left the merchant for it: all of it from the start, nothing once it failed."""
        return Decimal(0) if self.status(now) is RefundStatus.FAILED else self.application.money_refund


@attrs.define(kw_only=True)
class Order:
    """A paid order, and what was refunded of it."""

    no_order: str | None
    dt_order: str | None
    oid_paybill: str
    """LianLian's payment number."""
    money_order: Decimal
    """Yuan that the customer paid."""
    refunds: list[Record] = attrs.field(factory=list, init=False)

    def rest(self, now: float) -> Decimal:
        """Yuan that can still be refunded."""
        return self.money_order - sum((record.moved(now) for record in self.refunds), Decimal(0))


@attrs.define(kw_only=True)
class Ledger:
    """All orders and refunds. No method awaits: a check and the booking that follows it are one step."""

    repeated: Repeated
    settle_after: float = attrs.field(validator=attrs.validators.ge(0))
    """Seconds from carrying a refund out to its final state."""
    default_order: Decimal | None = attrs.field(converter=attrs.converters.optional(wire.parse_money))
    """What an order that nobody added is worth, in yuan; None: it does not exist."""
    records: list[Record] = attrs.field(factory=list, init=False)
    """Every refund that was carried out, oldest first."""
    _orders: dict[tuple[str, str], Order] = attrs.field(factory=dict, init=False)  # by no_order
    _payments: dict[tuple[str, str], Order] = attrs.field(factory=dict, init=False)  # by oid_paybill
    _refunds: dict[tuple[str, str], list[Record]] = attrs.field(factory=dict, init=False)  # by no_refund
    _failing: set[tuple[str, str]] = attrs.field(factory=set, init=False)  # no_refund
    _sequence: count[int] = attrs.field(factory=lambda: count(1_000_000_000_000_001), init=False)

    def add_order(
        self,
        oid_partner: str,
        no_order: str | None,
        money_order: Decimal,
        *,
        dt_order: str | None = None,
        oid_paybill: str | None = None,
    ) -> Order:
        """Enter a paid order; LianLian's number of the payment is made up where none is given.

        Raises ``ValueError`` for an amount that is none, and for a number that is taken.
        """
        order = Order(
            no_order=no_order,
            dt_order=dt_order,
            oid_paybill=oid_paybill or str(next(self._sequence)),
            money_order=wire.parse_money(money_order),
        )
        payment = (oid_partner, order.oid_paybill)
        if payment in self._payments:
            raise ValueError(f"payment {order.oid_paybill} exists")
        if no_order is not None:
            if (oid_partner, no_order) in self._orders:
                raise ValueError(f"order {no_order} exists")
            self._orders[oid_partner, no_order] = order
        self._payments[payment] = order
        return order

    def apply(self, application: Application, now: float) -> Record:
        """Carry a refund out. What is answered is the record as it was at its own ``received_at``."""
        earlier = self._refunds.get((application.oid_partner, application.no_refund))
        if earlier and self.repeated is Repeated.REJECT:
            raise Refusal("1002")
        if earlier and self.repeated is Repeated.REPLAY:
            return earlier[0]
        order = self._find_order(application)
        if application.money_refund > order.money_order:
            raise Refusal("5003")
        if application.money_refund > order.rest(now):
            raise Refusal("5007")
        return self._book(order, application, now)

    def _find_order(self, application: Application) -> Order:
        named = []
        if application.no_order is not None:
            named.append(self._orders.get((application.oid_partner, application.no_order)))
        if application.oid_paybill is not None:
            named.append(self._payments.get((application.oid_partner, application.oid_paybill)))
        order = named[0]
        if any(other is not order for other in named):
            raise Refusal("9092")
        if order is None:
            if self.default_order is None:
                raise Refusal("5002")
            return self.add_order(
                application.oid_partner,
                application.no_order,
                self.default_order,
                dt_order=application.dt_order,
                oid_paybill=application.oid_paybill,
            )
        if None not in (application.dt_order, order.dt_order) and application.dt_order != order.dt_order:
            raise Refusal("5002")
        return order

    def _book(self, order: Order, application: Application, now: float) -> Record:
        number = (application.oid_partner, application.no_refund)
        record = Record(
            application=application,
            oid_refundno=str(next(self._sequence)),
            received_at=now,
            settles_at=now + self.settle_after,
            fails=number in self._failing,
        )
        order.refunds.append(record)
        self._refunds.setdefault(number, []).append(record)
        self.records.append(record)
        return record

    def query(self, question: Question, now: float) -> Record:
        """The refund that is asked about: the last one, where a number was carried out again.

        A question that names both numbers, or another ``dt_refund``, is only about a refund that has them all.
        """
        known = self.made(question.oid_partner, question.no_refund) if question.no_refund else self.records
        fitting = [record for record in known if _fits(record, question)]
        if not fitting:
            raise Refusal("8901")
        record = fitting[-1]
        if now - record.received_at > _THREE_MONTHS:
            raise Refusal("3005")
        return record

    def fail(self, oid_partner: str, no_refund: str, now: float) -> None:
        """Let a refund, made already or not yet, turn out as failed when it settles.

        Raises ``ValueError`` where it is final: a final state never changes.
        """
        made = self.made(oid_partner, no_refund)
        if any(record.status(now).is_final for record in made):
            raise ValueError(f"refund {no_refund} is final already")
        self._failing.add((oid_partner, no_refund))
        for record in made:
            record.fails = True

    def made(self, oid_partner: str, no_refund: str) -> list[Record]:
        """Each time that a ``no_refund`` was carried out, oldest first."""
        return self._refunds.get((oid_partner, no_refund), [])


def _fits(record: Record, question: Question) -> bool:
    return (
        record.application.oid_partner == question.oid_partner
        and record.application.dt_refund == question.dt_refund
        and question.oid_refundno in ("", record.oid_refundno)
    )
