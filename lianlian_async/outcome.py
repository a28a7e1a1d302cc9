"""The result of one refund call as a value, and the reason why a refund is unknown."""

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

_TIMED_OUT: Final = re.compile(r"no answer within|the deadline is over|\w*Timeout")


@attrs.define
class Traffic:
    """The number of HTTP requests that one refund has needed so far."""

    attempts: int = 0
    """Apply requests, including those that certainly did not arrive."""
    queries: int = 0


@attrs.frozen(kw_only=True)
class Outcome:
    """One request with its ``refund`` or its ``error``: exactly one of them is set.

    If a batch queried an unknown refund again, the numbers include both calls.
    """

    request: RefundRequest
    """The given object. If it is not a ``RefundRequest``, ``error`` is ``InvalidRequest``."""
    refund: Refund | None
    error: LianLianError | None
    attempts: int
    """Apply requests; 0 if the journal had the outcome."""
    queries: int
    seconds: float
    """The duration of the call, including its wait for a connection slot."""


def unknown_reason(apply_error: LianLianError | None, query_error: LianLianError | None) -> str:
    """Return the reason why a refund is unknown, without details of that refund, so that reasons can be counted.

    It is the error of the query; after "no such record" also the error of the apply call. A wrong signature on the
    apply answer takes precedence, since it concerns every refund.
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
            if _TIMED_OUT.match(error.last_error):
                return "no answer in time"
            kind = error.last_error.partition(":")[0]
            return f"connection lost ({kind})" if kind.isidentifier() else kind
    return str(error)
