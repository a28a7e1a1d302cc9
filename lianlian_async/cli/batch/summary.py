"""What ``lianlian batch`` says at its end: for people as tables, for programs as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lianlian_async.cli.exit_codes import MADE, ExitOutcome, error_document
from lianlian_async.cli.output import Output, table
from lianlian_async.errors import LianLianError

from .checked import Checked, Survey
from .results import Totals

__all__ = ["show_batch", "show_checked", "tell_findings"]


def tell_findings(output: Output, checked: Checked) -> None:
    """What was noticed about lines, on stderr."""
    for text in (*checked.problems.texts(), *checked.remarks.texts()):
        output.note(text)


def show_checked(output: Output, checked: Checked, outcome: str, known: Survey | None = None, **facts: int) -> None:
    """What a file holds, if nothing of it is sent, and what the journal knows of it."""
    document = _document(outcome, checked) | facts
    if known is not None:
        document |= {"journal": known.name, "found": known.counts()}
        facts |= known.counts()
        for text in known.notes(query_first=False)[1:]:
            output.note(text)
    rows = [("refunds", f"{checked.count:,}"), ("yuan", f"{checked.yuan:,.2f}")]
    rows += [("invalid lines", f"{checked.problems.count:,}")] if checked.problems.count else []
    rows += [(name, f"{fact:,}") for name, fact in facts.items()]
    rows += [] if known is None else [("journal", known.name)]
    output.show(document, table(outcome, ("what", "how much"), rows))


def show_batch(
    output: Output,
    checked: Checked,
    tally: Totals,
    known: Survey,
    *,
    ending: ExitOutcome,
    failure: LianLianError | None,
    places: Mapping[str, str],
) -> None:
    """What became of the refunds."""
    to_do, outcomes = tally.total - tally.ended, tally.outcomes()
    to_do_yuan = checked.yuan - sum(yuan for _, _, yuan in outcomes)
    facts = {
        "seconds": round(tally.seconds, 1),
        "refunds_per_second": round(tally.rate, 1),
        "attempts": tally.attempts,
        "queries": tally.queries,
        "known_from_journal": tally.recorded,
    }
    document = _document(ending.word, checked) | {
        "outcomes": {word: {"refunds": number, "yuan": f"{yuan:.2f}"} for word, number, yuan in outcomes},
        "to_do": {"refunds": to_do, "yuan": f"{to_do_yuan:.2f}"},
        "refusals": [{"ret_code": code, "refunds": number} for (code, _), number in tally.refusals.most_common()],
        "unknown": [{"reason": reason, "refunds": number} for reason, number in tally.reasons.most_common()],
        "found": known.counts(),
        **facts,
        **places,
        "ask_again_at": tally.ask_again_at and tally.ask_again_at.isoformat(),
        **(error_document(failure) | {"outcome": ending.word} if failure else {}),
    }
    rows = [(word, f"{number:,}", f"{yuan:,.2f}") for word, number, yuan in outcomes]
    rows += [("to do", f"{to_do:,}", f"{to_do_yuan:,.2f}")] if to_do else []
    shown = [table(f"{tally.refunds[MADE]:,} of {tally.total:,} refunds made", ("outcome", "refunds", "yuan"), rows)]
    if tally.refusals:
        refusals = [(code, f"{number:,}", meaning) for (code, meaning), number in tally.refusals.most_common()]
        shown.append(table("what was rejected", ("ret_code", "refunds", "meaning"), refusals))
    if tally.reasons:
        reasons = [(reason, f"{number:,}") for reason, number in tally.reasons.most_common()]
        shown.append(table("why the outcome is unknown", ("reason", "refunds"), reasons))
    measures = [(name.replace("_", " "), fact) for name, fact in (facts | dict(places)).items()]
    output.show(document, *shown, table("how it went", ("measure", "value"), measures))
    if failure and not output.as_json:
        output.failure(failure)
    if tally.ask_again_at:
        moment = tally.ask_again_at.astimezone().isoformat(sep=" ", timespec="seconds")
        output.note(f"what is unknown can be asked about again from {moment} on: run the same command again then")


def _document(outcome: str, checked: Checked) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "refunds": checked.count,
        "yuan": f"{checked.yuan:.2f}",
        "invalid": checked.problems.count,
        "problems": [{"line": line, "problem": text} for line, text in checked.problems.lines],
        "remarks": [{"line": line, "remark": text} for line, text in checked.remarks.lines],
    }
