"""LianLian Pay refunds for asyncio and trio: *was this refund made?* Never twice, never lost, never guessed."""

from .errors import (
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
from .merchant import Endpoints, Merchant
from .models import Refund, RefundQuery, RefundRequest, RefundStatus
from .retry import RetryBudget, RetryPolicy
from .session import RefundSession
from .signing import SigningKey, VerifyingKey

__version__ = "0.1.0"

__all__ = [
    "AnswerMismatch",
    "ConfigurationError",
    "Endpoints",
    "GatewayUnavailable",
    "InvalidRequest",
    "LianLianError",
    "MalformedMessage",
    "Merchant",
    "QueryRejected",
    "Refund",
    "RefundConflict",
    "RefundNotFound",
    "RefundNotSent",
    "RefundOutcomeUnknown",
    "RefundQuery",
    "RefundRejected",
    "RefundRequest",
    "RefundSession",
    "RefundStatus",
    "RetryBudget",
    "RetryPolicy",
    "SignatureInvalid",
    "SigningKey",
    "VerifyingKey",
    "__version__",
]
