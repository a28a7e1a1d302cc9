"""The screens of ``lianlian batch``: tables for people, one JSON object for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lianlian_async.cli.exit_codes import MADE, ExitOutcome, error_document
from lianlian_async.cli.output import Output, local_time, table
from lianlian_async.errors import LianLianError

from .checked import Checked, Known
from .results import Totals


def show_checked(
    output: Output, checked: Checked, outcome: str, known: Known | None = None, **facts: int | str
) -> None:
    """Show the content of a file of which nothing is sent, and what the journal knows about it."""
    document = _document(outcome, checked) | facts
    rows = [("refunds", f"{checked.count:,}"), ("yuan", f"{checked.yuan:,.2f}")]
    rows += [("invalid lines", f"{checked.problems.count:,}")] if checked.problems.count else []
    if known is not None:
        document["found"] = known.counts()
        rows += [(name, f"{count:,}") for name, count in known.counts().items()]
    rows += [(name, f"{fact:,}" if isinstance(fact, int) else fact) for name, fact in facts.items()]
    output.show(document, table(outcome, ("", ""), rows))


def show_batch(
    output: Output,
    checked: Checked,
    totals: Totals,
    known: Known,
    *,
    outcome: ExitOutcome,
    failure: LianLianError | None,
    places: Mapping[str, str],
) -> None:
    """Show the results of a batch; ``places``: where journal and results are."""
    outcomes = totals.outcomes()
    to_do_yuan = checked.yuan - sum(yuan for _, _, yuan in outcomes)
    facts = {
        "seconds": round(totals.seconds, 1),
        "refunds_per_second": round(totals.rate, 1),
        "attempts": totals.attempts,
        "queries": totals.queries,
        "known_from_journal": totals.recorded,
    }
    document = _document(outcome.word, checked) | {
        "outcomes": {word: {"refunds": number, "yuan": f"{yuan:.2f}"} for word, number, yuan in outcomes},
        "to_do": {"refunds": totals.to_do, "yuan": f"{to_do_yuan:.2f}"},
        "rejections": [{"ret_code": code, "refunds": number} for (code, _), number in totals.rejections.most_common()],
        "unknown": [{"reason": reason, "refunds": number} for reason, number in totals.reasons.most_common()],
        "found": known.counts(),
        **facts,
        **places,
        "ask_again_at": totals.ask_again_at and totals.ask_again_at.isoformat(),
        **(error_document(failure) | {"outcome": outcome.word} if failure else {}),
    }
    rows = [(word, f"{number:,}", f"{yuan:,.2f}") for word, number, yuan in outcomes]
    rows += [("to do", f"{totals.to_do:,}", f"{to_do_yuan:,.2f}")] if totals.to_do else []
    title = f"{totals.refunds[MADE]:,} of {totals.total:,} refunds made"
    shown = [table(title, ("outcome", "refunds", "yuan"), rows)]
    if totals.rejections:
        rejections = [(code, f"{number:,}", meaning) for (code, meaning), number in totals.rejections.most_common()]
        shown.append(table("rejections", ("ret_code", "refunds", "meaning"), rejections))
    if totals.reasons:
        reasons = [(reason, f"{number:,}") for reason, number in totals.reasons.most_common()]
        shown.append(table("unknown outcomes", ("reason", "refunds"), reasons))
    measures = [(name.replace("_", " "), fact) for name, fact in (facts | dict(places)).items()]
    output.show(document, *shown, table("run", ("measure", "value"), measures))
    if failure and not output.as_json:
        output.failure(failure)
    if totals.ask_again_at:
        moment = local_time(totals.ask_again_at)
        output.note(f"unknown refunds can be resolved from {moment}: run the same command again then")


def _document(outcome: str, checked: Checked) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "refunds": checked.count,
        "yuan": f"{checked.yuan:.2f}",
        "invalid": checked.problems.count,
        "problems": [{"line": line, "problem": text} for line, text in checked.problems.lines],
        "remarks": [{"line": line, "remark": text} for line, text in checked.remarks.lines],
    }
