"""The commands, except ``batch``, ``sandbox``, ``demo`` and ``help``: their help texts, options and arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from lianlian_async import text_rules

from . import options

PASSWORD: Final = "LIANLIAN_PRIVATE_KEY_PASSWORD"  # noqa: S105 - the name of a variable

REFUND_HELP: Final = {
    "no_refund": "The merchant's refund number.",
    "dt_refund": "Time of the refund: yyyyMMddHHmmss, China Standard Time.",
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


def _refund_options(help_texts: dict[str, str]) -> Callable[[options.Command], options.Command]:
    """Add the argument FILE, one option for each field, and the common options of a command about one refund."""
    file = click.argument("file", type=click.File("rb"), required=False)
    fields = [click.option(f"--{name.replace('_', '-')}", help=text) for name, text in help_texts.items()]
    return options.add_options(file, *fields, options.deadline_option, options.config_option)


@click.command
@options.runs(".refunds", _refund_options(REFUND_HELP))
def apply() -> None:
    """Make one refund.

    FILE is the request as JSON with LianLian's field names (- is stdin); options override its fields. The fields sign
    and sign_type are ignored, and oid_partner must be the configured merchant's. This command has no journal: if the
    outcome is unknown, wait 15 minutes, then query it before you repeat the command.
    """


@click.command
@options.runs(".refunds", _refund_options(QUERY_HELP))
def query() -> None:
    """Query LianLian's record of one refund.

    FILE is a query, or the request of `lianlian apply`, as JSON (- is stdin); options override its fields. Without
    FILE: `lianlian query --no-refund R-1 --dt-refund 20261122102000`.
    """


@click.command
@options.runs(".journal", click.argument("no_refund"), options.journal_options)
def explain() -> None:
    """Show everything that a journal knows about one refund.

    Shows the first 3 and the latest 6 events (the journal keeps no others), the outcome, and what to do next. The exit
    code depends on the outcome, as it does for `lianlian apply`.
    """


@click.command
@click.argument("statements", nargs=-1, required=True, type=options.existing_file)
@click.option(
    "--apply",
    "is_applied",
    is_flag=True,
    help="Query refunds that are in a statement but unresolved in the journal, and record their state.",
)
@options.runs(".reconcile", options.journal_options)
def reconcile() -> None:
    """Compare LianLian's statements with a journal.

    A statement is a file JYMX_<oid_partner>_<date>.txt. If its summary JYMXSUM_<oid_partner>_<date>.txt is in the same
    folder, the totals must agree. If --apply queries a refund for which LianLian no longer answers (after 3 months),
    the statement is recorded as evidence that the refund was made. Exit code 3 if there are differences or unreadable
    rows. Refunds whose statement was not given are counted, but are no differences.
    """


@click.command
@click.argument("dsn", metavar="[DSN]", default="", type=options.Place(only_dsn=True))
@click.option("--until-empty", is_flag=True, help="End when no refund is due now; refunds due later stay in the queue.")
@click.option(
    "--health-file",
    metavar="PATH",
    type=options.any_file,
    help="File for a health check. A progress report updates the file's time if the database answers, and if a refund "
    "has ended since the last report or none is in flight. If the file is older than --deadline plus 30 s, worker or "
    "database hangs.",
)
@click.option(
    "--interval", metavar="SECONDS", type=options.Number(0.1, 20), default=10.0, help="Time between progress reports."
)
@options.runs(".worker", options.session_options, options.config_option)
def worker() -> None:
    """Make the refunds of a queue.

    `lianlian batch --queue` fills the queue. Any number of workers on any number of machines can share it. After Ctrl-C
    or SIGTERM, the worker finishes the refunds in flight and ends. After a second Ctrl-C it ends at once, and another
    worker resolves these refunds. DSN is a postgresql:// URL; put a URL with a password into LIANLIAN_JOURNAL.
    """


@click.command
@click.option(
    "--refund", "no_refund", metavar="NO_REFUND", help="Refund of the journal to query; by default one that was made."
)
@click.option("--offline", is_flag=True, help="Do not connect to the gateway.")
@options.runs(".doctor", options.journal_options)
def doctor() -> None:
    """Check keys, connection, clock and journal.

    Sends no refund. Queries a refund of the journal: the signature of the answer shows whether LianLian's public key
    is configured correctly. Exit codes: 0 no failure; 1 a failure.
    """


@click.command
@options.runs(".verify", options.file_argument, options.config_option)
def verify() -> None:
    """Check the signature of a message.

    FILE is a response, a notification or a request as JSON (- is stdin). In the output of `lianlian query --json`, the
    response is the value of "refund". A response or notification must be signed with one of LianLian's keys; for a
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
@options.runs(".keys")
def keygen() -> None:
    """Generate a key pair for LianLian's dashboard.

    The public key is printed in the form that the dashboard accepts. The private key is written with mode 0600, and
    the public key beside it. Existing files are never replaced.
    """


