"""What became of a batch: sums per outcome, and a file with one line for each refund."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from time import perf_counter
from typing import Any, Final, cast

import attrs

from lianlian_async import wire
from lianlian_async.cli.exit_codes import (
    FAILED,
    MADE,
    NOT_SENT,
    REJECTED,
    UNKNOWN,
    ExitOutcome,
    exit_outcome_of,
    exit_outcome_of_refund,
)
from lianlian_async.errors import JournalError, LianLianError, RefundOutcomeUnknown, RefundRejected
from lianlian_async.outcome import Outcome

__all__ = ["RESULT", "Totals", "line_writer", "result_of"]

_GRAVITY: Final = (UNKNOWN, REJECTED, FAILED)
"""The first of these that occurred gives a batch its exit code."""
_RECORDED: Final = ("ret_code", "ret_msg", "sta_refund", "oid_refundno")
RESULT: Final = ("no_refund", "outcome", *_RECORDED, "money_refund", "error", "attempts", "queries", "seconds")
"""What a line of results holds."""


def _ending(outcome: Outcome) -> ExitOutcome:
    if outcome.refund is not None:
        return exit_outcome_of_refund(outcome.refund)
    if isinstance(outcome.error, JournalError) and outcome.error.said is not None:
        return UNKNOWN  # it was sent, and what the gateway said is not on record
    return exit_outcome_of(cast("LianLianError", outcome.error))  # there is always one of them


def result_of(outcome: Outcome) -> dict[str, Any]:
    """The line of one refund."""
    source = outcome.refund or outcome.error
    values = {
        **{name: getattr(source, name, None) for name in _RECORDED},
        "no_refund": outcome.request.no_refund,
        "outcome": _ending(outcome).word,
        "money_refund": wire.format_money(outcome.request.money_refund),
        "error": None if outcome.error is None else str(outcome.error),
        "attempts": outcome.attempts,
        "queries": outcome.queries,
        "seconds": round(outcome.seconds, 3),
    }
    return {name: values[name] for name in RESULT}


@contextmanager
def line_writer(path: Path, columns: Iterable[str]) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Replace ``path`` with one line for each call: CSV if its name ends so, else JSON Lines; in UTF-8."""
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            if path.suffix.lower() == ".csv":
                table = csv.DictWriter(file, list(columns), lineterminator="\n")
                table.writeheader()
                yield table.writerow
            else:
                yield lambda line: file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise LianLianError(f"{path}: {error.strerror}") from error


@attrs.define
class Totals:
    """How far a batch is."""

    total: int
    """Refunds that there are."""
    refunds: Counter[ExitOutcome] = attrs.field(factory=Counter, init=False)
    yuan: Counter[ExitOutcome] = attrs.field(factory=Counter, init=False)
    refusals: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    """How often each ret_code came, with its meaning."""
    reasons: Counter[str] = attrs.field(factory=Counter, init=False)
    """Why refunds are unknown."""
    recorded: int = attrs.field(default=0, init=False)
    """Refunds whose end the journal knew: no traffic."""
    attempts: int = attrs.field(default=0, init=False)
    queries: int = attrs.field(default=0, init=False)
    ask_again_at: datetime | None = attrs.field(default=None, init=False)
    """When all that is unknown can be asked about again."""
    _began: float = attrs.field(factory=perf_counter, init=False)

    def add(self, outcome: Outcome) -> None:
        """One more refund has ended."""
        ending, error = _ending(outcome), outcome.error
        self.refunds[ending] += 1
        self.yuan[ending] += cast("int", outcome.request.money_refund)  # a Counter adds whatever can be added
        self.attempts += outcome.attempts
        self.queries += outcome.queries
        self.recorded += not (outcome.attempts or outcome.queries) and (
            outcome.refund is not None or isinstance(error, RefundRejected)
        )
        if isinstance(error, RefundRejected):
            self.refusals[error.ret_code, error.meaning] += 1
        elif ending == UNKNOWN and isinstance(error, JournalError):
            self.reasons["journal error after sending"] += 1
        elif isinstance(error, RefundOutcomeUnknown):
            self.reasons[error.reason] += 1
            self.ask_again_at = max(self.ask_again_at or error.ask_again_at, error.ask_again_at)

    def check_complete(self) -> None:
        """Raise ``LianLianError`` if the batch has come to its end, and refunds are left that nobody has told of."""
        if self.ended != self.total:
            raise LianLianError(
                f"the batch ended with {self.total - self.ended:,} refunds to do; run the same command again"
            )

    @property
    def ended(self) -> int:
        """How many refunds have ended in one way or the other."""
        return self.refunds.total()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return perf_counter() - self._began

    @property
    def rate(self) -> float:
        """Refunds per second."""
        return self.ended / max(self.seconds, 1e-9)  # clocks can be coarse

    def line(self) -> str:
        """How things stand, for a terminal."""
        words = [f"{self.refunds[ending]:,} {ending.word}" for ending in (MADE, REJECTED, UNKNOWN)]
        return f"{self.rate:,.0f}/s  {'  '.join(words)}  {self.total - self.ended:,} to do"

    def outcomes(self) -> list[tuple[str, int, Decimal]]:
        """Refunds and yuan for each outcome; the usual ones always."""
        endings = dict.fromkeys((MADE, REJECTED, UNKNOWN, *self.refunds))
        return [(ending.word, self.refunds[ending], Decimal(self.yuan[ending])) for ending in endings]

    def ending(self) -> ExitOutcome:
        """How the whole is called: by the gravest of what occurred."""
        complete = NOT_SENT if self.ended < self.total else MADE
        other = next((ending for ending in self.refunds if ending != MADE), complete)
        return next((ending for ending in _GRAVITY if self.refunds[ending]), other)
