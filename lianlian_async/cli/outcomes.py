"""How a command can end: one word and one exit code for each outcome, and an error's facts for JSON."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from lianlian_async.errors import (
    AnswerMismatch,
    ConfigurationError,
    GatewayUnavailable,
    InvalidRequest,
    LianLianError,
    MalformedMessage,
    QueryRejected,
    RefundConflict,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    SignatureInvalid,
)
from lianlian_async.models import Refund, RefundStatus

__all__ = ["FAILED", "INTERRUPTED", "MADE", "OUTCOMES", "Outcome", "error_document", "outcome_of", "refund_outcome"]


class Outcome(NamedTuple):
    """What it is called, and the code to exit with."""

    word: str
    exit_code: int


MADE: Final = Outcome("made", 0)
FAILED: Final = Outcome("failed", 3)
INTERRUPTED: Final = Outcome("interrupted", 130)

OUTCOMES: Final[dict[type[LianLianError], Outcome]] = {
    LianLianError: Outcome("error", 1),
    ConfigurationError: Outcome("configuration error", 2),
    InvalidRequest: Outcome("invalid request", 2),
    RefundNotSent: Outcome("not sent", 1),
    RefundRejected: Outcome("rejected", 3),
    RefundNotFound: Outcome("not found", 1),
    QueryRejected: Outcome("query rejected", 1),
    RefundOutcomeUnknown: Outcome("unknown", 4),
    GatewayUnavailable: Outcome("unavailable", 1),
    RefundConflict: Outcome("conflict", 1),
    SignatureInvalid: Outcome("signature invalid", 5),
    AnswerMismatch: Outcome("answer mismatch", 1),
    MalformedMessage: Outcome("malformed message", 1),
}


def outcome_of(error: LianLianError) -> Outcome:
    """The outcome that an error stands for; a subclass without a row of its own has its parent's."""
    return next(OUTCOMES[cls] for cls in type(error).__mro__ if cls in OUTCOMES)


def refund_outcome(refund: Refund) -> Outcome:
    """Made, as long as the gateway does not say that it failed."""
    return FAILED if refund.sta_refund is RefundStatus.FAILED else MADE


def error_document(error: LianLianError) -> dict[str, Any]:
    """An error as one JSON object: its outcome, and every plain fact that it carries."""
    facts = {name: value for name, value in vars(error).items() if isinstance(value, str | int | None)}
    if isinstance(error, InvalidRequest):
        facts["problems"] = [problem._asdict() for problem in error.problems]
    if isinstance(error, RefundOutcomeUnknown):
        facts |= {"request": error.request.to_dict(), "query": error.query().to_dict()}
        facts |= {"sent_at": error.sent_at.isoformat(), "ask_again_at": error.ask_again_at.isoformat()}
    return {
        "outcome": outcome_of(error).word,
        "error": {"type": type(error).__name__, "message": str(error), **facts},
    }
