"""``lianlian batch``: the refunds of a file, all checked before the first is sent; it may be killed and run again."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import attrs
import click

from lianlian_async.batch import refund_many
from lianlian_async.errors import BatchStopped, LianLianError
from lianlian_async.journal import Journal, State
from lianlian_async.merchant import Merchant
from lianlian_async.middleware import RateLimit
from lianlian_async.models import RefundRequest

from .batch_options import batch_options, refuse_for_queue
from .checked import Checked
from .endings import INTERRUPTED, UNKNOWN, Ending, ending_of
from .inputs import config_option, load_merchant, make_session, session_options
from .output import Output, json_option, pass_output
from .places import is_dsn, make_journal, open_queue
from .results import RESULT, Tally, line_writer, result_of
from .signals import sigterm_interrupts
from .summary import show_batch, show_checked, tell_findings
from .table import Columns, read_rows

__all__ = ["batch"]


@click.command
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@batch_options
@session_options
@config_option
@json_option
@pass_output
@click.pass_context
def batch(ctx: click.Context, output: Output, /, *, file: str, config: Path | None, **options: Any) -> None:
    """Have the refunds of a file made, each once.

    FILE is CSV with a header or JSON Lines (- is stdin), under LianLian's field names. All lines are checked before
    anything is sent. After a crash or Ctrl-C, run the same command again: what was begun stands in the journal, and
    is asked about first. Exit codes: 0 all made; 3 some rejected or failed; 4 some unknown; 130 interrupted.
    """
    queue, dry_run = options["queue"], options["dry_run"]
    if queue:
        refuse_for_queue(ctx)
    merchant = None if queue else load_merchant(config)
    if not (queue or dry_run):
        _settle_places(file, options)
    with Checked(merchant, derive=options["derive"], dt_refund=options["dt_refund"]) as checked:
        columns = Columns(options["renamed"], options["ignore_unknown"], has_partner=merchant is not None)
        with click.open_file(file, "rb") as stream:
            for row in read_rows(stream, file, columns, options["encoding"]):
                checked.add(row)
        tell_findings(output, checked)
        if checked.problems.count and not options["skip_invalid"]:
            show_checked(output, checked, "invalid, nothing was sent")
            ctx.exit(2)
        _refuse_more_than(options["max_total"], checked)
        if dry_run:
            show_checked(output, checked, "valid, nothing was sent")
        elif merchant is None:
            _ask(options["yes"], file, checked, "into the queue")
            show_checked(output, checked, "in the queue", added=anyio.run(_enqueue, queue, checked))
        else:
            _ask(options["yes"], file, checked, f"as merchant {merchant.oid_partner} at {merchant.endpoints.apply}")
            ctx.exit(_send(output, merchant, checked, options))


def _settle_places(file: str, options: dict[str, Any]) -> None:
    """Find out where the journal is, and refuse to write results over something that is needed."""
    out: Path | None = options["out"]
    if options["journal"] is None:
        if file == "-":
            raise click.UsageError("--journal: is needed, as there is no file that it could lie beside")
        options["journal"] = f"{file}.journal"
    if out is not None:
        needed = [Path(place).resolve() for place in (file, options["journal"]) if place != "-" and not is_dsn(place)]
        if out.resolve() in needed or any(out.exists() and path.exists() and path.samefile(out) for path in needed):
            raise click.BadParameter("is the input or the journal", param_hint="--out")


def _refuse_more_than(most: Decimal | None, checked: Checked) -> None:
    if most is not None and checked.yuan > most:
        raise click.UsageError(
            f"{checked.yuan:,.2f} yuan in all is more than --max-total {most:,.2f}; nothing was sent"
        )


def _ask(yes: bool, file: str, checked: Checked, whereto: str) -> None:
    """Go on only if that is wanted."""
    if yes or not checked.count:
        return
    if file == "-" or not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: say --yes, or --dry-run; nothing was sent")
    question = f"Send {checked.count:,} refunds, {checked.yuan:,.2f} yuan, {whereto}?"
    click.confirm(question, abort=True, err=True)


async def _enqueue(dsn: str, checked: Checked) -> int:
    """How many were not in the queue yet."""
    async with make_journal(dsn), open_queue(dsn) as queue:
        return await queue.enqueue(checked.requests())


# ── sending ──────────────────────────────────────────────────────────────────────────────────────


def _send(output: Output, merchant: Merchant, checked: Checked, options: Mapping[str, Any]) -> int:
    """Have them made, and show what became of them; the exit code."""
    run = _Run(output, merchant, checked, options)
    # Whoever is interrupted is told below what may have been made: not one line for each.
    logging.getLogger("lianlian_async").addHandler(logging.NullHandler())
    try:
        with sigterm_interrupts(), output.live("refunds", checked.count) as run.advance:
            anyio.run(run.work)
    except KeyboardInterrupt:
        under_way = run.begun - run.tally.ended
        output.note(f"up to {under_way:,} more may have been made: run the same command again, it carries on")
        return _show(run, INTERRUPTED)
    return _show(run, ending_of(run.failure) if run.failure else run.tally.ending())


def _show(run: _Run, ending: Ending) -> int:
    """Show what became of a batch that ended in this way; the exit code."""
    journal, out = run.options["journal"], run.options["out"]
    places = {"journal": "in PostgreSQL" if is_dsn(journal) else journal} | ({"results": str(out)} if out else {})
    show_batch(run.output, run.checked, run.tally, run.found, ending=ending, failure=run.failure, places=places)
    is_graver = isinstance(run.failure, BatchStopped) and run.tally.refunds[UNKNOWN]
    return UNKNOWN.exit_code if is_graver else ending.exit_code


@attrs.define
class _Run:
    """The sending of a batch, and how far it is."""

    output: Output
    merchant: Merchant
    checked: Checked
    options: Mapping[str, Any]
    advance: Callable[[str], object] = attrs.field(default=str, init=False)
    found: Mapping[State, int] = attrs.field(factory=dict, init=False)
    tally: Tally = attrs.field(init=False)
    begun: int = attrs.field(default=0, init=False)
    failure: LianLianError | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.tally = Tally(self.checked.count)

    async def work(self) -> None:
        """Have all made; what ended it before all were is its ``failure``, or is raised if nothing was begun."""
        try:
            await self._work()
        except LianLianError as error:
            if not self.tally.ended:
                raise
            self.failure = error

    async def _work(self) -> None:
        """Send what the journal does not know, ask about what it holds as open, and write down all that is found."""
        options, out = self.options, self.options["out"]
        wishes = {name: options[name] for name in ("keep_going", "wait_unknown")}
        settings = {name: options[name] for name in ("concurrency", "deadline", "absence_grace")}
        async with make_journal(options["journal"]) as journal:
            await self._look_around(journal)
            with line_writer(out, RESULT) if out else nullcontext(str) as write:
                async with (
                    make_session(self.merchant, journal=journal, **settings) as session,
                    refund_many(session, self._requests(journal), **wishes) as outcomes,
                ):
                    async for outcome in outcomes:
                        self.tally.add(outcome)
                        write(result_of(outcome))
                        self.advance(self.tally.line())

    async def _look_around(self, journal: Journal) -> None:
        self.found = await journal.counts()
        unsettled = self.found[State.UNSETTLED]
        settled = sum(self.found.values()) - unsettled
        if settled or unsettled:
            self.output.note(f"carrying on: the journal holds {settled:,} settled and {unsettled:,} unsettled refunds")

    async def _requests(self, journal: Journal) -> AsyncGenerator[RefundRequest]:
        """What is to be done, at the pace that was asked for: that which causes no traffic does not count."""
        rate = self.options["rate"]
        pace = RateLimit(rate) if rate else None
        async for request in self.checked.requests():
            if pace is not None and not await _is_settled(journal, request):
                async with pace:
                    pass
            self.begun += 1
            yield request


async def _is_settled(journal: Journal, request: RefundRequest) -> bool:
    entry = await journal.find(request.no_refund)
    return entry is not None and entry.state.is_settled
