"""The command groups ``journal`` and ``notify``: their help texts, options and arguments."""

from pathlib import Path

import click

from lianlian_async import text_rules
from lianlian_async.settings import LONGEST

from .commands import QUERY_HELP, REFUND_HELP
from .options import Number, config_option, file_argument, journal_options, parsed, runs, session_options


@click.group
def journal() -> None:
    """Show, back up or restore a journal; resolve refunds.

    A journal records refunds and their outcomes. It is an SQLite file, which `lianlian batch` creates, or a PostgreSQL
    database (a postgresql:// URL; put a URL with a password into LIANLIAN_DSN).
    """


@journal.command
@journal_options
@click.option(
    "--watch",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=2.0,
    type=Number(0.1, LONGEST),
    help="Redraw every SECONDS (2 if omitted) until Ctrl-C; if stdout is not a terminal, print one line each time.",
)
@runs(".journal")
def show() -> None:
    """Count the refunds in a journal, and list the unknown ones.

    Other processes may use the journal meanwhile. A journal in PostgreSQL is shown with its queue and workers. The
    time left assumes the current rate and no further refunds; refunds that are due later do not count.
    """


@journal.command
@journal_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File with one line for each refund: CSV if its name ends in .csv, else JSON Lines.",
)
@runs(".journal")
def export() -> None:
    """Write all refunds of a journal to a file, oldest first.

    Other processes may use the journal meanwhile.
    """


@journal.command
@journal_options
@session_options
@runs(".journal")
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
@journal_options
@runs(".journal")
def decide() -> None:
    """Record by hand whether a refund was made, for example when LianLian no longer answers.

    The decision is final: a refund that was decided as not-made is never sent again. The command refuses a decision
    if LianLian has signed a final outcome, or while a call may be sending the refund.
    """


@journal.command
@click.argument("file", type=click.Path(path_type=Path))
@journal_options
@runs(".journal")
def backup() -> None:
    """Copy a journal file to FILE, which must not exist.

    Other processes may use the journal meanwhile. FILE appears when the copy is complete. It can be read, but only
    `lianlian journal restore` makes it a journal again. The inbox of notifications is not copied, so after a restore
    on_refund may be called again for the same refund.
    """


@journal.command
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@journal_options
@runs(".journal")
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
    type=click.Choice(["0", "1", "2", "3"]),
    default="2",
    help="0 initialized, 1 processing, 2 success, 3 failed.",
)
@config_option
@runs(".notify")
def send() -> None:
    """POST one signed notification to URL.

    The output shows whether the service acknowledged it. The service must be configured for the same merchant as this
    command, and trust the public key of --gateway-key.
    """


@notify.command
@file_argument(required=True)
@config_option
@runs(".notify")
def verify() -> None:
    """Verify a notification, and show its refund.

    FILE is the body as received (- is stdin). It is verified exactly as a service verifies it.
    """
