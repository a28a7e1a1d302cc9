"""What became of one request, and what traffic it caused, as values: for batches, which raise for no single refund."""

from __future__ import annotations

import re
from typing import Final

import attrs

from .codes import explain
from .errors import (
    AnswerMismatch,
    GatewayUnavailable,
    LianLianError,
    MalformedMessage,
    QueryRejected,
    RefundNotFound,
    RefundNotSent,
    RefundRejected,
    SignatureInvalid,
)
from .models import Refund, RefundRequest

__all__ = ["Outcome", "Traffic", "unknown_reason"]


_TIMED_OUT: Final = re.compile(r"no answer within|the deadline is over|\w*Timeout")


@attrs.define
class Traffic:
    """How much traffic one refund has caused so far."""

    attempts: int = 0
    """Sends, those that certainly did not arrive included."""
    queries: int = 0
    """Queries."""


@attrs.frozen(kw_only=True)
class Outcome:
    """One request and what became of it: a ``refund`` or an ``error``, never both, never neither.

    Where a batch asked once more about what was unknown, the figures are those of both calls together.
    """

    request: RefundRequest
    """What was given, also where it is no request: ``error`` is ``InvalidRequest`` then."""
    refund: Refund | None
    error: LianLianError | None
    attempts: int
    """Sends; 0 where the journal knew the answer."""
    queries: int
    """Queries."""
    seconds: float
    """From the beginning of the call, its wait for a connection slot included, to its end."""


def unknown_reason(apply_error: LianLianError | None, query_error: LianLianError | None) -> str:
    """Return why a refund is unknown, in few words without details, so that refunds can be counted by it.

    Whatever the query met counts; where that was only "no such record", also what the apply call met before. A wrong
    signature counts before all else, as every further answer would have one.
    """
    if isinstance(apply_error, SignatureInvalid):
        return _reason(apply_error)
    if isinstance(query_error, RefundNotFound) and apply_error is not None:
        return f"{_reason(apply_error)}; not found yet"
    error = query_error or apply_error
    return "no answer yet" if error is None else _reason(error)


def _reason(error: LianLianError) -> str:
    match error:
        case SignatureInvalid():
            return "signature invalid"
        case AnswerMismatch():
            return "answer to another query"
        case MalformedMessage():
            return str(error) if str(error).startswith("HTTP status") else "unreadable answer"
        case RefundNotFound():
            return "not found yet"
        case RefundRejected() | QueryRejected():
            return f"{error.ret_code} {error.meaning}"
        case GatewayUnavailable(ret_code=str(code)):
            return f"{code} {explain(code).meaning}"
        case GatewayUnavailable() | RefundNotSent():
            return _lost(error.last_error)
    return str(error)


def _lost(reason: str) -> str:
    if _TIMED_OUT.match(reason):
        return "no answer in time"
    kind = reason.partition(":")[0]
    return f"connection lost ({kind})" if kind.isidentifier() else kind
