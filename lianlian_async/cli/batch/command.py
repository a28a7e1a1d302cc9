"""``lianlian batch``: make the refunds of a file. The command can be killed at any time and run again."""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import attrs
import click

from lianlian_async.background import BackgroundTask
from lianlian_async.batch import refund_many
from lianlian_async.cli.exit_codes import INTERRUPTED, INVALID, MADE, UNKNOWN, exit_outcome_of
from lianlian_async.cli.options import is_dsn, load_merchant, make_session, place_name
from lianlian_async.cli.output import Output, local_time
from lianlian_async.cli.signals import one_interruption, sigterm_interrupts
from lianlian_async.cli.stores import Receipt, default_place, make_folder, make_journal, open_queue
from lianlian_async.errors import ConfigurationError, JournalError, LianLianError, RefundOutcomeUnknown
from lianlian_async.journal import Journal
from lianlian_async.journal.files import FileLocked
from lianlian_async.merchant import Merchant
from lianlian_async.middleware import RateLimit
from lianlian_async.models import RefundRequest
from lianlian_async.outcome import Outcome

from . import results
from .checked import Checked, FileTotals, InJournal, Line, checked_file, look_up
from .options import refuse_for_queue

_VALID: Final = "valid, nothing was sent"
_POLL: Final = 1.0
"""Seconds between two attempts to open a journal, and between two checks whether only unknown refunds remain."""
_RECEIPT: Final = 60.0
"""Seconds of sending that one receipt covers. The batch writes the next receipt after half of this time."""


def batch(output: Output, /, *, file: str, config: Path | None, **options: Any) -> int:
    queue, dry_run = options["queue"], options["dry_run"]
    options["query_first"] |= options["accept_new_journal"]
    if queue:
        refuse_for_queue(click.get_current_context())
    merchant, place = (None, None) if queue else _find_journal(output, config, options)
    _refuse_to_overwrite(options["out"], file, place)
    with checked_file(file, merchant, options, output.note) as checked:
        if checked.problems.count and not options["skip_invalid"]:
            if options["out"] is not None:
                with results.result_writer(options["out"], checked) as write:
                    for result in results.other_results(checked):
                        write(result)
            results.show_checked(output, checked, "invalid, nothing was sent")
            return 2
        _refuse_too_much(checked.totals, options["max_total"], options["max_refund"])
        if queue and not dry_run:
            _enqueue(output, file, checked, options)
        elif merchant is None or place is None:
            results.show_checked(output, checked, _VALID)
        else:
            in_journal = anyio.run(look_up, checked, place)
            totals = results.Totals(checked.totals.refunds)
            run = _Batch(output, file, merchant, place, checked, options, in_journal, totals)
            run.check_journal()
            if not dry_run:
                run.confirm()
                return run.send()
            results.show_checked(output, checked, _VALID, in_journal, journal=place_name(place))
        return INVALID.exit_code if checked.problems.count else 0


def _find_journal(
    output: Output, config: Path | None, options: Mapping[str, Any]
) -> tuple[Merchant | None, str | None]:
    """Return the merchant and the place of the journal. In a dry run, the place or both are None if not configured."""
    merchant = None
    try:
        merchant = load_merchant(config)
        return merchant, options["place"] or default_place(merchant)
    except (ConfigurationError, click.UsageError) as error:
        if not options["dry_run"]:
            raise
        unchecked = "the journal" if merchant else "oid_partner, whether notify_url is missing, and the journal"
        output.note(f"{error}; not checked: {unchecked}")
        return merchant, None


def _refuse_too_much(totals: FileTotals, max_total: Decimal | None, max_refund: Decimal | None) -> None:
    if max_total is not None and totals.yuan > max_total:
        raise click.UsageError(f"sum {totals.yuan:,.2f} yuan exceeds --max-total {max_total:,.2f}; nothing was sent")
    if max_refund is not None and totals.largest_yuan > max_refund:
        largest = f"line {totals.largest_line}: {totals.largest_yuan:,.2f} yuan"
        raise click.UsageError(f"{largest} exceeds --max-refund {max_refund:,.2f}; nothing was sent")


def _receipt_of(file: str) -> Path:
    # Beside the file itself, so that all symbolic links to the file have one receipt.
    return Path(f"{Path(file).resolve()}.receipt")


def _refuse_to_overwrite(out: Path | None, file: str, place: str | None) -> None:
    if out is not None:
        places = (file, _receipt_of(file), place)
        needed = [Path(one).resolve() for one in places if one and file != "-" and not is_dsn(str(one))]
        if out.resolve() in needed or any(out.exists() and path.exists() and path.samefile(out) for path in needed):
            raise click.BadParameter("must not be the input, its receipt or the journal", param_hint="--out")


