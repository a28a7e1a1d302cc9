"""``lianlian sandbox``: serve the fake gateway on a socket until a signal stops it."""

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import click

from lianlian_async import wire
from lianlian_async.cli.batch.checked import checked_file
from lianlian_async.cli.batch.options import READING_OPTIONS
from lianlian_async.cli.keys import refuse_existing, write_new
from lianlian_async.cli.options import Number, add_options, parsed, with_output
from lianlian_async.cli.output import Output, file_errors
from lianlian_async.cli.signals import sigterm_interrupts
from lianlian_async.sandbox import Fault, Notifier, Repeated, SandboxGateway
from lianlian_async.sandbox.statement import statement
from lianlian_async.signing import SigningKey

from .server import environment, serving

_SLEEP: Final = 0.5
"""Seconds. A signal right before a sleep ends the command only after the sleep, so sleeps are short."""


_FAULTS: Final = {fault.value.replace(" ", "-"): fault for fault in Fault}


def _read_faults(_ctx: click.Context, _option: click.Parameter, values: Iterable[str]) -> dict[Fault, float]:
    faults = {}
    for value in values:
        name, _, probability = value.partition("=")
        if name not in _FAULTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(_FAULTS)}")
        try:
            faults[_FAULTS[name]] = float(probability)
        except ValueError:
            raise click.BadParameter(f"{value!r} must be NAME=PROBABILITY, such as reset=0.1") from None
    return faults


@click.command
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--env-file",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("lianlian-sandbox.env"),
    help="File for the LIANLIAN_ variables. It must not exist, and it is removed at the end.",
)
@click.option(
    "--keys",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the keys, which are generated in the first run and used again in later runs.",
)
@click.option("--oid-partner", default="201103171000000000", help="The merchant's number.")
@click.option(
    "--repeated",
    type=click.Choice([repeated.value for repeated in Repeated]),
    default="reject",
    help="Second apply request with the same no_refund: reject it, replay the first answer, or refund again.",
)
@click.option(
    "--fault",
    "faults",
    metavar="NAME=P",
    multiple=True,
    callback=_read_faults,
    help=f"Probability of a fault for each request; NAME is one of {', '.join(_FAULTS)}.",
)
@click.option("--seed", type=int, default=0, help="Seed of the random faults.")
@click.option(
    "--settle-after", metavar="SECONDS", type=Number(min=0), default=2.0, help="Time until a refund is final."
)
@click.option(
    "--default-order",
    metavar="YUAN",
    default="10000.00",
    callback=parsed(wire.parse_money),
    help="Amount of each order.",
)
@click.option(
    "--orders",
    "order_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="File for `lianlian batch`: only its orders exist, each with the sum of its refunds as its amount.",
)
@add_options(READING_OPTIONS)
@click.option(
    "--notify",
    metavar="[URL]",
    is_flag=False,
    flag_value="http://127.0.0.1:8000/lianlian/refund",
    help="Send notifications of final refunds as LianLian does. URL is LIANLIAN_NOTIFY_URL in the environment file "
    "(default: /lianlian/refund on port 8000 of this machine).",
)
@click.option(
    "--statement",
    "statement_file",
    type=click.Path(path_type=Path),
    help="At the end, write LianLian's statement of the successful refunds to this file, or to a file JYMX_… in this "
    "folder.",
)
@with_output
def sandbox(
    output: Output,
    /,
    *,
    host: str,
    port: int,
    env_file: Path,
    keys: Path | None,
    repeated: str,
    notify: str | None,
    statement_file: Path | None,
    order_file: str | None,
    **options: Any,
) -> None:
    """Serve a fake of LianLian's gateway until SIGINT or SIGTERM.

    No real money is involved. The environment file configures a merchant of this gateway for the other `lianlian`
    commands and for every program that uses Merchant.from_env().
    """
    refuse_existing(env_file)
    settings = {name: options[name] for name in ("oid_partner", "seed", "settle_after", "faults")}
    default = None if order_file else options["default_order"]
    gateway = SandboxGateway(repeated=Repeated(repeated), default_order=default, **_kept_keys(keys), **settings)
    if order_file:
        _add_orders(gateway, order_file, options, output)
    app: SandboxGateway | Notifier = gateway
    if notify is not None:
        app = Notifier(gateway, on_delivery=lambda delivery: output.note(str(delivery)))
    with (
        _statement_at_the_end(gateway, statement_file),
        suppress(KeyboardInterrupt),
        sigterm_interrupts(),
        serving(app, host, port) as url,
        _written(env_file, environment(gateway, url, **{"notify_url": notify} if notify else {})),
    ):
        path = env_file.absolute()
        output.show(
            {"url": url, "env_file": str(path)},
            f"sandbox gateway at {url}",
            f"use it:  set -a; . {shlex.quote(str(path))}; set +a",
        )
        while True:
            time.sleep(_SLEEP)


def _add_orders(gateway: SandboxGateway, file: str, options: Mapping[str, Any], output: Output) -> None:
    """Add the orders of a batch's file, each with the sum of its refunds as its amount."""
    orders = dict[tuple[str, str], dict[str, Any]]()
    with checked_file(file, None, options, output.note, has_partner=True) as (checked, _):
        for _, request, _ in checked.lines_after(0):
            known = request.to_dict()
            numbers = [(name, known[name]) for name in ("no_order", "oid_paybill") if name in known]
            new: dict[str, Any] = {"no_order": None, "money_order": 0}
            order = next((orders[number] for number in numbers if number in orders), new)
            order |= {name: known[name] for name in ("no_order", "oid_paybill", "dt_order") if name in known}
            order["money_order"] += request.money_refund
            orders |= dict.fromkeys(numbers, order)
    for order in {id(order): order for order in orders.values()}.values():
        try:
            gateway.add_order(**order)
        except ValueError as error:
            raise click.BadParameter(f"{order}: {error}", param_hint="--orders") from None


def _kept_keys(folder: Path | None) -> dict[str, Any]:
    """Load both keys from ``folder`` and generate missing ones; without a folder, the gateway generates its keys."""
    if folder is None:
        return {}
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = {}
    for name in ("merchant", "gateway"):
        path = folder / f"{name}.pem"
        if not path.exists():
            write_new(path, SigningKey.generate().to_pem())
        keys[f"{name}_key"] = SigningKey.load(path, name=str(path))
    return keys


@contextmanager
def _statement_at_the_end(gateway: SandboxGateway, file: Path | None) -> Iterator[None]:
    yield
    if file is not None:
        name = f"JYMX_{gateway.oid_partner}_{wire.format_timestamp(gateway.time_of_day())[:8]}.txt"
        gateway.advance(86_400.0)  # carries out late requests, and makes refunds final
        with file_errors(file):
            (file / name if file.is_dir() else file).write_text(statement(gateway), "utf-8")


@contextmanager
def _written(env_file: Path, variables: Mapping[str, str]) -> Iterator[None]:
    """Write the environment file, and delete it when the block ends."""
    lines = (f"{name}={shlex.quote(text)}\n" for name, text in variables.items())
    write_new(env_file, "".join(lines))
    try:
        yield
    finally:
        env_file.unlink(missing_ok=True)
