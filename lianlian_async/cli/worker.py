"""``lianlian worker``: make the refunds of a queue; any number of workers can share it."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import attrs

from lianlian_async.background import BackgroundTask
from lianlian_async.errors import JournalError
from lianlian_async.merchant import Merchant
from lianlian_async.outcome import Outcome

from .batch.checked import Line
from .batch.results import Totals
from .journal import journal_views, read_journal
from .options import load_merchant, make_session
from .output import Output
from .signals import sigterm_interrupts
from .stores import make_journal, open_queue, queue_errors

if TYPE_CHECKING:
    from lianlian_async.contrib.procrastinate import RefundQueue


def worker(output: Output, /, *, dsn: str, config: Path | None, **options: Any) -> None:
    merchant = load_merchant(config)
    output.note(f"working with {options['concurrency']} connections as merchant {merchant.oid_partner}")
    totals = Totals(0)
    root, notes = logging.getLogger(), _Notes(output)
    with sigterm_interrupts(), output.progress(0, lambda: totals.status(0)) as step, ExitStack() as at_end:
        root.addHandler(notes)
        at_end.callback(root.removeHandler, notes)
        progress = Progress(output, step, totals, options["health_file"], options["interval"])
        reasons = anyio.run(_work, merchant, dsn, progress, options)
    output.show(*journal_views(anyio.run(read_journal, output, dsn), reasons))


@attrs.frozen
class Progress:
    """Shows what this worker has done and what is left, and touches its health file."""

    output: Output
    step: Callable[..., object]
    totals: Totals
    health_file: Path | None
    interval: float

    def add(self, outcome: Outcome) -> None:
        """Count one more outcome."""
        self.totals.add(Line(0, outcome.request, {}), outcome)
        self.step()

    async def report(self, queue: "RefundQueue") -> None:
        """Report at intervals until cancelled; touch the health file if refunds have ended or none is in flight."""
        totals, before = self.totals, -1
        while True:
            try:
                with queue_errors():
                    counts = await queue.counts()
                totals.total = totals.ended + counts["waiting"] + counts["at_work"]
                self.step(totals.ended + totals.to_do // max(counts["workers"], 1))  # this worker's share
                if self.health_file and (totals.ended > before or not queue.in_flight):
                    await anyio.Path(self.health_file).touch()
                before = totals.ended
            except (JournalError, OSError) as error:
                self.output.note(f"no progress report: {error}")
            await anyio.sleep(self.interval)


async def _work(merchant: Merchant, dsn: str, progress: Progress, options: dict[str, Any]) -> Mapping[str, int]:
    """Make the refunds; return the number of unknown outcomes by reason."""
    async with (
        make_journal(dsn) as journal,
        make_session(merchant, journal, options) as session,
        open_queue(dsn) as queue,
    ):
        from procrastinate.signals import on_stop  # not at the top: the extra may be missing

        wait, concurrency = not options["until_empty"], options["concurrency"]
        if progress.health_file is not None:
            await anyio.Path(progress.health_file).touch()
        async with aclosing(BackgroundTask(lambda: progress.report(queue))):
            with anyio.CancelScope() as scope, on_stop(scope.cancel):  # a second signal cancels this task
                await queue.work(session, concurrency=concurrency, wait=wait, on_outcome=progress.add)
        return session.unknown_reasons


class _Notes(logging.Handler):
    """Shows, in one line, each warning and error that this library, procrastinate or another library logs."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record and its error's message in one line, without a traceback."""
        error = record.exc_info and record.exc_info[1]
        self._output.note(record.getMessage() + (f": {error}" if error else ""))
