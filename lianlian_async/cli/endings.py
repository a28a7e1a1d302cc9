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
    "ENDINGS",
    "FAILED",
    "INTERRUPTED",
    "MADE",
    "NOT_SENT",
    "REJECTED",
    "SIGNATURE_INVALID",
    "UNKNOWN",
    "Ending",
    "ending_of",
    "error_document",
    "refund_ending",
]


class Ending(NamedTuple):
    """What it is called, and the code to exit with."""

    word: str
    exit_code: int


MADE: Final = Ending("made", 0)
NOT_SENT: Final = Ending("not sent", 1)
REJECTED: Final = Ending("rejected", 3)
FAILED: Final = Ending("failed", 3)
UNKNOWN: Final = Ending("unknown", 4)
SIGNATURE_INVALID: Final = Ending("signature invalid", 5)
INTERRUPTED: Final = Ending("interrupted", 130)

ENDINGS: Final[dict[type[LianLianError], Ending]] = {
    LianLianError: Ending("error", 1),
    ConfigurationError: Ending("configuration error", 2),
    InvalidRequest: Ending("invalid request", 2),
    RefundNotSent: NOT_SENT,
    RefundRejected: REJECTED,
    RefundNotFound: Ending("not found", 1),
    RefundNotFinal: Ending("not final", 1),
    QueryRejected: Ending("query rejected", 1),
    RefundOutcomeUnknown: UNKNOWN,
    GatewayUnavailable: Ending("unavailable", 1),
    RefundConflict: Ending("conflict", 1),
    SignatureInvalid: SIGNATURE_INVALID,
    AnswerMismatch: Ending("answer mismatch", 1),
    MalformedMessage: Ending("malformed message", 1),
    JournalError: Ending("journal error", 1),
    BatchStopped: Ending("batch stopped", 3),
}


def ending_of(error: LianLianError) -> Ending:
    """How a command ends on an error; a subclass without a row of its own has its parent's."""
    ending = next(ENDINGS[cls] for cls in type(error).__mro__ if cls in ENDINGS)
    if isinstance(error, BatchStopped) and isinstance(error.cause, SignatureInvalid):
        return ending._replace(exit_code=SIGNATURE_INVALID.exit_code)
    return ending


def refund_ending(refund: Refund) -> Ending:
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
        "outcome": ending_of(error).word,
        "error": {"type": type(error).__name__, "message": str(error), **facts},
    }
