"""LianLian Pay refunds for asyncio and trio: not made twice, not lost, not guessed (limits: README, "Guarantees").

The ideas:

1. ``no_refund``, ``dt_refund`` and ``money_refund`` together identify a refund. The caller chooses all three.
2. An HTTP exchange ends as *not sent*, *maybe sent* or *answered*. A call sends again without a query only after
   *not sent*.
3. After *maybe sent*, the call queries the refund. If the outcome stays unknown, it raises ``RefundOutcomeUnknown``.
4. The protocol and the retry policy do no I/O. Time and random numbers are their arguments.
5. Signing, file access and database access of a session or endpoint never block the event loop.
6. Safety depends on elapsed time. Within one boot the boot clock measures it, between machines PostgreSQL's clock. Only
   the holder of a refund's lease may send it. The lease is checked right before the write (exceptions: ``transport``).
7. When a background task ends, whatever the cause, no call waits for it any longer.

The modules, from the lowest layer up. No module imports from a higher layer; import-linter checks this. Only
``errors`` is an exception: it loads ``unknown_form`` when it is needed, and imports ``models`` for type checkers.

- ``codes``, ``errors``: the return codes and the error tree. ``clock``: timestamps, and the time between them.
  ``asgi``, ``background``, ``lifecycle``, ``secret``, ``settings``, ``version``: small helpers.
- ``wire``, ``text_rules``: wire formats, rules for strings. ``signing``: keys and signatures. ``key_files``: finds key
  text; ``signing`` decrypts it. ``events``: the events that listeners receive.
- ``identity``: compares a record with a request. ``models``: checked requests, and refunds. ``retry``: when to
  retry. ``logs``: delivers events to listeners and to the log. ``merchant``: the merchant's number, keys and endpoints.
- ``exchange``, ``outcome``: value types of one exchange and of a refund's outcome. ``unknown_form``: an unknown outcome
  as JSON. ``protocol``: requests, answers and notifications, and their signatures, without I/O. ``transport``: HTTP;
  only this package imports httpx, httpx2 and aiohttp's client (``sender``: one exchange; ``pool``: the connections;
  ``connection``: TLS, proxies, resets).
- ``middleware``: retries, limits and the user's functions around one exchange. ``journal``: records every refund and
  its outcome in memory, SQLite or PostgreSQL; ``journal.operations`` has the rules that all journals share.
- ``resolution``: finds the outcome of a refund: a decision table, and queries. ``rsa_worker``: signs in a thread.
  ``signature_watch``: detects a wrong key early. ``worker_pool``: processes many items with few workers.
- ``gateway_client``: sends exchanges for an open session. ``recording``: records one refund. ``flight``: lets
  concurrent calls share one refund. ``waiters``: waits for a final status. ``recovery``: resolves open refunds.
  ``reconcile``: compares LianLian's statements with a journal.
- ``session``, ``batch``: make refunds. ``notifications``: receives LianLian's notifications. ``sandbox``: a fake
  gateway (``rules``, ``ledger``, ``faults``). ``contrib``: FastAPI, aiohttp, other web frameworks (``web``),
  OpenTelemetry, and a procrastinate queue, whose jobs are ``slices``. ``testing``: a pytest plugin and virtual time.
  ``cli``: the command ``lianlian``, with ``cli.batch`` for files of refunds.

The words:

- *slot*: what a call needs to use a connection of its session. *flight*: the task that makes one refund for all
  concurrent calls. *case*: one refund whose outcome is open, with the evidence so far.
- *attempt*: one apply request; in the retry policy, the middleware and the events also one query. *lease*: only its
  holder may send a refund (in an inbox: call the handler), and only until it ends.
- *unresolved*: an entry of a journal without an outcome. *open*: unresolved, or accepted but not final.
- *refused*, of a refund: answered *duplicate* or *in progress*, so that only a record with all three fields is a proof.
- *grace*: how long "no such record" is not believed after a send. *canary*: a refund that was made; if there is one,
  the query service must find it before "no such record" is believed.
- *era*: a period within which times of PostgreSQL's clock can be compared.

Where to start: follow one refund from ``session.RefundSession.apply_refund`` through ``flight.Flights``,
``recording.keep``, ``resolution.resolve``, ``middleware`` and ``transport.sender`` to the socket, and back through
``protocol.Protocol.read``.
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
    name: module
    for module, names in {
        "batch": ["refund_many"],
        "merchant": ["Endpoints", "Merchant"],
        "models": ["Refund", "RefundQuery", "RefundRecord", "RefundRequest", "RefundStatus"],
        "notifications": ["NotificationEndpoint"],
        "outcome": ["Outcome"],
        "retry": ["RetryBudget", "RetryPolicy"],
        "session": ["RefundSession"],
        "signing": ["SigningKey", "VerifyingKey"],
    }.items()
    for name in names
}
"""The names that are imported at their first use (PEP 562), with their modules."""


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
