"""The events that a session and a notification endpoint report to their ``listeners``, as frozen values.

A listener is a function that is called with each event, on the event loop: it must not block, and must not be async.
It may return a context manager, which is entered at once. After ``CallBegan``, ``AttemptBegan`` and ``Paused``, it
exits when the call, attempt or pause has ended, later than ``CallEnded`` and ``AttemptEnded`` are reported. After every
other event it exits at once. Listener and context manager run in the task that reports the event.

An ``Exception`` in a listener does not affect the refund. Of each listener, the log shows only the first exception and
the first run of more than 10 ms. No event contains a key, a signature or a message body. If concurrent calls share one
refund, each reports its own ``CallBegan`` and ``CallEnded``; the other events are reported once.
"""

from collections.abc import Callable
from typing import TypeAlias

import attrs


@attrs.frozen(kw_only=True)
class Event:
    """The fields of every event. The field ``seconds`` of an event is a duration.

    ``no_refund`` is None if a query has none, and for a notification that was not verified or has none. ``backend`` is
    the HTTP library that sends: ``httpx``, ``httpx2`` or ``aiohttp``; empty for an endpoint's own listeners.
    """

    no_refund: str | None
    backend: str


Listener: TypeAlias = Callable[[Event], object]


@attrs.frozen(kw_only=True)
class CallBegan(Event):
    """A call of the session began: ``apply_refund`` (also in a batch), ``resolve`` or ``query_refund``."""

    call: str


@attrs.frozen(kw_only=True)
class Paused(Event):
    """A call waits for ``cause``: a ``backoff``, another caller's ``lease``, or a ``slot`` (``seconds`` is None)."""

    cause: str
    seconds: float | None


@attrs.frozen(kw_only=True)
class Leased(Event):
    """A call asked the journal for a refund's lease; ``seconds`` includes the commit. Not reported without a journal.

    ``standing`` is what the journal returned: ``new``, ``unresolved`` …; or ``leased``: another caller has the lease.
    """

    standing: str
    seconds: float


@attrs.frozen(kw_only=True)
class AttemptBegan(Event):
    """A ``request`` is about to be sent: ``apply``, or a ``query`` about this refund or about the canary.

    ``attempt`` counts from 1 in each call, separately for apply requests, queries and each canary. ``url`` contains no
    query string. A listener may add request headers, such as ``traceparent``, to ``headers``.
    """

    request: str
    attempt: int
    url: str
    headers: dict[str, str] = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class AttemptEnded(Event):
    """A request was answered, failed, or was cancelled; ``finding`` is the name of a ``Finding``."""

    request: str
    attempt: int
    seconds: float
    finding: str
    ret_code: str | None
    http_status: int | None


@attrs.frozen(kw_only=True)
class CallEnded(Event):
    """A call ended. ``outcome`` is ``made`` (a query: ``found``), ``cancelled``, or the type of the raised error.

    ``error`` is the text of this error. ``reason`` says why the outcome is unknown, without details of the refund.
    """

    call: str
    outcome: str
    seconds: float
    attempts: int
    queries: int
    ret_code: str | None
    sta_refund: str | None
    reason: str | None
    error: str | None


@attrs.frozen(kw_only=True)
class Notified(Event):
    """A ``NotificationEndpoint`` answered a notification; ``verdict`` is its ``Verdict``."""

    verdict: str
    seconds: float


@attrs.frozen(kw_only=True)
class ActedOn(Event):
    """A ``NotificationEndpoint`` tried to call ``on_refund`` for a refund; with ``confirm=True`` it queried first."""

    succeeded: bool
    """False if ``on_refund`` or the query failed, or was cancelled."""
    seconds: float
