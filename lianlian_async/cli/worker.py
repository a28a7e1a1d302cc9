"""``lianlian worker``: make the refunds of a queue; any number of workers can share it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import click

from lianlian_async.merchant import Merchant

from .journal_report import journal_views, read_journal
from .options import config_option, load_merchant, make_session, session_options
from .output import Output, json_option, pass_output
from .signals import sigterm_interrupts
from .stores import dsn_argument, make_journal, open_queue


@click.command
@dsn_argument
@click.option("--until-empty", is_flag=True, help="End when no refund is due now; refunds due later stay in the queue.")
@session_options
@config_option
@json_option
@pass_output
def worker(output: Output, /, dsn: str, until_empty: bool, config: Path | None, **settings: Any) -> None:
    """Make the refunds of a queue.

    `lianlian batch --queue` fills the queue. Any number of workers on any number of machines can share it. Ctrl-C or
    SIGTERM ends the worker after the refunds in flight; a second Ctrl-C ends it at once, and another worker resolves
    these refunds. DSN is postgresql://…, preferably in LIANLIAN_DSN.
    """
    merchant = load_merchant(config)
    output.note(f"working with {settings['concurrency']} connections as merchant {merchant.oid_partner}")
    with sigterm_interrupts(), _warnings_shown(output):
        reasons = anyio.run(_work, merchant, dsn, until_empty, settings)
    document, shown = journal_views(anyio.run(read_journal, dsn), reasons)
    output.show(document, *shown)


async def _work(merchant: Merchant, dsn: str, until_empty: bool, settings: dict[str, Any]) -> Mapping[str, int]:
    """Make the refunds; return the number of unknown outcomes by reason."""
    async with (
        make_journal(dsn) as journal,
        make_session(merchant, journal=journal, **settings) as session,
        open_queue(dsn) as queue,
    ):
        await queue.work(session, concurrency=settings["concurrency"], wait=not until_empty)
        return session.unknown_reasons


@contextmanager
def _warnings_shown(output: Output) -> Iterator[None]:
    """Show each warning of this library and of procrastinate in one line."""
    handler, root = _Notes(output), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record and its error's message in one line, without a traceback."""
        error = record.exc_info and record.exc_info[1]
        self._output.note(record.getMessage() + (f": {error}" if error else ""))