def _receipt_writer(output: Output, file: str, ours: Receipt, options: Mapping[str, Any]) -> Callable[[float], None]:
    """Check the receipt of ``file`` (:meth:`.Receipt.check`); return a function that writes it. Stdin has none."""
    if file == "-":
        return lambda _: None
    path = _receipt_of(file)
    is_first = not path.exists()
    others = ours.check(path, accept_new=options["accept_new_journal"], grace=options["not_found_grace"])

    def write(seconds: float) -> None:
        nonlocal is_first
        try:
            ours.write(path, others, seconds, is_first=is_first)
        except FileExistsError:
            raise click.UsageError(f"another batch just wrote {path}; nothing was sent; try again later") from None
        except OSError as error:
            output.note(f"{path}: {error.strerror}; the receipt was not written")
        is_first = False

    return write


def _enqueue(output: Output, file: str, checked: Checked, options: Mapping[str, Any]) -> None:
    totals = checked.totals
    if totals.refunds and not options["yes"]:
        question = f"Put {totals.refunds:,} refunds, {totals.yuan:,.2f} yuan, into the queue?"
        output.confirm(file, results.file_facts(checked, None), question)
    added = anyio.run(_add_to_queue, output, file, checked, options)
    results.show_checked(output, checked, "in the queue", added=added)


async def _add_to_queue(output: Output, file: str, checked: Checked, options: Mapping[str, Any]) -> int:
    dsn = options["queue"]
    async with make_journal(dsn) as journal, open_queue(dsn) as queue:
        owner = (journal.owner.oid_partner, journal.owner.apply_url) if journal.owner else (None, None)
        _receipt_writer(output, file, Receipt(journal.id, place_name(dsn), *owner), options)(0)
        return await queue.enqueue(line.request async for line in checked.lines())


async def _rewrite(write_receipt: Callable[[float], None]) -> None:
    while True:
        await anyio.sleep(_RECEIPT / 2)
        await anyio.to_thread.run_sync(write_receipt, _RECEIPT)


