"""``lianlian sandbox``: serve the fake gateway on a socket until a signal stops it."""

import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import click

from lianlian_async import wire
from lianlian_async.cli.batch.checked import checked_file
from lianlian_async.cli.keys import refuse_existing, write_new
from lianlian_async.cli.output import Output, file_errors
from lianlian_async.cli.signals import sigterm_interrupts
from lianlian_async.sandbox import Fault, Notifier, Repeated, SandboxGateway
from lianlian_async.signing import SigningKey

from .server import environment, serving

_SLEEP: Final = 0.5
"""Seconds. A signal right before a sleep ends the command only after the sleep, so sleeps are short."""


def sandbox(
    output: Output, /, *, env_file: Path, notify: str | None, statement_file: Path | None, **options: Any
) -> None:
    refuse_existing(env_file)
    gateway = SandboxGateway(
        **{name: options[name] for name in ("oid_partner", "seed", "settle_after")},
        **(_kept_keys(options["keys"]) if options["keys"] else {}),
        repeated=Repeated(options["repeated"]),
        faults={Fault(name.replace("-", " ")): probability for name, probability in options["faults"].items()},
        default_order=None if options["order_file"] else options["default_order"],
    )
    if options["order_file"]:
        _add_orders(gateway, options, output)
    app: SandboxGateway | Notifier = gateway
    if notify is not None:
        app = Notifier(gateway, on_delivery=lambda delivery: output.note(str(delivery)))
    with (
        suppress(KeyboardInterrupt),
        sigterm_interrupts(),
        serving(app, options["host"], options["port"]) as url,
        ExitStack() as at_end,
    ):
        variables = environment(gateway, url) | ({"LIANLIAN_NOTIFY_URL": notify} if notify else {})
        write_new(env_file, "".join(f"{name}={shlex.quote(text)}\n" for name, text in variables.items()))
        at_end.callback(env_file.unlink, missing_ok=True)
        path = str(env_file.absolute())
        use = f"use it:  set -a; . {shlex.quote(path)}; set +a"
        output.show({"url": url, "env_file": path}, f"sandbox gateway at {url}", use)
        while True:
            time.sleep(_SLEEP)
    if statement_file is not None:
        name = f"JYMX_{gateway.oid_partner}_{wire.format_timestamp(gateway.time_of_day())[:8]}.txt"
        gateway.advance(86_400.0)  # carries out late requests, and makes refunds final
        with file_errors(statement_file):
            file = statement_file / name if statement_file.is_dir() else statement_file
            file.write_text(gateway.statement(), "utf-8")


def _add_orders(gateway: SandboxGateway, options: Mapping[str, Any], output: Output) -> None:
    """Add the orders of a batch's file, each with the sum of its refunds as its amount."""
    orders = dict[tuple[str, str], dict[str, Any]]()
    with checked_file(options["order_file"], None, options, output.note) as checked:
        for _, request, _ in checked.lines_after(0):
            fields = {"no_order": request.no_order, "oid_paybill": request.oid_paybill}
            numbers = [(name, number) for name, number in fields.items() if number is not None]
            new: dict[str, Any] = {"no_order": None, "money_order": 0}
            order = next((orders[number] for number in numbers if number in orders), new)
            order |= {**dict(numbers), "money_order": order["money_order"] + request.money_refund}
            orders |= dict.fromkeys(numbers, order)
    for order in {id(order): order for order in orders.values()}.values():
        try:
            gateway.add_order(**order)
        except ValueError as error:
            raise click.BadParameter(f"{order}: {error}", param_hint="--orders") from None


def _kept_keys(folder: Path) -> dict[str, Any]:
    """Load both keys from ``folder``, and generate missing ones."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = {}
    for name in ("merchant", "gateway"):
        path = folder / f"{name}.pem"
        if not path.exists():
            write_new(path, SigningKey.generate().to_pem())
        keys[f"{name}_key"] = SigningKey.load(path, name=str(path))
    return keys
