"""``lianlian help TOPIC``: the concepts in a few sentences, and the help of each command."""

from __future__ import annotations

from typing import Final

from .output import Output

_TOPICS: Final = {
    "unknown": """\
A refund is *unknown* (exit code 4) if a request may have arrived and no answer proves its outcome.
Keep no_refund, dt_refund and money_refund. Never use another no_refund for the same refund.
At `ask_again_at` run `lianlian query`, or `lianlian batch` on the same file and journal again: both ask first.
"No such record" is believed 15 minutes after the last attempt; only then is the refund sent again.""",
    "journal": """\
A journal records each refund before it is sent, and its outcome. After a crash, the same command continues from it.
One process: a file in your application folder, or --journal PATH. Several: PostgreSQL, with its DSN in LIANLIAN_DSN.
`lianlian journal show` lists what is open, `journal resume` resolves it. Never delete a journal with open refunds.
A journal belongs to one merchant and one apply URL. If it was lost, use `lianlian batch --query-first`.""",
    "processes": """\
One process: `lianlian batch FILE` with its journal file, which only one process can open at a time.
Many: `lianlian batch --queue FILE` fills a queue in PostgreSQL, and any number of `lianlian worker` empty it.
Two workers never send the same refund: each takes a lease on it. If a worker dies, another one asks, then continues.
SIGINT or SIGTERM lets the refunds in flight finish.""",
}


def help_topic(output: Output, /, topic: str | None) -> None:
    """Run ``lianlian help``."""
    chosen = _TOPICS if topic is None else {topic: _TOPICS[topic]}
    output.show(chosen, *"\n\n".join(f"{name}\n\n{text}" for name, text in chosen.items()).splitlines())
