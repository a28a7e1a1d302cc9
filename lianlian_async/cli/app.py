"""The command group ``lianlian``.

``help`` is declared here, the other commands in ``commands``, ``batch.options`` and ``sandbox.options``. These import
only click and light modules, so ``--help`` is fast. ``options.runs`` imports a command's module when the command runs.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from lianlian_async.errors import LianLianError

from . import AS_JSON
from .batch.options import batch
from .commands import apply, doctor, explain, journal, keygen, notify, query, reconcile, verify, worker
from .options import json_option
from .sandbox.options import demo, sandbox

_TOPICS: Final = {
    "unknown": """\
A refund is *unknown* (exit code 4) if a request may have arrived and no answer proves its outcome.
Keep no_refund, dt_refund and money_refund. Never repeat the refund with another no_refund.
At `ask_again_at`, run `lianlian query`, or repeat the same `lianlian batch`, which queries the refund first.
`lianlian batch` sends the refund again only if LianLian has no record 15 minutes after the last attempt.""",
    "journal": """\
A journal records each refund before it is sent, and later its outcome. After a crash, run the same batch again.
The journal is a file in your application folder, or --journal PATH. One process at a time can send with it.
Several processes share a journal in PostgreSQL. Put its URL into LIANLIAN_JOURNAL.
`lianlian journal show` lists the oldest unknown refunds; `lianlian journal resume` tries to resolve all of them.
Never delete a journal. If it is lost, wait 15 minutes after the last run: LianLian may show a
refund late. Then use `lianlian batch --accept-new-journal --query-first`.
A journal belongs to one merchant and one apply URL.""",
    "processes": """\
One process: run `lianlian batch FILE`. Only one process at a time can send with a journal file; a second batch waits.
Several processes: `lianlian batch FILE --queue` fills a queue in PostgreSQL; any number of `lianlian worker` share it.
The queue and its journal belong to one merchant: another merchant needs another database.
A lease on each refund keeps other workers from sending it. If a worker dies, another worker resolves its refunds.
After SIGINT or SIGTERM, a worker finishes the refunds in flight and ends. A batch cancels them: run it again.""",
}


class _Program(click.Group):
    """Converts errors to exit codes."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse ``args``. Search for ``--json`` first: a usage error can be raised before click parses it."""
        ctx.meta[AS_JSON] = "--json" in args
        with _errors_shown(ctx):
            if sys.stdin is None and "-" in args:  # click would raise RuntimeError
                raise click.UsageError("FILE - is stdin, but stdin is closed")
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print errors of the library and of the system without a traceback."""
        with _errors_shown(ctx):
            return super().invoke(ctx)


@contextmanager
def _errors_shown(ctx: click.Context) -> Iterator[None]:
    """Print an error and exit with its code. Usage errors without ``--json`` are left to click."""
    try:
        yield
    except click.UsageError as error:
        if not ctx.meta[AS_JSON]:
            raise
        from .output import Output

        problem = {"type": type(error).__name__, "message": error.format_message()}
        Output(as_json=True).show({"outcome": "usage error", "error": problem})
        ctx.exit(error.exit_code)
    except (LianLianError, OSError, KeyboardInterrupt) as error:
        from .output import Output

        output = Output(as_json=ctx.meta[AS_JSON])
        ctx.exit(output.interrupted() if isinstance(error, KeyboardInterrupt) else output.failure(error))


def _show_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from lianlian_async import __version__
    from lianlian_async.signing import BACKEND
    from lianlian_async.transport import http_backend

    sender = http_backend()
    facts = {"version": __version__, "signs_with": BACKEND, "sends_with": sender}
    text = f"lianlian-async {__version__} (signs with {BACKEND}, sends with {sender})"
    click.echo(json.dumps(facts) if ctx.meta[AS_JSON] else text)
    ctx.exit()


@click.command("help")
@click.argument("topic", type=click.Choice(list(_TOPICS)), required=False, metavar="[TOPIC]")
@json_option
@click.pass_context
def help_topic(ctx: click.Context, topic: str | None) -> None:
    """Explain a concept: unknown, journal or processes."""
    from rich.text import Text

    from .output import Output

    chosen = _TOPICS if topic is None else {topic: _TOPICS[topic]}
    text = "\n\n".join(f"{name}\n\n{text}" for name, text in chosen.items())
    Output(as_json=ctx.meta[AS_JSON]).show(chosen, Text(text))


@click.group(
    cls=_Program,
    commands=[
        *(apply, query, batch, journal, explain, reconcile, worker, doctor),
        *(verify, keygen, notify, sandbox, demo, help_topic),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Exit codes: 0 all refunds made, or no error; 2 wrong usage, request or configuration (nothing was sent); "
    "3 a refund was rejected or failed, invalid lines were skipped, or a statement differs; 4 some unknown (query "
    "them); 5 invalid signature; 130 interrupted; 1 other error.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version, the signing backend and the HTTP backend, and exit.",
)
@json_option
def lianlian() -> None:
    """Make and query refunds at LianLian Pay. Without a proof, an outcome is unknown, never guessed.

    `lianlian batch` and `lianlian worker` record each refund in a journal, and query it before they send it again.

    The merchant and its keys come from the environment (LIANLIAN_OID_PARTNER, LIANLIAN_PRIVATE_KEY,
    LIANLIAN_GATEWAY_PUBLIC_KEYS ...) or from --config, never from the command line.
    """
    # Without a handler, Python prints the library's warnings on stderr; each command prints the outcomes itself.
    logging.getLogger("lianlian_async").addHandler(logging.NullHandler())
