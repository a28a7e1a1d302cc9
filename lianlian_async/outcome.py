"""The outcome of one refund as a value, and the reason why an outcome is unknown."""

import re
from typing import Final

import attrs

from . import errors
from .codes import explain
from .models import Refund, RefundRequest

_TIMED_OUT: Final = re.compile(r"no answer within|nothing could be sent|the deadline is over|\w*Timeout")


@attrs.define
class Traffic:
    """The number of HTTP requests about one refund in one call."""

    attempts: int = 0
    """The number of apply requests, including those that certainly did not arrive."""
    queries: int = 0


@attrs.frozen(kw_only=True)
class Outcome:
    """One request with its ``refund`` or its ``error``: exactly one of the two is set.

    If a batch resolved an unknown refund in a second call, the numbers include both calls.
    """

    request: RefundRequest
    """The given object. If it is not a ``RefundRequest``, ``error`` is ``InvalidRequest``."""
    refund: Refund | None
    error: errors.LianLianError | None
    attempts: int
    """The number of apply requests; 0 if the outcome was recorded, or if a concurrent call sent the requests."""
    queries: int
    seconds: float
    """The duration of the call, including its wait for a connection slot."""


def unknown_reason(apply_error: errors.LianLianError | None, query_error: errors.LianLianError | None) -> str:
    """Return the reason why a refund is unknown, without details of that refund, so that reasons can be counted.

    The reason is the query's error; without a query, the apply call's error; after "no such record", both. An invalid
    signature of the apply answer takes precedence, because its cause may affect every refund.
    """
    if isinstance(apply_error, errors.SignatureInvalid):
        return _reason(apply_error)
    if isinstance(query_error, errors.RefundNotFound) and apply_error is not None:
        return f"{_reason(apply_error)}; not found yet"
    error = query_error or apply_error
    return "no answer yet" if error is None else _reason(error)


def _reason(error: errors.LianLianError) -> str:
    match error:
        case errors.SignatureInvalid():
            return "signature invalid"
        case errors.AnswerMismatch():
            return "message for another request"
        case errors.MalformedMessage():
            return str(error) if str(error).startswith("HTTP status") else "unreadable answer"
        case errors.RefundNotFound():
            return "not found yet"
        case errors.RefundRejected() | errors.QueryRejected():
            return f"{error.ret_code} {error.meaning}"
        case errors.GatewayUnavailable(ret_code=str(code)):
            return f"{code} {explain(code).meaning}"
        case errors.GatewayUnavailable() | errors.RefundNotSent():
            if _TIMED_OUT.match(error.last_error):
                return "no answer in time"
            kind = error.last_error.partition(":")[0]
            return f"network error ({kind})" if kind.isidentifier() else kind
    return str(error).partition(":")[0]
