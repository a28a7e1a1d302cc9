"""``lianlian worker``: makes the refunds that wait in a queue, beside as many other workers as there are."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import click

from lianlian_async.merchant import Merchant

from .journal_report import read_journal, show_journal
from .options import config_option, load_merchant, make_session, session_options
from .output import Output, json_option, pass_output
from .signals import sigterm_interrupts
from .stores import dsn_argument, make_journal, open_queue

__all__ = ["worker"]


@click.command
@dsn_argument
@click.option("--until-empty", is_flag=True, help="End when nothing waits; what is for later stays in the queue.")
@session_options
@config_option
@json_option
@pass_output
def worker(output: Output, /, dsn: str, until_empty: bool, config: Path | None, **settings: Any) -> None:
    """Make the refunds that wait in a queue.

    `lianlian batch --queue` puts them there. This works until Ctrl-C or SIGTERM: what is under way then is carried
    through; a second Ctrl-C breaks it off, and it is asked about by who comes next. Any number of workers, on any
    number of machines, may share a database: no refund is made twice. DSN is postgresql://…, best in LIANLIAN_DSN.
    """
    merchant = load_merchant(config)
    output.note(f"working with {settings['concurrency']} connections as merchant {merchant.oid_partner}")
    with sigterm_interrupts(), _told(output):
        reasons = anyio.run(_work, merchant, dsn, until_empty, settings)
    show_journal(output, anyio.run(read_journal, dsn), reasons)


async def _work(merchant: Merchant, dsn: str, until_empty: bool, settings: dict[str, Any]) -> Mapping[str, int]:
    """Empty the queue; why outcomes were unknown."""
    async with (
        make_journal(dsn) as journal,
        make_session(merchant, journal=journal, **settings) as session,
        open_queue(dsn) as queue,
    ):
        await queue.work(session, concurrency=settings["concurrency"], wait=not until_empty)
        return session.unknown_reasons


# ── what the libraries have to say ───────────────────────────────────────────────────────────────


@contextmanager
def _told(output: Output) -> Iterator[None]:
    """Warnings of this library and of procrastinate, as remarks in one line each."""
    handler, root = _Remarks(output), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Remarks(logging.Handler):
    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """One line, and the error in words: a traceback helps nobody who runs a worker."""
        error = record.exc_info and record.exc_info[1]
        self._output.note(record.getMessage() + (f": {error}" if error else ""))
