"""``lianlian notify``: send a test notification to a service, and read a notification."""

from pathlib import Path
from typing import BinaryIO

import anyio
import click

from lianlian_async import wire
from lianlian_async.exchange import HttpResponse
from lianlian_async.notifications.completion import complete
from lianlian_async.protocol import Protocol
from lianlian_async.sandbox.notifier import CONTENT_TYPE, is_acknowledged, post
from lianlian_async.signing import SigningKey, signature_source
from lianlian_async.transport import HttpSender

from .options import load_merchant
from .output import Output
from .refunds import show_refund


def send(output: Output, /, *, url: str, gateway_key: Path, config: Path | None, **fields: str | None) -> None:
    """Run ``lianlian notify send``."""
    key = SigningKey.load(gateway_key, name="--gateway-key")
    message = {name: text for name, text in fields.items() if text is not None}
    message |= {"oid_partner": load_merchant(config).oid_partner, "ret_code": "0000", "sign_type": "RSA"}
    body = wire.encode({**message, "sign": key.sign(signature_source(message))})
    _show(output, anyio.run(_post, url, body))


def _show(output: Output, response: HttpResponse | None) -> None:
    acknowledged = is_acknowledged(response)
    word = "acknowledged" if acknowledged else "not acknowledged"
    status, text = (None, "") if response is None else (response.status, response.body.decode(errors="replace"))
    output.show(
        {"outcome": word, "status": status, "answer": text},
        f"{word}: " + ("no response" if response is None else f"HTTP {status} {text}"),
    )
    click.get_current_context().exit(0 if acknowledged else 1)


async def _post(url: str, body: bytes) -> HttpResponse | None:
    transport = await HttpSender.open(None, None, 1, CONTENT_TYPE)
    try:
        return await post(transport, url, body)
    finally:
        await transport.aclose()


def verify(output: Output, /, file: BinaryIO, config: Path | None) -> None:
    """Run ``lianlian notify verify``."""
    merchant = load_merchant(config)
    keys = merchant.load_keys()
    notification = Protocol(merchant, keys.private, keys.gateway).read_notification(file.read())
    show_refund(output, anyio.run(complete, notification, None, None, 0.0))
