"""``lianlian apply`` and ``lianlian query``: one refund from the command line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO, Final

import anyio
import attrs
import click

from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundQuery, RefundRecord, RefundRequest, RefundStatus
from lianlian_async.session import RefundSession

from .exit_codes import INTERRUPTED, exit_outcome_of_refund
from .options import (
    SIGNATURE_FIELDS,
    Command,
    check_partner,
    config_option,
    deadline_option,
    file_argument,
    load_merchant,
    read_message,
)
from .output import Output, json_option, pass_output, query_command, table

_ENVELOPE: Final = ("oid_partner", *SIGNATURE_FIELDS)
_HELP: Final = {
    "no_refund": "The merchant's refund number.",
    "dt_refund": "Time of the refund order: yyyyMMddHHmmss, China Standard Time.",
    "money_refund": "Yuan, such as 200.01.",
    "no_order": "The merchant's order number.",
    "dt_order": "Time of the order: yyyyMMddHHmmss, China Standard Time.",
    "oid_paybill": "LianLian's payment number.",
    "notify_url": "URL to which LianLian posts the result.",
    "oid_refundno": "LianLian's refund number.",
    "trader_refund": "Number of the refunded merchant if it is a different one.",
}


def _options(cls: type[Any]) -> Callable[[Command], Command]:
    """Add the options of a command about one refund: one for each field of ``cls``, and the common ones."""
    fields = [click.option(f"--{field.name.replace('_', '-')}", help=_HELP[field.name]) for field in attrs.fields(cls)]
    common: tuple[Callable[[Any], Any], ...] = (deadline_option, config_option, json_option, pass_output)
    options = (file_argument(required=False), *fields, *common)
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


@click.command
@_options(RefundRequest)
def apply(
    output: Output, /, file: BinaryIO | None, deadline: float, config: Path | None, **options: str | None
) -> None:
    """Make one refund.

    FILE is the request as JSON with LianLian's field names (- is stdin); options override its fields. The fields sign
    and sign_type are ignored, and oid_partner must be the configured merchant's. This command has no journal: if the
    outcome is unknown, run `lianlian query` before you repeat the command.
    """
    merchant, message = _read(file, config)
    known = {name: text for name, text in message.items() if text and name not in _ENVELOPE}
    request = RefundRequest.from_dict(known | _given(options))
    try:
        _show_answer(output, merchant, deadline, lambda session: session.apply_refund(request))
    except KeyboardInterrupt:
        query = request.query()
        output.show(
            {"outcome": INTERRUPTED.word, "query": query.to_dict()},
            f"refund {request.no_refund} may have been made; query it with: {query_command(query)}",
        )
        raise


@click.command
@_options(RefundQuery)
def query(
    output: Output, /, file: BinaryIO | None, deadline: float, config: Path | None, **options: str | None
) -> None:
    """Query LianLian's record of one refund.

    FILE is a query, or the request of `lianlian apply`, as JSON (- is stdin); options override its fields.
    """
    merchant, message = _read(file, config)
    known = {name: text for name in options if (text := message.get(name))}
    query = RefundQuery.from_dict(known | _given(options))
    _show_answer(output, merchant, deadline, lambda session: session.query_refund(query))


def _given(options: Mapping[str, str | None]) -> dict[str, str]:
    return {name: text for name, text in options.items() if text is not None}


def _read(file: BinaryIO | None, config: Path | None) -> tuple[Merchant, dict[str, str]]:
    """Load the merchant, and read ``file``; raises ``InvalidRequest`` if it belongs to another merchant."""
    merchant = load_merchant(config)
    message = {} if file is None else read_message(file)
    check_partner(message.get("oid_partner", merchant.oid_partner), merchant)
    return merchant, message


def _show_answer(
    output: Output, merchant: Merchant, deadline: float, ask: Callable[[RefundSession], Awaitable[RefundRecord]]
) -> None:
    async def call() -> RefundRecord:
        async with RefundSession(merchant, deadline=deadline) as session:
            return await ask(session)

    show_refund(output, anyio.run(call))


def show_refund(output: Output, refund: RefundRecord) -> None:
    """Print a refund, and exit with the code of its state."""
    outcome = exit_outcome_of_refund(refund)
    fields = [field.name for field in attrs.fields(RefundRecord) if field.eq]  # the other fields describe the message
    rows = [(name, *_cells(getattr(refund, name))) for name in fields]
    rows += [(name, text, "not documented") for name, text in refund.extra.items()]
    output.show(
        {"outcome": outcome.word, "refund": refund.to_dict()},
        table(f"refund {refund.no_refund}: {outcome.word}", ("field", "value", "type"), rows),
    )
    click.get_current_context().exit(outcome.exit_code)


def _cells(value: object) -> tuple[str, str]:
    match value:
        case None:
            return "-", "absent"
        case RefundStatus():
            return f"{value.value} ({value.name.lower()})", "RefundStatus"
        case datetime():
            return value.isoformat(), "datetime"
        case _:
            return str(value), type(value).__name__
