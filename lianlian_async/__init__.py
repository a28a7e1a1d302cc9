"""LianLian Pay refunds for asyncio and trio: *was this refund made?* Never twice, never lost, never guessed."""

from .batch import refund_many
from .errors import (
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
from .merchant import Endpoints, Merchant
from .models import Refund, RefundQuery, RefundRequest, RefundStatus
from .notifications import NotificationEndpoint
from .outcome import Outcome
from .retry import RetryBudget, RetryPolicy
from .session import RefundSession
from .signing import SigningKey, VerifyingKey

__version__ = "0.1.0"

__all__ = [
    "AnswerMismatch",
    "BatchStopped",
    "ConfigurationError",
    "Endpoints",
    "GatewayUnavailable",
    "InvalidRequest",
    "JournalError",
    "LianLianError",
    "MalformedMessage",
    "Merchant",
    "NotificationEndpoint",
    "Outcome",
    "QueryRejected",
    "Refund",
    "RefundConflict",
    "RefundNotFinal",
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
    "refund_many",
]
