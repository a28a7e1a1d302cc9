"""LianLian's daily statement of domestic refunds, from the sandbox's ledger."""

from collections.abc import Iterator

from lianlian_async import wire
from lianlian_async.models import RefundStatus

from .gateway import SandboxGateway
from .ledger import Record


def statement(gateway: SandboxGateway) -> str:
    """Return the statement as CSV: one row of LianLian's 14 columns for each successful refund."""
    return "".join(
        ",".join(_row(gateway, refund)) + "\n"
        for refund in gateway.refunds
        if refund.status(gateway.now()) is RefundStatus.SUCCESS
    )


def _row(gateway: SandboxGateway, refund: Record) -> Iterator[str]:
    settled = wire.format_timestamp(gateway.time_of_day(refund.settles_at))
    yield refund.no_refund
    yield gateway.oid_partner
    yield _time(refund.dt_refund)
    yield "101001"  # busi_partner: virtual goods
    yield refund.no_order or refund.oid_paybill or ""
    yield settled[:8]
    yield f"-{refund.money_refund.normalize():f}"
    yield "1"  # direction: sent
    yield "5"  # status: refunded
    yield _time(settled)
    yield from ("0", "API渠道", "余额支付", "sandbox")


def _time(digits: str) -> str:
    return f"{digits[:8]} {digits[8:10]}:{digits[10:12]}:{digits[12:]}"
