"""``lianlian help``: explain three concepts in a few sentences each."""

from typing import Final

import click

from . import AS_JSON
from .options import json_option

_TOPICS: Final = {
    "unknown": """\
A refund is *unknown* (exit code 4) if a request may have arrived and no answer proves its outcome.
Keep no_refund, dt_refund and money_refund. Never repeat the refund with another no_refund.
At `ask_again_at`, run `lianlian query`, or repeat the same `lianlian batch`, which queries the refund first.
`lianlian batch` sends the refund again only if LianLian has no record 15 minutes after the last attempt.""",
    "journal": """\
A journal records each refund before it is sent, and later its outcome. After a crash, run the same command again.
One process uses a file: by default one in your application folder, else --journal PATH.
Several processes share a journal in PostgreSQL. Put its URL into LIANLIAN_DSN.
`lianlian journal show` lists the oldest unknown refunds; `lianlian journal resume` tries to resolve all.
Never delete a journal. If it is lost, wait 15 minutes after the last run: LianLian may show a
refund late. Then use `lianlian batch --accept-new-journal --query-first`.
A journal belongs to one merchant and one apply URL.""",
    "processes": """\
One process: run `lianlian batch FILE`. Only one process at a time can send with a journal file; a second batch waits.
Several processes: `lianlian batch FILE --queue` fills a queue in PostgreSQL; any number of `lianlian worker` share it.
The queue and its journal belong to one merchant: another merchant needs another database.
A lease on each refund keeps other workers from sending it. If a worker dies, another one resolves its refunds.
After SIGINT or SIGTERM, a worker finishes the refunds in flight and ends. A batch cancels them: run it again.""",
}


@click.command("help")
@click.argument("topic", type=click.Choice(list(_TOPICS)), required=False, metavar="[TOPIC]")
@json_option
@click.pass_context
def help_topic(ctx: click.Context, topic: str | None) -> None:
    """Explain a concept: unknown, journal or processes."""
    chosen = _TOPICS if topic is None else {topic: _TOPICS[topic]}
    text = "\n\n".join(f"{name}\n\n{text}" for name, text in chosen.items())
    from rich.text import Text

    from .output import Output

    Output(as_json=ctx.meta[AS_JSON]).show(chosen, Text(text))
