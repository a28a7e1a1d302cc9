"""The commands ``lianlian sandbox`` and ``lianlian demo``: their help texts and options."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import click

from lianlian_async import wire
from lianlian_async.cli.batch.options import READING_OPTIONS
from lianlian_async.cli.options import Number, add_options, any_file, parsed, runs

FAULTS: Final = (
    *("delay", "no-answer", "late", "reset", "http-500", "bad-gateway", "too-many", "redirect", "busy", "broken-json"),
    *("wrong-signature", "no-signature", "altered-field", "other-refund", "oversized", "compressed"),
)
"""The values of ``sandbox.Fault`` with hyphens."""


def _read_faults(_ctx: click.Context, _option: click.Parameter, values: Iterable[str]) -> dict[str, float]:
    faults = {}
    for value in values:
        name, _, probability = value.partition("=")
        if name not in FAULTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(FAULTS)}")
        try:
            faults[name] = float(probability)
        except ValueError:
            raise click.BadParameter(f"{value!r} must be NAME=PROBABILITY, such as reset=0.1") from None
    return faults


@click.command
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--env-file",
    type=any_file,
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
    type=click.Choice(["reject", "replay", "again"]),
    default="reject",
    help="Second apply request with the same no_refund: reject it, replay the first answer, or refund again.",
)
@click.option(
    "--fault",
    "faults",
    metavar="NAME=P",
    multiple=True,
    callback=_read_faults,
    help=f"Probability of a fault for each request; NAME is one of {', '.join(FAULTS)}.",
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
    help="Amount of each order without --orders.",
)
@click.option(
    "--orders",
    "order_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="File for `lianlian batch`: only its orders exist, each with the sum of its refunds as its amount.",
)
@add_options(*READING_OPTIONS)
@click.option(
    "--notify",
    metavar="[URL]",
    is_flag=False,
    flag_value="http://127.0.0.1:8000/lianlian/refund",
    help="Send notifications of final refunds as LianLian does. URL is written to the environment file as "
    "LIANLIAN_NOTIFY_URL (default: /lianlian/refund on port 8000 of this machine).",
)
@click.option(
    "--statement",
    "statement_file",
    type=click.Path(path_type=Path),
    help="At the end, write LianLian's statement of the successful refunds to this file, or to a file JYMX_… in this "
    "folder.",
)
@runs(".sandbox.command")
def sandbox() -> None:
    """Serve a fake of LianLian's gateway until SIGINT or SIGTERM.

    No real money is involved. The environment file configures a merchant of this gateway for the other `lianlian`
    commands and for every program that uses Merchant.from_env().
    """


@click.command
@click.option("--refunds", type=click.IntRange(1, 100_000), default=300, help="Number of refunds.")
@click.option("--seed", type=int, default=0, help="Seed of the random faults.")
@click.option("--faults", type=Number(0, 1), default=0.3, help="Probability of a fault for each request.")
@click.option("--concurrency", type=click.IntRange(1, 1000), default=50, help="Number of connections.")
@click.option("--bits", type=click.Choice(["1024", "2048", "4096"]), default="2048", help="Size of all keys.")
@runs(".sandbox.demo")
def demo() -> None:
    """Make refunds at a faulty gateway, and check its ledger.

    The gateway is a fake: it loses, delays and forges responses, and makes a refund twice if the client sends
    the refund twice. Exit code 0 if the ledger confirms every outcome, 1 if not.
    """
