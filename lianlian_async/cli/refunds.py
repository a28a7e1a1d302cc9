"""``lianlian apply``, ``query`` and ``notify``: one refund, or a notification of it, from the command line."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import anyio
import attrs

from lianlian_async import wire
from lianlian_async.exchange import HttpResponse, NoResponse
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundQuery, RefundRecord, RefundRequest, check_storable
from lianlian_async.protocol import Protocol
from lianlian_async.session import RefundSession
from lianlian_async.signing import SigningKey, signature_source

from .exit_codes import exit_outcome_of
from .options import SIGNATURE_FIELDS, check_partner, load_merchant, read_message
from .output import Output, query_command, table
from .signals import sigterm_interrupts

_ENVELOPE: Final = ("oid_partner", *SIGNATURE_FIELDS)


def apply(output: Output, /, file: BinaryIO | None, deadline: float, config: Path | None, **options: str | None) -> int:
    merchant, fields = _read(file, config, options)
    request = RefundRequest.from_dict(fields)
    try:
        with sigterm_interrupts():
            return _show_answer(output, merchant, deadline, lambda session: session.apply_refund(request))
    except KeyboardInterrupt:
        query = request.query()
        text = f"refund {request.no_refund} may have been made; query it with: {query_command(query)}"
        return output.interrupted(text, query=query.to_dict())


def query(output: Output, /, file: BinaryIO | None, deadline: float, config: Path | None, **options: str | None) -> int:
    merchant, fields = _read(file, config, options)
    query = RefundQuery.from_dict({name: fields[name] for name in options if name in fields})
    return _show_answer(output, merchant, deadline, lambda session: session.query_refund(query))


def _read(
    file: BinaryIO | None, config: Path | None, options: Mapping[str, str | None]
) -> tuple[Merchant, dict[str, str]]:
    """Load the merchant, and return the fields of ``file`` and ``options``; the file must belong to the merchant."""
    merchant = load_merchant(config)
    message = {} if file is None else read_message(file)
    check_partner(message.get("oid_partner", merchant.oid_partner), merchant)
    known = {name: text for name, text in message.items() if text and name not in _ENVELOPE}
    return merchant, known | {name: text for name, text in options.items() if text is not None}


def _show_answer(
    output: Output, merchant: Merchant, deadline: float, ask: Callable[[RefundSession], Awaitable[RefundRecord]]
) -> int:
    async def call() -> RefundRecord:
        async with RefundSession(merchant, deadline=deadline) as session:
            return await ask(session)

    return _show_refund(output, anyio.run(call))


def _show_refund(output: Output, refund: RefundRecord) -> int:
    """Print a refund, and return the exit code for its state."""
    outcome = exit_outcome_of(refund)
    names = [field.name for field in attrs.fields(RefundRecord) if field.eq]  # LianLian's documented response fields
    cells = {**{name: getattr(refund, name) for name in names}, **refund.extra}
    if refund.sta_refund is not None:
        cells["sta_refund"] = f"{refund.sta_refund} ({refund.sta_refund.name.lower()})"
    shown = table(f"refund {refund.no_refund}: {outcome.word}", ("", ""), cells.items())
    output.show({"outcome": outcome.word, "refund": refund.to_dict()}, shown)
    return outcome.exit_code


def send(output: Output, /, *, url: str, gateway_key: Path, config: Path | None, **fields: str | None) -> int:
    from lianlian_async.sandbox.notifier import post_once

    key = SigningKey.load(gateway_key, name="--gateway-key")
    message = {name: text for name, text in fields.items() if text is not None}
    message |= {"oid_partner": load_merchant(config).oid_partner, "ret_code": "0000", "sign_type": "RSA"}
    for name, text in message.items():
        check_storable(text, name)
    body = wire.encode({**message, "sign": key.sign(signature_source(message))})
    return _show_response(output, anyio.run(post_once, url, body))


def _show_response(output: Output, response: HttpResponse | NoResponse) -> int:
    from lianlian_async.sandbox.notifier import is_acknowledged

    word = "acknowledged" if is_acknowledged(response) else "not acknowledged"
    status, answer = None, ""
    if isinstance(response, NoResponse):
        shown = f"no response: {response.reason}"
    else:
        status, answer = response.status, response.body.decode(errors="replace")
        shown = f"HTTP {status} {answer}"
    output.show({"outcome": word, "status": status, "answer": answer}, f"{word}: {shown}")
    return 0 if word == "acknowledged" else 1


def verify_notification(output: Output, /, file: BinaryIO, config: Path | None) -> int:
    from lianlian_async.notifications.completion import complete

    merchant = load_merchant(config)
    notification = Protocol(merchant, merchant.load_keys()).read_notification(file.read())
    return _show_refund(output, anyio.run(complete, notification, None, None, 0.0))
