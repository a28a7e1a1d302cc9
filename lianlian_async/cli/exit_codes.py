"""The outcomes of a command, each with a word and an exit code; errors as JSON."""

from typing import Any, Final, NamedTuple

from lianlian_async import errors
from lianlian_async.models import RefundRecord, RefundStatus


class ExitOutcome(NamedTuple):
    """The word for an outcome, and its exit code."""

    word: str
    exit_code: int


MADE: Final = ExitOutcome("made", 0)
NOT_SENT: Final = ExitOutcome("not sent", 1)
REJECTED: Final = ExitOutcome("rejected", 3)
FAILED: Final = ExitOutcome("failed", 3)
INVALID: Final = ExitOutcome("invalid", 3)
UNKNOWN: Final = ExitOutcome("unknown", 4)
SIGNATURE_INVALID: Final = ExitOutcome("signature invalid", 5)
INTERRUPTED: Final = ExitOutcome("interrupted", 130)

EXIT_OUTCOMES: Final[dict[type[errors.LianLianError], ExitOutcome]] = {
    errors.LianLianError: ExitOutcome("error", 1),
    errors.ConfigurationError: ExitOutcome("configuration error", 2),
    errors.InvalidRequest: ExitOutcome("invalid request", 2),
    errors.RefundNotSent: NOT_SENT,
    errors.RefundRejected: REJECTED,
    errors.RefundNotFound: ExitOutcome("not found", 1),
    errors.RefundNotFinal: ExitOutcome("not final", 1),
    errors.QueryRejected: ExitOutcome("query rejected", 1),
    errors.RefundOutcomeUnknown: UNKNOWN,
    errors.GatewayUnavailable: ExitOutcome("unavailable", 1),
    errors.RefundConflict: ExitOutcome("conflict", 1),
    errors.SignatureInvalid: SIGNATURE_INVALID,
    errors.AnswerMismatch: ExitOutcome("answer mismatch", 1),
    errors.MalformedMessage: ExitOutcome("malformed message", 1),
    errors.JournalError: ExitOutcome("journal error", 1),
    errors.BatchStopped: ExitOutcome("batch stopped", 3),
}


def exit_outcome_of(found: RefundRecord | errors.LianLianError) -> ExitOutcome:
    """Return the outcome for a refund or an error; an error class without an entry has its parent's outcome."""
    if isinstance(found, RefundRecord):
        return FAILED if found.sta_refund is RefundStatus.FAILED else MADE
    outcome = next(EXIT_OUTCOMES[cls] for cls in type(found).__mro__ if cls in EXIT_OUTCOMES)
    if isinstance(found, errors.BatchStopped) and isinstance(found.cause, errors.SignatureInvalid):
        return outcome._replace(exit_code=SIGNATURE_INVALID.exit_code)
    return outcome


def error_document(error: errors.LianLianError) -> dict[str, Any]:
    """Return an error as one JSON object: its outcome, type, message and attributes (str, int or None)."""
    facts: dict[str, Any] = {name: value for name, value in vars(error).items() if isinstance(value, str | int | None)}
    if isinstance(error, errors.InvalidRequest):
        facts["problems"] = [problem._asdict() for problem in error.problems]
    if isinstance(error, errors.RefundOutcomeUnknown):
        facts |= {"request": error.request.to_dict(), "query": error.query().to_dict()}
        facts |= {"sent_at": error.sent_at.isoformat(), "ask_again_at": error.ask_again_at.isoformat()}
    return {
        "outcome": exit_outcome_of(error).word,
        "error": {"type": type(error).__name__, "message": str(error), **facts},
    }
