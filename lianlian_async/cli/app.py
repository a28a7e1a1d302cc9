"""The command group ``lianlian``: what it consists of, and the one place where an error becomes an exit code."""

from __future__ import annotations

from typing import Any

import click

from lianlian_async import __version__
from lianlian_async.errors import ConfigurationError, LianLianError
from lianlian_async.signing import BACKEND
from lianlian_async.transport import http_backend

from .batch.command import batch
from .exit_codes import INTERRUPTED, exit_outcome_of
from .journal import journal
from .keys import keygen
from .notify import notify
from .output import Output
from .reconcile import reconcile
from .refunds import apply, query
from .sandbox.command import sandbox
from .sandbox.demo import demo
from .verify import verify
from .worker import worker

__all__ = ["lianlian"]


class _Program(click.Group):
    """A group whose commands may raise what the library raises, and be interrupted."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; users see what went wrong and what to do, never a traceback."""
        output = ctx.ensure_object(Output)
        try:
            return super().invoke(ctx)
        except LianLianError as error:
            output.failure(error)
            ctx.exit(exit_outcome_of(error).exit_code)
        except KeyboardInterrupt:
            output.note(INTERRUPTED.word)
            ctx.exit(INTERRUPTED.exit_code)


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    try:
        sender = http_backend()
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    click.echo(f"lianlian-async {__version__} (signs with {BACKEND}, sends with {sender})")
    ctx.exit()


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Exit codes: 0 made or fine; 1 another error; 2 wrong usage, request or configuration, nothing was sent; "
    "3 rejected or failed; 4 outcome unknown, ask again; 5 signature invalid; 130 interrupted.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and what signs and sends, and exit.",
)
def lianlian() -> None:
    """LianLian Pay refunds: was this refund made? Never twice, never lost, never guessed.

    Keys never stand on the command line: the merchant comes from the environment (LIANLIAN_OID_PARTNER,
    LIANLIAN_PRIVATE_KEY, LIANLIAN_GATEWAY_PUBLIC_KEYS ...) or from --config.
    """


for command in (apply, query, batch, journal, reconcile, worker, verify, keygen, sandbox, notify, demo):
    lianlian.add_command(command)
