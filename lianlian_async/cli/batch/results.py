"""The results of a batch: one result line for each line of the file, the totals, and the command's output."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from decimal import Decimal
from itertools import chain
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

import attrs
from rich.console import RenderableType
from rich.text import Text

from lianlian_async import errors
from lianlian_async.cli.exit_codes import FAILED, MADE, REJECTED, UNKNOWN, ExitOutcome, error_document, exit_outcome_of
from lianlian_async.cli.output import Output, line_writer, local_time, printable, table, tables
from lianlian_async.codes import explain
from lianlian_async.models import RefundStatus
from lianlian_async.outcome import Outcome

from .checked import Checked, InJournal, Line

_IDENTITY: Final = ("no_refund", "dt_refund", "money_refund")
_RECORDED: Final = ("ret_code", "ret_msg", "oid_refundno", "sta_refund", "settle_date")
_OURS: Final = (
    *("outcome", "what_to_do", "meaning", *_RECORDED, "ask_again_at"),
    *("error", "attempts", "queries", "seconds"),
)
_RUN_AGAIN: Final = "run the same command again"
_KEPT: Final = 20
_STYLES: Final = defaultdict(lambda: "red", {MADE: "", UNKNOWN: "yellow"})
"""The colour of an outcome."""


def exit_outcome(outcome: Outcome) -> ExitOutcome:
    """Return the outcome in the words of the command."""
    if isinstance(outcome.error, errors.JournalError) and outcome.error.said is not None:
        return UNKNOWN  # the journal could not record what became of it
    return exit_outcome_of(outcome.refund or cast("errors.LianLianError", outcome.error))  # it has one of the two


class Reason(NamedTuple):
    """Why refunds have an outcome other than *made*, and what to do."""

    outcome: ExitOutcome
    reason: str
    advice: str
    ret_code: str | None = None


def _reason_of(outcome: Outcome) -> Reason:
    word = exit_outcome(outcome)
    match outcome.error:
        case None:
            reason = f"made, but failed at the bank (sta_refund {RefundStatus.FAILED})"
            return Reason(word, reason, "ask LianLian for the cause; to try again, use a new no_refund")
        case errors.RefundRejected() as error:
            return Reason(word, f"{error.ret_code} {error.meaning}", error.advice, error.ret_code)
        case errors.RefundOutcomeUnknown() as error:
            return Reason(word, error.reason, f"{_RUN_AGAIN} later; do not use a new no_refund")
        case errors.JournalError() if word is UNKNOWN:
            return Reason(word, "journal error after sending", f"repair the journal, then {_RUN_AGAIN}")
        case errors.RefundNotSent() as error:
            return Reason(word, error.last_error, _RUN_AGAIN)
        case errors.RefundConflict() as error:
            reason = f"the no_refund belongs to a refund with another {error.field}"
            return Reason(word, reason, "do not refund again before a person has decided")
    return Reason(word, str(outcome.error), _RUN_AGAIN)


def result_writer(out: Path, checked: Checked) -> AbstractContextManager[Callable[[Mapping[str, Any]], object]]:
    """Open ``out`` with :func:`.line_writer`: line number, the file's own columns, identity and results.

    In CSV, semicolons separate the cells if they do so in the file: its spreadsheet program may expect them.
    """
    columns = dict.fromkeys(("line", *checked.columns.seen, *_IDENTITY, *_OURS))
    return line_writer(out, columns, ";" if checked.columns.delimiter == ";" else ",")


def result_of(line: Line, outcome: Outcome) -> dict[str, Any]:
    """Return the result line of one refund."""
    source: Any = outcome.refund or outcome.error
    recorded = {name: getattr(source, name, None) for name in _RECORDED}
    code, moment, settled = recorded["ret_code"], getattr(source, "ask_again_at", None), recorded["settle_date"]
    return _result(line.line, line.request.to_dict(), line.cells) | {
        **recorded,
        "settle_date": settled and f"{settled:%Y%m%d}",
        "outcome": exit_outcome(outcome).word,
        "what_to_do": None if exit_outcome(outcome) is MADE else _reason_of(outcome).advice,
        "meaning": code and explain(code).meaning,
        "ask_again_at": moment and local_time(moment),
        "error": None if outcome.error is None else str(outcome.error),
        "attempts": outcome.attempts,
        "queries": outcome.queries,
        "seconds": round(outcome.seconds, 3),
    }


def other_results(
    checked: Checked, last_begun: int = 0, in_flight: Mapping[str, Line] = MappingProxyType({})
) -> Iterator[dict[str, Any]]:
    """Yield the result lines of lines that were not sent, of refunds in flight, and of refunds that were not begun."""
    for number, fields, cells, problem in checked.unsent_lines():
        if fields is None:
            advice = f"correct the line, then {_RUN_AGAIN}"
            yield _result(number, {}, cells) | {"outcome": "invalid", "what_to_do": advice, "error": problem}
        else:
            yield _result(number, fields, cells) | {"outcome": "repeated", "meaning": problem}
    for line in chain(in_flight.values(), checked.lines_after(last_begun)):
        word, more = (UNKNOWN.word, "; do not use a new no_refund") if line.line <= last_begun else ("to do", "")
        result = _result(line.line, line.request.to_dict(), line.cells)
        yield result | {"outcome": word, "what_to_do": _RUN_AGAIN + more}


def _result(line: int, fields: Mapping[str, str], cells: Mapping[str, str]) -> dict[str, Any]:
    # A non-empty cell replaces the request's field of the same name, unless its column is in _OURS.
    own = {column: text for column, text in cells.items() if text and column not in _OURS}
    return {**fields, **own, "line": line}


@attrs.define
class Totals:
    """The totals of a batch of ``total`` refunds so far."""

    total: int
    refunds: Counter[ExitOutcome] = attrs.field(factory=Counter, init=False)
    yuan: Counter[ExitOutcome] = attrs.field(factory=Counter, init=False)
    reasons: Counter[Reason] = attrs.field(factory=Counter, init=False)
    """The number of refunds by reason."""
    not_made: dict[Reason, list[Line]] = attrs.field(factory=lambda: defaultdict(list), init=False)
    """By reason, the first 20 refunds."""
    attempts: int = attrs.field(default=0, init=False)
    queries: int = attrs.field(default=0, init=False)
    ask_again_at: datetime | None = attrs.field(default=None, init=False)
    """The latest ``ask_again_at`` of the unknown refunds."""
    began: float = attrs.field(factory=perf_counter, init=False)

    def add(self, line: Line, outcome: Outcome) -> None:
        """Count one more refund."""
        word, error = exit_outcome(outcome), outcome.error
        self.refunds[word] += 1
        self.yuan[word] += cast("int", outcome.request.money_refund)  # a Counter can sum Decimals
        self.attempts += outcome.attempts
        self.queries += outcome.queries
        if isinstance(error, errors.RefundOutcomeUnknown):
            self.ask_again_at = max(self.ask_again_at or error.ask_again_at, error.ask_again_at)
        if word is not MADE:
            reason = _reason_of(outcome)
            self.reasons[reason] += 1
            if self.reasons[reason] <= _KEPT:
                self.not_made[reason].append(line)

    def check_complete(self) -> None:
        """Raise ``LianLianError`` if the batch ended without an error, but refunds have no outcome."""
        if self.to_do:
            raise errors.LianLianError(f"the batch ended with {self.to_do:,} refunds to do; run the same command again")

    @property
    def ended(self) -> int:
        """Refunds that have an outcome."""
        return self.refunds.total()

    @property
    def to_do(self) -> int:
        """Refunds that have no outcome yet."""
        return self.total - self.ended

    def status(self, held: int) -> Text:
        """Return the progress as one line; ``held``: unknown refunds that are kept for the end."""
        counts = self.refunds + Counter({UNKNOWN: held})
        text = Text("  ").join(
            Text(f"{counts[each]:,} {each.word}", _STYLES[each] if counts[each] else "")
            for each in dict.fromkeys((MADE, REJECTED, UNKNOWN, *counts))
        )
        return text.append(f"  {self.to_do - held:,} to do")

    def outcomes(self) -> list[tuple[str, int, Decimal]]:
        """Return word, refunds and yuan of made, rejected, unknown and each other outcome that occurred."""
        each = dict.fromkeys((MADE, REJECTED, UNKNOWN, *self.refunds))
        return [(outcome.word, self.refunds[outcome], Decimal(self.yuan[outcome])) for outcome in each]

    def exit_outcome(self) -> ExitOutcome:
        """Return the most severe outcome that occurred: unknown, rejected, failed, any other, and made at last."""
        others = (each for each in self.refunds if each != MADE)
        return next((each for each in (UNKNOWN, REJECTED, FAILED, *others) if self.refunds[each]), MADE)


def file_facts(checked: Checked, in_journal: InJournal | None) -> dict[str, Any]:
    """Return the totals of a file, and the numbers of its refunds by their state in the journal."""
    totals = checked.totals
    facts = {"refunds": totals.refunds, "yuan": totals.yuan, "invalid lines": checked.problems.count or None}
    if in_journal is not None:
        facts |= {**in_journal.found, "yuan of new refunds": in_journal.new_yuan}
    if totals.refunds:
        facts["largest refund"] = f"{totals.largest_yuan:,.2f} yuan (line {totals.largest_line})"
        facts["orders with several refunds"] = totals.orders_with_several
    return facts


def show_checked(
    output: Output, checked: Checked, outcome: str, in_journal: InJournal | None = None, **facts: int | str
) -> None:
    """Show the totals of a file whose refunds were not sent, what the journal knows, and ``facts`` as further rows."""
    document = _document(outcome, checked) | facts
    if in_journal is not None:
        document |= {"found": in_journal.found, "new_yuan": f"{in_journal.new_yuan:.2f}"}
    output.show(document, *tables({outcome: file_facts(checked, in_journal) | facts}))


def show_batch(
    output: Output,
    checked: Checked,
    totals: Totals,
    in_journal: InJournal,
    outcome: ExitOutcome,
    *,
    failure: errors.LianLianError | None,
    places: Mapping[str, str],
) -> None:
    """Show the results of a batch; ``places``: the names of its journal and of its ``--out`` file."""
    outcomes = totals.outcomes()
    reasons = totals.reasons.most_common()
    to_do_yuan = checked.totals.yuan - sum(yuan for _, _, yuan in outcomes)
    seconds = round(perf_counter() - totals.began, 1)
    facts = {"seconds": seconds, "attempts": totals.attempts, "queries": totals.queries}
    document = _document(outcome.word, checked) | {
        "outcomes": {word: {"refunds": number, "yuan": f"{yuan:.2f}"} for word, number, yuan in outcomes},
        "to_do": {"refunds": totals.to_do, "yuan": f"{to_do_yuan:.2f}"},
        "not_made": [
            {
                "outcome": reason.outcome.word,
                "ret_code": reason.ret_code,
                "reason": reason.reason,
                "what_to_do": reason.advice,
                "refunds": refunds,
                "lines": [
                    _listed(line) | {"yuan": f"{line.request.money_refund:.2f}"} for line in totals.not_made[reason]
                ],
            }
            for reason, refunds in reasons
        ],
        "found": in_journal.found,
        **facts,
        **places,
        "ask_again_at": totals.ask_again_at and totals.ask_again_at.isoformat(),
        **(error_document(failure) | {"outcome": outcome.word} if failure else {}),
    }
    to_do = [("to do", totals.to_do, to_do_yuan)] if totals.to_do else []
    title = f"{totals.refunds[MADE]:,} of {totals.total:,} refunds made"
    output.show(
        document,
        table(title, ("outcome", "refunds", "yuan"), [*outcomes, *to_do]),
        *tables({"run": {**facts, "invalid_lines": checked.problems.count or None, **places}}),
        *chain.from_iterable(
            _not_made(reason, refunds, totals.not_made[reason], places.get("results")) for reason, refunds in reasons
        ),
    )
    if failure and not output.as_json:
        output.failure(failure)
    if totals.ask_again_at:
        moment = local_time(totals.ask_again_at)
        output.note(f"to resolve the unknown refunds, run the same command again after {moment}")


def _listed(line: Line) -> dict[str, object]:
    request = line.request
    order = request.no_order or request.oid_paybill
    return {"line": line.line, "no_refund": request.no_refund, "order": order, "yuan": request.money_refund}


def _not_made(reason: Reason, refunds: int, lines: Sequence[Line], results: str | None) -> Iterator[RenderableType]:
    yield ""
    yield Text(printable(f"{refunds:,} {reason.outcome.word}: {reason.reason}"), _STYLES[reason.outcome])
    listed = [_listed(line) for line in lines]
    yield table("", listed[0], (each.values() for each in listed))
    if more := refunds - len(lines):
        yield f"… and {more:,} more: {results or 'use --out to list all'}"
    yield Text(f"what to do: {reason.advice}")


def _document(outcome: str, checked: Checked) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "refunds": checked.totals.refunds,
        "yuan": f"{checked.totals.yuan:.2f}",
        "invalid": checked.problems.count,
        "problems": [{"line": line, "problem": text} for line, text in checked.problems.lines],
        "remarks": [{"line": line, "remark": text} for line, text in checked.remarks.lines],
    }
