"""LianLian Pay refunds for asyncio and trio: was this refund made? Never twice, never lost, never guessed.

The ideas:

1. ``no_refund``, ``dt_refund`` and ``money_refund`` together identify a refund. They are chosen before the first send.
2. A failed exchange was *not sent*, *maybe sent* or *answered*. Only *not sent* may be repeated without a query.
3. After *maybe sent* the library queries the refund. If the outcome stays unknown, it raises ``RefundOutcomeUnknown``.
4. Decision modules do no I/O and use no clock and no randomness. Modules that wait contain little logic.
5. Signing, file access and database access never run on the event loop.
6. Safety depends on elapsed time: the boot clock measures it, and a lease is checked right before a request is written.
7. A task that others wait for releases its waiters, however it ends.

The modules, from the lowest layer up; a layer imports nothing from a higher one (import-linter checks this):

- ``codes``, ``errors``: the return codes and the error tree. ``clock``: timestamps, and the time between them.
  ``asgi``, ``background``, ``lifecycle``, ``secret``, ``settings``, ``version``: small helpers.
- ``wire``, ``text_rules``, ``signing``, ``key_files``: wire formats, rules for strings, signatures, key material.
  ``events``: what listeners are told.
- ``identity``: compares a record with a request. ``models``: requests and refunds. ``retry``: when to retry.
  ``logs``: tells listeners, and writes the log. ``merchant``: the merchant and its keys.
- ``exchange``, ``outcome``: value types of one exchange and of a refund's outcome. ``unknown_form``: an unknown outcome
  as JSON. ``protocol``: the protocol without I/O. ``transport``: HTTP (``sender``, ``pool``,
  ``connection``); only this package imports httpx and aiohttp's client.
- ``middleware``: the layers around one exchange. ``journal``: records every refund and its outcome (memory, SQLite,
  PostgreSQL).
- ``resolution``: the decision table that finds the outcome of a refund. ``rsa_worker``: signs in a thread.
  ``signature_watch``: detects a wrong key early. ``worker_pool``: processes many items with few workers.
- ``gateway_client``: sends exchanges for an open session. ``recording``: one recorded refund. ``flight``:
  concurrent calls share one refund. ``waiters``: waits for a final status. ``recovery``: resolves all open refunds.
  ``reconcile``: compares LianLian's statements with a journal.
- ``session``, ``batch``, ``notifications``: the public objects. ``contrib``: FastAPI, aiohttp, HTTP error responses
  (``web``), OpenTelemetry, and a procrastinate queue whose jobs carry many refunds. ``sandbox``: a fake gateway.
  ``testing``: a pytest plugin. ``cli``: the command.

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
from .version import __version__

if typing.TYPE_CHECKING:
    from .batch import refund_many
    from .merchant import Endpoints, Merchant
    from .models import Refund, RefundQuery, RefundRecord, RefundRequest, RefundStatus
    from .notifications import NotificationEndpoint
    from .outcome import Outcome
    from .retry import RetryBudget, RetryPolicy
    from .session import RefundSession
    from .signing import SigningKey, VerifyingKey

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
    "RefundRecord",
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
    "RefundRecord": "models",
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
