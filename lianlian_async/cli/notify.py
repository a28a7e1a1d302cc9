"""``lianlian notify``: send a test notification to a service, and read a notification."""

from pathlib import Path
from typing import BinaryIO

import anyio

from lianlian_async import wire
from lianlian_async.exchange import NoResponse
from lianlian_async.models import check_storable
from lianlian_async.notifications.completion import complete
from lianlian_async.protocol import Protocol
from lianlian_async.sandbox.notifier import is_acknowledged, post_once
from lianlian_async.signing import SigningKey, signature_source

from .options import load_merchant
from .output import Output
from .refunds import show_refund


def send(output: Output, /, *, url: str, gateway_key: Path, config: Path | None, **fields: str | None) -> int:
    """Run ``lianlian notify send``."""
    key = SigningKey.load(gateway_key, name="--gateway-key")
    message = {name: text for name, text in fields.items() if text is not None}
    message |= {"oid_partner": load_merchant(config).oid_partner, "ret_code": "0000", "sign_type": "RSA"}
    for name, text in message.items():
        check_storable(text, name)
    body = wire.encode({**message, "sign": key.sign(signature_source(message))})
    response = anyio.run(post_once, url, body)
    word = "acknowledged" if is_acknowledged(response) else "not acknowledged"
    if isinstance(response, NoResponse):
        output.show({"outcome": word, "status": None, "answer": ""}, f"{word}: no response: {response.reason}")
    else:
        answer = response.body.decode(errors="replace")
        document = {"outcome": word, "status": response.status, "answer": answer}
        output.show(document, f"{word}: HTTP {response.status} {answer}")
    return 0 if word == "acknowledged" else 1


def verify_notification(output: Output, /, file: BinaryIO, config: Path | None) -> int:
    """Run ``lianlian notify verify``."""
    merchant = load_merchant(config)
    notification = Protocol(merchant, merchant.load_keys()).read_notification(file.read())
    return show_refund(output, anyio.run(complete, notification, None, None, 0.0))
