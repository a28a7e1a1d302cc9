"""LianLian Pay refunds for asyncio and trio: was this refund made? Never twice, never lost, never guessed.

The ideas:

1. ``no_refund``, ``dt_refund`` and ``money_refund`` together identify a refund. They are chosen before the first send.
2. A failed exchange was *not sent*, *maybe sent* or *answered*. Only the first may be repeated without a query.
3. After *maybe sent* the library queries. If it still cannot know, it raises ``RefundOutcomeUnknown``.
4. Decision modules do no I/O and use no clock and no randomness. Everything that waits is thin.
5. The event loop never signs, and never touches a file or a database.
6. Elapsed time is a safety argument: the boot clock measures it, and a lease is checked right before bytes leave.
7. Every task that others wait for ends its waiters, however it dies.

The modules, from the lowest floor up; a floor imports nothing from a higher one (import-linter checks it):

- ``codes``, ``errors``: the return codes and the error tree. ``clock``: moments, and the time between them.
  ``asgi``, ``background``, ``lifecycle``, ``secret``, ``settings``: small helpers.
- ``wire``, ``text_rules``, ``signing``, ``key_files``: values as text, rules for texts, signatures, key material.
- ``identity``: the one comparison of a record with a request. ``models``, ``retry``, ``merchant``: requests and
  refunds, when to retry, the merchant and its keys.
- ``exchange``, ``outcome``, ``protocol``: one exchange as values, the result of a refund, the gateway's messages
  without I/O. ``transport``: HTTP; the only importer of httpx and of aiohttp's client.
- ``middleware``: the layers around one exchange. ``journal``: which refunds were begun and how each ended (memory,
  SQLite, PostgreSQL).
- ``resolution``: the decision table, from the first send to certain knowledge. ``rsa_worker``, ``signature_watch``,
  ``worker_pool``: signatures in a thread, early notice of a wrong key, many items through few workers.
- ``gateway_client``, ``recording``, ``flight``, ``waiters``, ``recovery``: an open connection, one recorded refund, one
  refund in flight, waiting for a final status, all open refunds.
- ``session``, ``batch``, ``notifications``: the public objects. ``contrib``, ``sandbox``, ``cli``: integrations, a fake
  gateway, the command.

Where to start: follow one refund from ``session.RefundSession.apply_refund`` through ``flight.Flights``,
``resolution.resolve``, ``middleware`` and ``transport.sender`` to the socket, and back through ``Protocol.read``.
"""

import importlib
import typing

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

if typing.TYPE_CHECKING:
    from .batch import refund_many
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

_LAZY = {
    "Endpoints": "merchant",
    "Merchant": "merchant",
    "NotificationEndpoint": "notifications",
    "Outcome": "outcome",
    "Refund": "models",
    "RefundQuery": "models",
    "RefundRequest": "models",
    "RefundSession": "session",
    "RefundStatus": "models",
    "RetryBudget": "retry",
    "RetryPolicy": "retry",
    "SigningKey": "signing",
    "VerifyingKey": "signing",
    "refund_many": "batch",
}
"""The modules that are imported when one of their names is first used (PEP 562)."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