@attrs.define
class _Batch:
    """A batch and its progress."""

    output: Output
    file: str
    merchant: Merchant
    place: str
    checked: Checked
    options: Mapping[str, Any]
    in_journal: InJournal
    totals: results.Totals
    failure: LianLianError | None = attrs.field(default=None, init=False)
    in_flight: dict[str, Line] = attrs.field(factory=dict, init=False)
    """Refunds that were started and have no outcome yet, by ``no_refund``."""
    _last_begun: int = attrs.field(default=0, init=False)
    """The line of the last refund that was started."""
    _held: Sequence[tuple[float, RefundOutcomeUnknown, Outcome]] = attrs.field(default=(), init=False)
    """Unknown refunds that ``--wait-unknown`` keeps until all others have ended."""

    def check_journal(self) -> None:
        """Check that the file was not sent with another journal; note what a new journal means."""
        self._receipt_writer(self.in_journal.journal_id or "")
        if self.in_journal.journal_id is None and not self.options["query_first"]:
            self.output.note(
                "this journal is new, so every refund counts as never sent; if some may have been sent before, "
                "wait 15 minutes after the last run and use --query-first"
            )

    def _receipt_writer(self, journal_id: str) -> Callable[[float], None]:
        place = place_name(self.place) if is_dsn(self.place) else str(Path(self.place).absolute())
        owner = self.merchant.oid_partner, self.merchant.endpoints.apply
        ours = Receipt(journal_id, place, *owner, query_first=self.options["query_first"])
        return _receipt_writer(self.output, self.file, ours, self.options)

    def confirm(self) -> None:
        """Ask for confirmation unless ``--yes``, and create the default journal's folder."""
        found, journal = self.in_journal.found, place_name(self.place)
        if self.totals.total and not self.options["yes"]:
            facts = {"merchant": self.merchant.oid_partner, "endpoint": self.merchant.endpoints.apply}
            facts |= {"journal": journal, **results.file_facts(self.checked, self.in_journal)}
            resolved = f", and resolve {found['open']:,} unresolved ones" if found["open"] else ""
            question = f"Send {found['new']:,} new refunds, {self.in_journal.new_yuan:,.2f} yuan{resolved}?"
            self.output.confirm(self.file, facts, question)
        elif found["new"] < self.totals.total:
            in_words = ", ".join(f"{number:,} {word}" for word, number in found.items())
            self.output.note(f"journal {journal}: {in_words}")
        if not self.options["place"]:
            make_folder(self.place)

    def send(self) -> int:
        """Send the batch and show its results; return the exit code."""
        output, totals, outcome = self.output, self.totals, None
        try:
            with sigterm_interrupts(), output.progress(totals.total, lambda: totals.status(len(self._held))) as advance:
                anyio.run(self.work, advance)
        except KeyboardInterrupt:
            outcome = INTERRUPTED
        failure, in_flight = self.failure, len(self.in_flight)
        if outcome or (failure and in_flight):
            what, aim = (
                (f"up to {in_flight:,} refunds without an outcome may have been made:", "resolve them")
                if in_flight
                else ("interrupted: every refund that was sent has an outcome;", "go on")
            )
            output.note(f"{what} run the same command again to {aim}")
        outcome = outcome or (exit_outcome_of(failure) if failure else totals.exit_outcome())
        if outcome is MADE and self.checked.problems.count:
            outcome = INVALID
        out = self.options["out"]
        places = {"journal": place_name(self.place)} | ({"results": str(out)} if out else {})
        results.show_batch(output, self.checked, totals, self.in_journal, outcome, failure=failure, places=places)
        is_unknown = failure and (in_flight or totals.refunds[UNKNOWN])
        return UNKNOWN.exit_code if is_unknown else outcome.exit_code

    async def work(self, advance: Callable[[], object]) -> None:
        """Send all refunds. Store an error in ``failure``, or raise it if no refund was started."""
        try:
            with one_interruption():
                await self._work(advance)
            self.totals.check_complete()
        except LianLianError as error:
            if not (self.totals.ended or self.in_flight):
                raise
            self.failure = error

    async def _work(self, advance: Callable[[], object]) -> None:
        options = self.options
        choices = {name: options[name] for name in ("keep_going", "wait_unknown")}
        async with AsyncExitStack() as stack:
            journal = await self._open_journal(stack)
            await journal.bind(self.merchant.oid_partner, self.merchant.endpoints.apply)
            # Check again: since the confirmation was asked for, the file may have been sent with another journal.
            write_receipt = self._receipt_writer(journal.id)
            write_receipt(_RECEIPT)
            with ExitStack() as at_end, self._result_writer() as write:
                at_end.callback(write_receipt, 0)
                async with (
                    aclosing(BackgroundTask(partial(_rewrite, write_receipt))),
                    make_session(self.merchant, journal, options, query_first=options["query_first"]) as session,
                    aclosing(refund_many(session, self._requests(journal), journal=journal, **choices)) as outcomes,
                    aclosing(BackgroundTask(self._note_waiting)),
                ):
                    self._held = outcomes.held
                    async for outcome in outcomes:
                        line = self.in_flight.pop(outcome.request.no_refund)
                        self.totals.add(line, outcome)
                        write(results.result_of(line, outcome))
                        advance()

    async def _open_journal(self, stack: AsyncExitStack) -> Journal:
        """Open the journal; wait while another process has its file open, unless ``--no-wait``."""
        is_noted = False
        while True:
            try:
                return await stack.enter_async_context(make_journal(self.place))
            except JournalError as error:
                if not isinstance(error.__cause__, FileLocked) or self.options["no_wait"]:
                    raise
                if not is_noted:
                    self.output.note(f"waiting: {error.__cause__} has the journal {self.place} open")
                is_noted = True
            await anyio.sleep(_POLL)

    async def _note_waiting(self) -> None:
        """When only unknown refunds remain, print until when the batch waits."""
        while not 0 < len(self._held) == self.totals.to_do:  # noqa: ASYNC110 - a held refund sets no event
            await anyio.sleep(_POLL)
        last = local_time(max(unknown.ask_again_at for _, unknown, _ in self._held))
        self.output.note(f"waiting until {last} to resolve {len(self._held):,} unknown refunds")

    @contextmanager
    def _result_writer(self) -> Iterator[Callable[[Mapping[str, Any]], object]]:
        """Yield a function that writes a result to ``--out``. At the end, write the lines without an outcome."""
        if self.options["out"] is None:
            yield str
            return
        with results.result_writer(self.options["out"], self.checked) as write:

            def write_result(result: Mapping[str, Any]) -> None:
                if self.failure is None:
                    try:
                        write(result)
                    except LianLianError as error:  # the refunds are more important than this file
                        self.failure = error
                        self.output.note(f"{error}; no more results are written")

            try:
                yield write_result
            finally:
                for result in results.other_results(self.checked, self._last_begun, self.in_flight):
                    write_result(result)

    async def _requests(self, journal: Journal) -> AsyncGenerator[RefundRequest]:
        """Yield the refunds; ``--rate`` limits only those that are not finished in the journal."""
        rate = self.options["rate"]
        limit = RateLimit(rate) if rate else None
        async for line in self.checked.lines():
            if limit is not None:
                entry = await journal.find(line.request.no_refund)
                if entry is None or entry.ending is None:
                    async with limit:
                        pass
            self.in_flight[line.request.no_refund], self._last_begun = line, line.line
            yield line.request
