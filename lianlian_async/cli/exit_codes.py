"""How a command can end: one word and one exit code for each outcome, and an error's facts for JSON."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from lianlian_async.errors import (
    AnswerMismatch,
    BatchStopped,
    ConfigurationError,
    GatewayUnavailable,
    InvalidRequest,
    JournalError,
    LianLianError,
    MalformedMessage,
    QueryRejected,
    RefundConflict,
    RefundNotFinal,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    SignatureInvalid,
)
from lianlian_async.models import Refund, RefundStatus

__all__ = [
    "EXIT_OUTCOMES",
    "FAILED",
    "INTERRUPTED",
    "MADE",
    "NOT_SENT",
    "REJECTED",
    "SIGNATURE_INVALID",
    "UNKNOWN",
    "ExitOutcome",
    "error_document",
    "exit_outcome_of",
    "exit_outcome_of_refund",
]


class ExitOutcome(NamedTuple):
    """What it is called, and the code to exit with."""

    word: str
    exit_code: int


MADE: Final = ExitOutcome("made", 0)
NOT_SENT: Final = ExitOutcome("not sent", 1)
REJECTED: Final = ExitOutcome("rejected", 3)
FAILED: Final = ExitOutcome("failed", 3)
UNKNOWN: Final = ExitOutcome("unknown", 4)
SIGNATURE_INVALID: Final = ExitOutcome("signature invalid", 5)
INTERRUPTED: Final = ExitOutcome("interrupted", 130)

EXIT_OUTCOMES: Final[dict[type[LianLianError], ExitOutcome]] = {
    LianLianError: ExitOutcome("error", 1),
    ConfigurationError: ExitOutcome("configuration error", 2),
    InvalidRequest: ExitOutcome("invalid request", 2),
    RefundNotSent: NOT_SENT,
    RefundRejected: REJECTED,
    RefundNotFound: ExitOutcome("not found", 1),
    RefundNotFinal: ExitOutcome("not final", 1),
    QueryRejected: ExitOutcome("query rejected", 1),
    RefundOutcomeUnknown: UNKNOWN,
    GatewayUnavailable: ExitOutcome("unavailable", 1),
    RefundConflict: ExitOutcome("conflict", 1),
    SignatureInvalid: SIGNATURE_INVALID,
    AnswerMismatch: ExitOutcome("answer mismatch", 1),
    MalformedMessage: ExitOutcome("malformed message", 1),
    JournalError: ExitOutcome("journal error", 1),
    BatchStopped: ExitOutcome("batch stopped", 3),
}


def exit_outcome_of(error: LianLianError) -> ExitOutcome:
    """How a command ends on an error; a subclass without a row of its own has its parent's."""
    ending = next(EXIT_OUTCOMES[cls] for cls in type(error).__mro__ if cls in EXIT_OUTCOMES)
    if isinstance(error, BatchStopped) and isinstance(error.cause, SignatureInvalid):
        return ending._replace(exit_code=SIGNATURE_INVALID.exit_code)
    return ending


def exit_outcome_of_refund(refund: Refund) -> ExitOutcome:
    """Made, as long as the gateway does not say that it failed."""
    return FAILED if refund.sta_refund is RefundStatus.FAILED else MADE


def error_document(error: LianLianError) -> dict[str, Any]:
    """An error as one JSON object: its outcome, and every plain fact that it carries."""
    facts: dict[str, Any] = {name: value for name, value in vars(error).items() if isinstance(value, str | int | None)}
    if isinstance(error, InvalidRequest):
        facts["problems"] = [problem._asdict() for problem in error.problems]
    if isinstance(error, RefundOutcomeUnknown):
        facts |= {"request": error.request.to_dict(), "query": error.query().to_dict()}
        facts |= {"sent_at": error.sent_at.isoformat(), "ask_again_at": error.ask_again_at.isoformat()}
    return {
        "outcome": exit_outcome_of(error).word,
        "error": {"type": type(error).__name__, "message": str(error), **facts},
    }
