"""The output of ``lianlian batch``: tables, or one JSON object with ``--json``."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lianlian_async.cli.exit_codes import MADE, ExitOutcome, error_document
from lianlian_async.cli.output import Output, local_time, printable, table, tables
from lianlian_async.errors import LianLianError

from .checked import Checked, FileTotals, InJournal
from .results import NotMade, Reason, Totals, style


def file_facts(checked: Checked, totals: FileTotals, in_journal: InJournal | None) -> dict[str, Any]:
    """Return the totals of a file, and the numbers of its refunds by their state in the journal."""
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
    totals = checked.totals()
    document = _document(outcome, checked, totals) | facts
    if in_journal is not None:
        document |= {"found": in_journal.found, "new_yuan": f"{in_journal.new_yuan:.2f}"}
    output.show(document, *tables({outcome: file_facts(checked, totals, in_journal) | facts}))


def show_batch(
    output: Output,
    checked: Checked,
    totals: Totals,
    in_journal: InJournal,
    *,
    outcome: ExitOutcome,
    failure: LianLianError | None,
    places: Mapping[str, str],
) -> None:
    """Show the results of a batch; ``places``: the names of its journal and of its ``--out`` file."""
    outcomes = totals.outcomes()
    reasons = totals.reasons.most_common()
    in_file = checked.totals()
    to_do_yuan = in_file.yuan - sum(yuan for _, _, yuan in outcomes)
    facts = {
        **totals.speed(),
        "attempts": totals.attempts,
        "queries": totals.queries,
        "known_from_journal": totals.recorded,
    }
    document = _document(outcome.word, checked, in_file) | {
        "outcomes": {word: {"refunds": number, "yuan": f"{yuan:.2f}"} for word, number, yuan in outcomes},
        "to_do": {"refunds": totals.to_do, "yuan": f"{to_do_yuan:.2f}"},
        "not_made": [
            {
                "outcome": reason.outcome.word,
                "ret_code": reason.ret_code,
                "reason": reason.reason,
                "what_to_do": reason.advice,
                "refunds": refunds,
                "lines": [line._asdict() | {"yuan": f"{line.yuan:.2f}"} for line in totals.not_made[reason]],
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
        output.note(f"unknown refunds can be resolved from {moment} on: run the same command again after that")


def _not_made(reason: Reason, refunds: int, lines: Sequence[NotMade], results: str | None) -> Iterator[RenderableType]:
    """Yield a reason, a table of its first refunds, the number of others, and what to do."""
    yield ""
    yield Text(printable(f"{refunds:,} {reason.outcome.word}: {reason.reason}"), style(reason.outcome))
    yield table("", NotMade._fields, lines)
    if more := refunds - len(lines):
        yield f"… and {more:,} more: {results or 'use --out to list all'}"
    yield f"what to do: {reason.advice}"


def _document(outcome: str, checked: Checked, totals: FileTotals) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "refunds": totals.refunds,
        "yuan": f"{totals.yuan:.2f}",
        "invalid": checked.problems.count,
        "problems": [{"line": line, "problem": text} for line, text in checked.problems.lines],
        "remarks": [{"line": line, "remark": text} for line, text in checked.remarks.lines],
    }
