"""The commands, except ``journal``, ``notify``, ``batch``, ``sandbox`` and ``demo``: help texts, options, arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from lianlian_async import wire

from .options import (
    Command,
    Number,
    add_options,
    config_option,
    deadline_option,
    dsn_argument,
    file_argument,
    journal_options,
    parsed,
    runs,
    session_options,
)

PASSWORD: Final = "LIANLIAN_PRIVATE_KEY_PASSWORD"  # noqa: S105 - the name of a variable

REFUND_HELP: Final = {
    "no_refund": "The merchant's refund number.",
    "dt_refund": "Time of the refund order: yyyyMMddHHmmss, China Standard Time.",
    "money_refund": "Amount in yuan, such as 200.01.",
    "no_order": "The merchant's order number.",
    "dt_order": "Time of the order: yyyyMMddHHmmss, China Standard Time.",
    "oid_paybill": "LianLian's payment number.",
    "notify_url": "URL to which LianLian posts the result.",
    "trader_refund": "Number of the merchant that the refund is made for, if it is not the configured one.",
}
QUERY_HELP: Final = {"oid_refundno": "LianLian's refund number."} | {
    name: REFUND_HELP[name] for name in ("no_refund", "dt_refund", "trader_refund")
}


def _refund_options(help_texts: dict[str, str]) -> Callable[[Command], Command]:
    """Add the argument FILE, one option for each field, and the common options of a command about one refund."""
    fields = [click.option(f"--{name.replace('_', '-')}", help=text) for name, text in help_texts.items()]
    return add_options((file_argument(required=False), *fields, deadline_option, config_option))


@click.command
@_refund_options(REFUND_HELP)
@runs(".refunds")
def apply() -> None:
    """Make one refund.

    FILE is the request as JSON with LianLian's field names (- is stdin); options override its fields. The fields sign
    and sign_type are ignored, and oid_partner must be the configured merchant's. This command has no journal: if the
    outcome is unknown, run `lianlian query` before you repeat the command.
    """


@click.command
@_refund_options(QUERY_HELP)
@runs(".refunds")
def query() -> None:
    """Query LianLian's record of one refund.

    FILE is a query, or the request of `lianlian apply`, as JSON (- is stdin); options override its fields. Without
    FILE: `lianlian query --no-refund R-1 --dt-refund 20261122102000`.
    """


@click.command
@click.argument("no_refund")
@journal_options
@runs(".explain")
def explain() -> None:
    """Show everything that a journal knows about one refund.

    Shows the result of each attempt and query, the outcome, and what to do next. The exit code depends on the outcome,
    as it does for `lianlian apply`.
    """


@click.command
@click.argument("statements", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--apply",
    "is_applied",
    is_flag=True,
    help="Query refunds that are in a statement but unknown in the journal, and record their state in the journal.",
)
@journal_options
@runs(".reconcile")
def reconcile() -> None:
    """Compare LianLian's statements with a journal.

    A statement is a file JYMX_<oid_partner>_<date>.txt. If its summary JYMXSUM_<oid_partner>_<date>.txt is in the same
    folder, the totals must agree. If --apply queries a refund for which LianLian no longer answers (after 3 months),
    the statement is recorded as evidence that the refund was made. Exit code 3 if there are differences or unreadable
    rows.
    """


@click.command
@dsn_argument
@click.option("--until-empty", is_flag=True, help="End when no refund is due now; refunds due later stay in the queue.")
@click.option(
    "--health-file",
    metavar="PATH",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for a health check, removed at the end. Each progress report updates the file's time, if the database "
    "answers and refunds have ended or none is in flight. If the file is older than --deadline plus 30 seconds, the "
    "worker hangs.",
)
@click.option("--interval", type=Number(0.1, 20), default=10.0, help="Seconds between progress reports.")
@session_options
@config_option
@runs(".worker")
def worker() -> None:
    """Make the refunds of a queue.

    `lianlian batch --queue` fills the queue. Any number of workers on any number of machines can share it. After Ctrl-C
    or SIGTERM, the worker finishes the refunds in flight and ends. After a second Ctrl-C it ends at once, and another
    worker resolves these refunds. DSN is a postgresql:// URL; put a URL with a password into LIANLIAN_DSN.
    """


@click.command
@journal_options
@click.option("--refund", "no_refund", metavar="NO_REFUND", help="Refund to query; by default the newest one made.")
@click.option(
    "--dt-refund",
    metavar="YYYYMMDDHHMMSS",
    callback=parsed(wire.parse_timestamp),
    help="dt_refund of a --refund that is not in the journal.",
)
@click.option("--offline", is_flag=True, help="Do not connect to the gateway.")
@runs(".doctor")
def doctor() -> None:
    """Find what is wrong with keys, connection, clock and journal.

    Sends no refund. Queries a refund that was made: the signature of the answer shows whether LianLian's public key is
    configured correctly. Exit codes: 0 no failure; 1 a failure.
    """


@click.command
@file_argument(required=True)
@config_option
@runs(".verify")
def verify() -> None:
    """Check the signature of a message.

    FILE is a response, a notification or a request as JSON (- is stdin). In the output of `lianlian query --json`, the
    response is the value of refund. A response or notification must be signed with one of LianLian's keys; for a
    request, the merchant's key is valid, too. If the signature is invalid, the command shows the likely cause: another
    key was used, another hash than MD5, or another text.
    """


@click.command
@click.option("--bits", type=click.Choice(["1024", "2048", "4096"]), default="2048", help="Size of the key.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(),
    help="File for the private key, or a folder for merchant.pem.",
)
@click.option(
    "--encrypt", is_flag=True, help=f"Encrypt the private key with the password in {PASSWORD}; if unset, ask for one."
)
@runs(".keys")
def keygen() -> None:
    """Generate a key pair for LianLian's dashboard.

    The public key is printed in the form that the dashboard accepts. The private key is written with mode 0600, and
    the public key beside it. Existing files are never replaced.
    """


@click.command("help")
@click.argument("topic", type=click.Choice(["unknown", "journal", "processes"]), required=False, metavar="[TOPIC]")
@runs(".topics")
def help_topic() -> None:
    """Explain a concept: unknown, journal or processes."""
