"""``lianlian notify``: send a notification to a service to test it, and read a notification."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import anyio
import click

from lianlian_async import text_rules, wire
from lianlian_async.exchange import HttpResponse
from lianlian_async.models import RefundStatus
from lianlian_async.notifications.completion import complete
from lianlian_async.protocol import Protocol
from lianlian_async.sandbox.notifier import CONTENT_TYPE, is_acknowledged, post
from lianlian_async.signing import SigningKey, signature_source
from lianlian_async.transport import HttpSender

from .options import config_option, file_argument, load_merchant, parsed
from .output import Output, json_option, pass_output
from .refunds import show_refund


@click.group()
def notify() -> None:
    """Send a notification to a service, or read one."""


@notify.command()
@click.argument("url", callback=parsed(text_rules.url))
@click.option(
    "--gateway-key",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Private key that signs instead of LianLian's: gateway.pem of `lianlian sandbox --keys`.",
)
@click.option("--no-refund", required=True, help="The merchant's refund number.")
@click.option("--money-refund", required=True, help="Yuan, such as 200.01.")
@click.option("--dt-refund", help="Time of the refund order: yyyyMMddHHmmss, China Standard Time.")
@click.option("--oid-refundno", default="1000000000000001", help="LianLian's refund number.")
@click.option(
    "--sta-refund",
    type=click.Choice([status.value for status in RefundStatus]),
    default=RefundStatus.SUCCESS.value,
    help="0 initialized, 1 processing, 2 success, 3 failed.",
)
@config_option
@json_option
@pass_output
def send(output: Output, /, *, url: str, gateway_key: Path, config: Path | None, **fields: str | None) -> None:
    """POST one signed notification to URL.

    The output shows whether the service acknowledged it. The service must be configured for the same merchant as this
    command, and trust the public key of --gateway-key.
    """
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


@notify.command()
@file_argument(required=True)
@config_option
@json_option
@pass_output
def verify(output: Output, file: BinaryIO, config: Path | None) -> None:
    """Verify a notification, and show its refund.

    FILE is the body as received (- is stdin). It is verified exactly as in a service's endpoint.
    """
    merchant = load_merchant(config)
    keys = merchant.load_keys()
    notification = Protocol(merchant, keys.private, keys.gateway).read_notification(file.read())
    show_refund(output, anyio.run(complete, notification, None, None, 0.0))
