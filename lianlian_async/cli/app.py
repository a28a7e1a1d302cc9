"""The command group ``lianlian``. A command's module is imported when the command runs: ``--help`` needs only click."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, NamedTuple

import click

from . import AS_JSON

_SILENT: Final = logging.NullHandler()
"""Keeps warnings of the library from standard error: each command shows outcomes itself. LIANLIAN_LOG shows the log."""


class _Command(NamedTuple):
    module: str
    help: str
    """The first line of the command's own help."""
    name: str = ""
    """The name in the module, if it is not the command's."""


_COMMANDS: Final = {
    "apply": _Command(".refunds", "Make one refund."),
    "query": _Command(".refunds", "Query LianLian's record of one refund."),
    "batch": _Command(".batch.command", "Make the refunds of a file, each one once."),
    "journal": _Command(".journal", "Show, export, resume, decide, back up or restore a journal."),
    "explain": _Command(".explain", "Show everything that a journal knows about one refund."),
    "reconcile": _Command(".reconcile", "Compare LianLian's statements with a journal."),
    "worker": _Command(".worker", "Make the refunds of a queue."),
    "doctor": _Command(".doctor", "Find what is wrong with keys, connection, clock and journal."),
    "verify": _Command(".verify", "Check the signature of a message."),
    "keygen": _Command(".keys", "Generate a key pair for LianLian's dashboard."),
    "notify": _Command(".notify", "Send a notification to a service, or read one."),
    "sandbox": _Command(".sandbox.command", "Serve a fake of LianLian's gateway until SIGINT or SIGTERM."),
    "demo": _Command(".sandbox.demo", "Make refunds at a faulty gateway, and audit its books."),
    "help": _Command(".topics", "Explain a concept: unknown, journal or processes.", "help_topic"),
}


class _Program(click.Group):
    """Imports a command when it is used, and converts errors of the library to exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See ``click.Group``."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See ``click.Group``."""
        if cmd_name not in _COMMANDS:
            return None
        found = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(found.module, __package__), found.name or cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in _COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See ``click.Command``. A usage error is known before ``--json`` has been parsed, so look for it first."""
        ctx.meta[AS_JSON] = "--json" in args
        with _usage_errors(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print the library's errors without a traceback."""
        from lianlian_async.errors import LianLianError

        from .exit_codes import INTERRUPTED, exit_outcome_of
        from .output import Output

        output = ctx.ensure_object(Output)
        try:
            with _usage_errors(ctx):
                return super().invoke(ctx)
        except LianLianError as error:
            output.failure(error)
            ctx.exit(exit_outcome_of(error).exit_code)
        except KeyboardInterrupt:
            output.note(INTERRUPTED.word)
            ctx.exit(INTERRUPTED.exit_code)


@contextmanager
def _usage_errors(ctx: click.Context) -> Iterator[None]:
    """Print a usage error as JSON if the command line contains ``--json``; else click prints it as text."""
    try:
        yield
    except click.UsageError as error:
        if not ctx.meta[AS_JSON]:
            raise
        problem = {"type": type(error).__name__, "message": error.format_message()}
        click.echo(json.dumps({"outcome": "usage error", "error": problem}))
        ctx.exit(error.exit_code)


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from lianlian_async import __version__
    from lianlian_async.errors import ConfigurationError
    from lianlian_async.signing import BACKEND
    from lianlian_async.transport import http_backend

    try:
        sender = http_backend()
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    facts = {"version": __version__, "signs_with": BACKEND, "sends_with": sender}
    text = f"lianlian-async {__version__} (signs with {BACKEND}, sends with {sender})"
    click.echo(json.dumps(facts) if ctx.meta[AS_JSON] else text)
    ctx.exit()


@click.group(
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Exit codes: 0 made, or no error; 1 another error; 2 wrong usage, request or configuration (nothing was "
    "sent); 3 rejected or failed; 4 outcome unknown (query it again); 5 invalid signature; 130 interrupted.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version, the signing backend and the HTTP backend, and exit.",
)
@click.option("--json", is_flag=True, expose_value=False, help="Print one JSON object on stdout.")
def lianlian() -> None:
    """LianLian Pay refunds: was this refund made? Never twice, never lost, never guessed.

    The merchant and its keys come from the environment (LIANLIAN_OID_PARTNER, LIANLIAN_PRIVATE_KEY,
    LIANLIAN_GATEWAY_PUBLIC_KEYS ...) or from --config, never from the command line.
    """
    logging.getLogger("lianlian_async").addHandler(_SILENT)
