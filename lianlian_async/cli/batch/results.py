"""The results of a batch: one line for each refund, and the totals."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from decimal import Decimal
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

_PRECEDENCE: Final = (UNKNOWN, REJECTED, FAILED)
"""The first of these that occurred gives a batch its exit code."""
_RECORDED: Final = ("ret_code", "ret_msg", "sta_refund", "oid_refundno")
RESULT: Final = ("no_refund", "outcome", *_RECORDED, "money_refund", "error", "attempts", "queries", "seconds")
"""The columns of a result line."""


def _exit_outcome(outcome: Outcome) -> ExitOutcome:
    if outcome.refund is not None:
        return exit_outcome_of_refund(outcome.refund)
    if isinstance(outcome.error, JournalError) and outcome.error.said is not None:
        return UNKNOWN  # it was sent, but the journal could not record the answer
    return exit_outcome_of(cast("LianLianError", outcome.error))  # an outcome has a refund or an error


def result_of(outcome: Outcome) -> dict[str, Any]:
    """Return the result line of one refund."""
    source = outcome.refund or outcome.error
    values = {
        **{name: getattr(source, name, None) for name in _RECORDED},
        "no_refund": outcome.request.no_refund,
        "outcome": _exit_outcome(outcome).word,
        "money_refund": wire.format_money(outcome.request.money_refund),
        "error": None if outcome.error is None else str(outcome.error),
        "attempts": outcome.attempts,
        "queries": outcome.queries,
        "seconds": round(outcome.seconds, 3),
    }
    return {name: values[name] for name in RESULT}


@attrs.define
class Totals:
    """The totals of a batch of ``total`` refunds so far."""

    total: int
    refunds: Counter[ExitOutcome] = attrs.field(factory=Counter, init=False)
    yuan: Counter[ExitOutcome] = attrs.field(factory=Counter, init=False)
    rejections: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    """Rejected refunds by ``ret_code`` and its meaning."""
    reasons: Counter[str] = attrs.field(factory=Counter, init=False)
    """Unknown refunds by reason."""
    recorded: int = attrs.field(default=0, init=False)
    """Refunds whose outcome was in the journal: no request was sent."""
    attempts: int = attrs.field(default=0, init=False)
    queries: int = attrs.field(default=0, init=False)
    ask_again_at: datetime | None = attrs.field(default=None, init=False)
    """When a query can resolve every unknown refund."""
    _began: float = attrs.field(factory=perf_counter, init=False)

    def add(self, outcome: Outcome) -> None:
        """Count one more refund."""
        exit_outcome, error = _exit_outcome(outcome), outcome.error
        self.refunds[exit_outcome] += 1
        self.yuan[exit_outcome] += cast("int", outcome.request.money_refund)  # a Counter can sum Decimals
        self.attempts += outcome.attempts
        self.queries += outcome.queries
        self.recorded += not (outcome.attempts or outcome.queries) and (
            outcome.refund is not None or isinstance(error, RefundRejected)
        )
        if isinstance(error, RefundRejected):
            self.rejections[error.ret_code, error.meaning] += 1
        elif exit_outcome == UNKNOWN and isinstance(error, JournalError):
            self.reasons["journal error after sending"] += 1
        elif isinstance(error, RefundOutcomeUnknown):
            self.reasons[error.reason] += 1
            self.ask_again_at = max(self.ask_again_at or error.ask_again_at, error.ask_again_at)

    def check_complete(self) -> None:
        """Raise ``LianLianError`` if refunds have no outcome although the batch came to its end."""
        if self.to_do:
            raise LianLianError(f"the batch ended with {self.to_do:,} refunds to do; run the same command again")

    @property
    def ended(self) -> int:
        """Refunds that have an outcome."""
        return self.refunds.total()

    @property
    def to_do(self) -> int:
        """Refunds that have no outcome yet."""
        return self.total - self.ended

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return perf_counter() - self._began

    @property
    def rate(self) -> float:
        """Refunds per second."""
        return self.ended / max(self.seconds, 1e-9)  # a coarse clock may show no progress

    def line(self) -> str:
        """Return the progress as one line of text."""
        words = [f"{self.refunds[each]:,} {each.word}" for each in (MADE, REJECTED, UNKNOWN)]
        return f"{self.rate:,.0f}/s  {'  '.join(words)}  {self.to_do:,} to do"

    def outcomes(self) -> list[tuple[str, int, Decimal]]:
        """Return word, refunds and yuan of each outcome that occurred; made, rejected and unknown always."""
        each = dict.fromkeys((MADE, REJECTED, UNKNOWN, *self.refunds))
        return [(outcome.word, self.refunds[outcome], Decimal(self.yuan[outcome])) for outcome in each]

    def exit_outcome(self) -> ExitOutcome:
        """Return the outcome of the whole batch: the most severe one that occurred."""
        complete = NOT_SENT if self.to_do else MADE
        other = next((each for each in self.refunds if each != MADE), complete)
        return next((each for each in _PRECEDENCE if self.refunds[each]), other)
