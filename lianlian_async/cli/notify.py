"""``lianlian notify``: send a test notification to a service, and read a notification."""

from pathlib import Path
from typing import BinaryIO

import anyio
import click

from lianlian_async import text_rules, wire
from lianlian_async.exchange import HttpResponse, NoResponse
from lianlian_async.models import RefundStatus
from lianlian_async.notifications.completion import complete
from lianlian_async.protocol import Protocol
from lianlian_async.sandbox.notifier import is_acknowledged, post_once
from lianlian_async.signing import SigningKey, signature_source

from .options import config_option, file_argument, load_merchant, parsed, with_output
from .output import Output
from .refunds import QUERY_HELP, REFUND_HELP, show_refund


@click.group
def notify() -> None:
    """Send a notification to a service, or read one."""


@notify.command
@click.argument("url", callback=parsed(text_rules.url))
@click.option(
    "--gateway-key",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Private key that signs the notification, such as gateway.pem of `lianlian sandbox --keys`.",
)
@click.option("--no-refund", required=True, help=REFUND_HELP["no_refund"])
@click.option("--money-refund", required=True, help=REFUND_HELP["money_refund"])
@click.option("--dt-refund", help=REFUND_HELP["dt_refund"])
@click.option("--oid-refundno", default="1000000000000001", help=QUERY_HELP["oid_refundno"])
@click.option(
    "--sta-refund",
    type=click.Choice([status.value for status in RefundStatus]),
    default="2",
    help="0 initialized, 1 processing, 2 success, 3 failed.",
)
@config_option
@with_output
def send(output: Output, /, *, url: str, gateway_key: Path, config: Path | None, **fields: str | None) -> None:
    """POST one signed notification to URL.

    The output shows whether the service acknowledged it. The service must be configured for the same merchant as this
    command, and trust the public key of --gateway-key.
    """
    key = SigningKey.load(gateway_key, name="--gateway-key")
    message = {name: text for name, text in fields.items() if text is not None}
    message |= {"oid_partner": load_merchant(config).oid_partner, "ret_code": "0000", "sign_type": "RSA"}
    body = wire.encode({**message, "sign": key.sign(signature_source(message))})
    _show(output, anyio.run(post_once, url, body))


def _show(output: Output, response: HttpResponse | NoResponse) -> None:
    word = "acknowledged" if is_acknowledged(response) else "not acknowledged"
    if isinstance(response, NoResponse):
        output.show({"outcome": word, "status": None, "answer": ""}, f"{word}: no response: {response.reason}")
    else:
        answer = response.body.decode(errors="replace")
        document = {"outcome": word, "status": response.status, "answer": answer}
        output.show(document, f"{word}: HTTP {response.status} {answer}")
    click.get_current_context().exit(0 if word == "acknowledged" else 1)


@notify.command
@file_argument(required=True)
@config_option
@with_output
def verify(output: Output, /, file: BinaryIO, config: Path | None) -> None:
    """Verify a notification, and show its refund.

    FILE is the body as received (- is stdin). It is verified exactly as a service verifies it.
    """
    merchant = load_merchant(config)
    notification = Protocol(merchant, merchant.load_keys()).read_notification(file.read())
    show_refund(output, anyio.run(complete, notification, None, None, 0.0))
