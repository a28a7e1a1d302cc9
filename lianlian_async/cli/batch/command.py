"""``lianlian batch``: the refunds of a file, all checked before the first is sent; it may be killed and run again."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import click

from lianlian_async.batch import refund_many
from lianlian_async.cli.exit_codes import INTERRUPTED, UNKNOWN, ExitOutcome, exit_outcome_of
from lianlian_async.cli.options import config_option, load_merchant, make_session, session_options
from lianlian_async.cli.output import Output, json_option, pass_output
from lianlian_async.cli.signals import one_interruption, sigterm_interrupts
from lianlian_async.cli.stores import Receipt, default_place, is_dsn, make_folder, make_journal, open_queue
from lianlian_async.errors import JournalError, LianLianError
from lianlian_async.journal import Journal
from lianlian_async.journal.base import Owner
from lianlian_async.merchant import Merchant
from lianlian_async.middleware import RateLimit
from lianlian_async.models import RefundRequest
from lianlian_async.session import RefundSession

from .checked import Checked, Survey, survey
from .options import batch_options, refuse_for_queue
from .results import RESULT, Totals, line_writer, result_of
from .rows import Columns, read_rows
from .summary import show_batch, show_checked, tell_findings

__all__ = ["batch"]

_VALID: Final = "valid, nothing was sent"
_LOOK_AGAIN: Final = 1.0
"""Seconds between two looks at a journal that another process has."""


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
    place = _find_journal(output, merchant, options) if merchant else None
    if not (queue or dry_run):
        _refuse_to_overwrite(options["out"], file, place)
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
        if merchant is None or place is None:
            _refund_elsewhere(output, file, checked, options)
        else:
            owner = Owner(merchant.oid_partner, merchant.endpoints.apply)
            known = anyio.run(survey, checked, owner, place, _older_journal(file, place))
            run = _Run(output, merchant, checked, options, known, None if file == "-" else Path(f"{file}.receipt"))
            run.check_receipt(known.journal_id or "")
            if dry_run:
                show_checked(output, checked, _VALID, known)
            else:
                _agree(run, file)
                ctx.exit(_send(run))


def _refund_elsewhere(output: Output, file: str, checked: Checked, options: Mapping[str, Any]) -> None:
    """Put the refunds into the queue, or nowhere."""
    if options["dry_run"]:
        show_checked(output, checked, _VALID)
    else:
        _ask(options["yes"], file, checked, "into the queue")
        added = anyio.run(_enqueue, options["queue"], checked)
        show_checked(output, checked, "in the queue", added=added)


def _agree(run: _Run, file: str) -> None:
    """Say what the journal knows, ask whether to send, and make the folder of a default journal."""
    known, options, merchant = run.known, run.options, run.merchant
    if known.new < known.total or not options["yes"]:
        for text in known.notes(query_first=options["query_first"]):
            run.output.note(text)
    _ask(options["yes"], file, run.checked, f"as merchant {merchant.oid_partner} at {merchant.endpoints.apply}")
    if not options["journal"]:
        make_folder(known.place)


def _find_journal(output: Output, merchant: Merchant, options: Mapping[str, Any]) -> str | None:
    """Where the journal is. A dry run does without, where there is no place for one."""
    try:
        place: str = options["journal"] or default_place(merchant)
    except click.UsageError as error:
        if not options["dry_run"]:
            raise
        output.note(error.message)
        return None
    return place


def _older_journal(file: str, place: str) -> str | None:
    """The journal that earlier releases kept beside the file."""
    older = f"{file}.journal"
    return older if Path(older).is_file() and Path(older).resolve() != Path(place).resolve() else None


def _refuse_to_overwrite(out: Path | None, file: str, place: str | None) -> None:
    """Refuse to write results over something that is needed."""
    if out is not None:
        places = (file, f"{file}.journal", f"{file}.receipt", place)
        needed = [Path(one).resolve() for one in places if one and file != "-" and not is_dsn(one)]
        if out.resolve() in needed or any(out.exists() and path.exists() and path.samefile(out) for path in needed):
            raise click.BadParameter("is the input, its receipt or the journal", param_hint="--out")


def _refuse_more_than(most: Decimal | None, checked: Checked) -> None:
    if most is not None and checked.yuan > most:
        raise click.UsageError(
            f"{checked.yuan:,.2f} yuan in all is more than --max-total {most:,.2f}; nothing was sent"
        )


def _ask(yes: bool, file: str, checked: Checked, destination: str) -> None:
    """Go on only if that is wanted."""
    if yes or not checked.count:
        return
    if file == "-" or not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask on: say --yes, or --dry-run; nothing was sent")
    question = f"Send {checked.count:,} refunds, {checked.yuan:,.2f} yuan, {destination}?"
    click.confirm(question, abort=True, err=True)


async def _enqueue(dsn: str, checked: Checked) -> int:
    """Put the refunds into the queue; return how many."""
    async with make_journal(dsn), open_queue(dsn) as queue:
        return await queue.enqueue(checked.requests())


# ── sending ──────────────────────────────────────────────────────────────────────────────────────


def _send(run: _Run) -> int:
    """Have them made, and show what became of them; the exit code."""
    # Whoever is interrupted is told below what may have been made: not one line for each.
    logging.getLogger("lianlian_async").addHandler(logging.NullHandler())
    try:
        with sigterm_interrupts(), run.output.live("refunds", run.checked.count) as run.advance:
            anyio.run(run.work)
    except KeyboardInterrupt:
        under_way = run.begun - run.tally.ended
        run.output.note(f"up to {under_way:,} more may have been made: run the same command again, it carries on")
        return _show(run, INTERRUPTED)
    return _show(run, exit_outcome_of(run.failure) if run.failure else run.tally.ending())


def _show(run: _Run, ending: ExitOutcome) -> int:
    """Show what became of a batch that ended in this way; the exit code."""
    out = run.options["out"]
    places = {"journal": run.known.name} | ({"results": str(out)} if out else {})
    show_batch(run.output, run.checked, run.tally, run.known, ending=ending, failure=run.failure, places=places)
    is_graver = run.failure is not None and run.tally.refunds[UNKNOWN]
    return UNKNOWN.exit_code if is_graver else ending.exit_code


@attrs.define
class _Run:
    """The sending of a batch, and how far it is."""

    output: Output
    merchant: Merchant
    checked: Checked
    options: Mapping[str, Any]
    known: Survey
    receipt: Path | None
    """Where the receipt lies; None: the batch comes from stdin."""
    advance: Callable[[str], object] = attrs.field(default=str, init=False)
    tally: Totals = attrs.field(init=False)
    begun: int = attrs.field(default=0, init=False)
    failure: LianLianError | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.tally = Totals(self.checked.count)

    def check_receipt(self, journal_id: str) -> Callable[[], None]:
        """Refuse a journal that is not the one of the last run; what is returned writes the receipt."""
        if self.receipt is None:
            return lambda: None
        path = self.receipt
        place = self.known.name if is_dsn(self.known.place) else str(Path(self.known.place).absolute())
        ours = Receipt(journal_id, place, self.merchant.oid_partner, self.merchant.endpoints.apply)
        others = ours.check(path, accept_new=self.options["accept_new_journal"])
        return lambda: ours.write(path, others)

    async def work(self) -> None:
        """Have all made; what ended it before all were is its ``failure``, or is raised if nothing was begun."""
        try:
            with one_interruption():
                await self._work()
            self.tally.check_complete()
        except LianLianError as error:
            if not self.tally.ended:
                raise
            self.failure = error

    async def _work(self) -> None:
        """Send what the journal does not know, ask about what it holds as open, and write down all that is found."""
        options, out = self.options, self.options["out"]
        settings = {name: options[name] for name in ("concurrency", "deadline", "not_found_grace", "query_first")}
        async with self._opened(self.known.place) as journal:
            await journal.bind(self.merchant.oid_partner, self.merchant.endpoints.apply)
            self._leave_receipt(journal.id)
            with line_writer(out, RESULT) if out else nullcontext(str) as write:
                async with make_session(self.merchant, journal=journal, **settings) as session:
                    if self.known.older is not None and self.known.in_older:
                        async with self._opened(self.known.older) as older:
                            await self._refund_all(session, older, self.checked.requests(older=True), write)
                    await self._refund_all(session, journal, self.checked.requests(), write)

    def _leave_receipt(self, journal_id: str) -> None:
        write = self.check_receipt(journal_id)
        try:
            write()
        except OSError as error:
            self.output.note(f"no receipt beside the file: {self.receipt}: {error.strerror}")

    @asynccontextmanager
    async def _opened(self, place: str) -> AsyncGenerator[Journal]:
        """The journal at ``place``, as soon as nobody else is at work with it."""
        is_told = False
        async with AsyncExitStack() as stack:
            while True:
                try:
                    journal = await stack.enter_async_context(make_journal(place))
                    break
                except JournalError as error:
                    if error.holder is None or self.options["no_wait"]:
                        raise
                    if not is_told:
                        self.output.note(f"waiting: {error}")
                    is_told = True
                await anyio.sleep(_LOOK_AGAIN)
            yield journal

    async def _refund_all(
        self,
        session: RefundSession,
        journal: Journal,
        requests: AsyncIterable[RefundRequest],
        write: Callable[[Mapping[str, Any]], object],
    ) -> None:
        wishes = {name: self.options[name] for name in ("keep_going", "wait_unknown")}
        paced = self._requests(journal, requests)
        async with refund_many(session, paced, journal=journal, **wishes) as outcomes:
            async for outcome in outcomes:
                self.tally.add(outcome)
                write(result_of(outcome))
                self.advance(self.tally.line())

    async def _requests(
        self, journal: Journal, requests: AsyncIterable[RefundRequest]
    ) -> AsyncGenerator[RefundRequest]:
        """Yield the requests, no more than the given number a second; those that need no traffic are not counted."""
        rate = self.options["rate"]
        pace = RateLimit(rate) if rate else None
        async for request in requests:
            if pace is not None and not await _is_resolved(journal, request):
                async with pace:
                    pass
            self.begun += 1
            yield request


async def _is_resolved(journal: Journal, request: RefundRequest) -> bool:
    entry = await journal.find(request.no_refund)
    return entry is not None and entry.state.is_finished
