"""The result of one request in a batch, and why a refund is unknown, as values."""

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
    """How many requests one refund has caused so far."""

    attempts: int = 0
    """Sends, including those that certainly did not arrive."""
    queries: int = 0
    """Queries."""


@attrs.frozen(kw_only=True)
class Outcome:
    """One request with its ``refund`` or its ``error``: exactly one of them is set.

    If a batch resolved an unknown refund later, the figures are those of both calls together.
    """

    request: RefundRequest
    """The given object; if it is no ``RefundRequest``, ``error`` is ``InvalidRequest``."""
    refund: Refund | None
    error: LianLianError | None
    attempts: int
    """Sends; 0 if the journal knew the result."""
    queries: int
    """Queries."""
    seconds: float
    """The duration of the call, including its wait for a connection slot."""


def unknown_reason(apply_error: LianLianError | None, query_error: LianLianError | None) -> str:
    """Return why a refund is unknown, without details of one refund, so that refunds can be counted by it.

    The error of the query counts; after "no such record" also the error of the apply call. A wrong signature counts
    first, since every further answer would have one.
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