@click.group
def journal() -> None:
    """Show, back up or restore a journal; resolve refunds.

    A journal records refunds and their outcomes. It is an SQLite file, which `lianlian batch` creates, or a PostgreSQL
    database (a postgresql:// URL; put a URL with a password into LIANLIAN_JOURNAL).
    """


@journal.command
@click.option("--watch", is_flag=True, help="Show the journal again every second until Ctrl-C.")
@options.runs(".journal", options.journal_argument, options.journal_options)
def show() -> None:
    """Count the refunds in a journal, and list the 20 oldest unknown ones.

    Other processes may use the journal meanwhile. A journal in PostgreSQL is shown with its queue and workers. The
    time left assumes the current rate and no further refunds; refunds that are due later do not count.
    """


@journal.command
@click.option(
    "--out",
    type=options.any_file,
    callback=options.no_workbook,
    required=True,
    help="File with one line for each refund: CSV if its name ends in .csv, else JSON Lines.",
)
@options.runs(".journal", options.journal_argument, options.journal_options)
def export() -> None:
    """Write all refunds of a journal to a file, oldest first.

    Other processes may use the journal meanwhile.
    """


@journal.command
@options.runs(".journal", options.journal_argument, options.journal_options, options.session_options)
def resume() -> None:
    """Resolve the unknown refunds, then show the journal.

    Each unknown refund is queried, and sent again if LianLian has no record of it after --not-found-grace. A refund
    that was made but is not final is queried, too. A refund that was certainly not made is not sent. Exit code 4 if
    some are still unknown.
    """


@journal.command
@click.argument("no_refund")
@click.argument("outcome", type=click.Choice(["made", "not-made"]))
@click.option("--evidence", required=True, help="Reason, in one line: a bank statement, LianLian's answer by mail …")
@options.runs(".journal", options.journal_options)
def decide() -> None:
    """Record by hand whether a refund was made, for example when LianLian no longer answers.

    The decision is final: a refund that was decided as not-made is never sent again. The command refuses a decision
    if the outcome is final or decided already, if LianLian signed a rejection, or while a call may send the refund.
    """


@journal.command
@click.argument("file", type=click.Path(path_type=Path))
@options.runs(".journal", options.journal_options)
def backup() -> None:
    """Copy a journal file to FILE, which must not exist.

    Other processes may use the journal meanwhile. FILE appears when the copy is complete. It can be read, but only
    `lianlian journal restore` makes it a journal again. FILE lacks the inbox of notifications, and which
    calls of on_refund return after the copy. So after a restore, on_refund may be called again for a refund.
    """


@journal.command
@click.argument("file", type=options.existing_file)
@options.runs(".journal", options.journal_options)
def restore() -> None:
    """Create a journal from FILE, a backup.

    The journal is marked as restored: from now on, each refund that it does not have is queried before it is sent. All
    such refunds, and unresolved ones, count as sent now, because they may have been sent after the backup: for 15
    minutes, "no such record" proves nothing.
    """


@click.group
def notify() -> None:
    """Send a notification to a service, or read one."""


@notify.command
@click.argument("url", callback=options.parsed(text_rules.url))
@click.option(
    "--gateway-key",
    required=True,
    type=options.existing_file,
    help="Private key that signs the notification, such as gateway.pem of `lianlian sandbox --keys`.",
)
@click.option("--no-refund", required=True, help=REFUND_HELP["no_refund"])
@click.option("--money-refund", required=True, help=REFUND_HELP["money_refund"])
@click.option("--dt-refund", help=REFUND_HELP["dt_refund"])
@click.option("--oid-refundno", default="1000000000000001", help=QUERY_HELP["oid_refundno"])
@click.option(
    "--sta-refund",
    type=click.Choice(["0", "1", "2", "3"]),
    default="2",
    help="0 initialized, 1 processing, 2 success, 3 failed.",
)
@options.runs(".refunds", options.config_option)
def send() -> None:
    """POST one signed notification to URL.

    The output shows whether the service acknowledged it. The service must be configured for the same merchant as this
    command, and trust the public key of --gateway-key.
    """


@notify.command("verify")
@options.runs(".refunds", options.file_argument, options.config_option)
def verify_notification() -> None:
    """Verify a notification, and show its refund.

    FILE is the body as received (- is stdin). It must have no_refund, money_refund and sta_refund:
    this command does not query them.
    """
