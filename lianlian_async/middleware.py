"""Layers around one exchange; each is an ``async def middleware(exchange, call_next) -> Reply``.

A session's layers, from the outside in: :func:`retry` → :class:`Limit` (the user's ``limiter``) → :func:`attempt`
(time limit, and check of replies) → the user's own ``middleware``, the first one outermost → the HTTP exchange. The
user's layers are called for every attempt, also for each query that resolves a refund::

    from collections import Counter
    from lianlian_async.exchange import Exchange, Reply
    from lianlian_async.middleware import Next

    findings = Counter()

    async def count_findings(exchange: Exchange, call_next: Next) -> Reply:
        reply = await call_next(exchange)
        findings[exchange.call, reply.finding] += 1
        return reply

To change an exchange, for example its ``headers``, call ``call_next(attrs.evolve(exchange, headers=…))``. A second
``call_next`` sends nothing if the first one may have sent a refund.
"""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeAlias, cast

import anyio
import attrs

from .errors import ConfigurationError, LianLianError, RefundConflict, RefundNotSent, RefundRejected, misconfigured
from .events import AttemptBegan, AttemptEnded, Paused
from .exchange import Call, Exchange, Finding, NoResponse, Reply, SendCount
from .identity import check_identity
from .protocol import unanswered
from .settings import is_number

Next: TypeAlias = Callable[[Exchange], Awaitable[Reply]]
"""The rest of the chain."""

Middleware: TypeAlias = Callable[[Exchange, Next], Awaitable[Reply]]
"""A layer: it calls ``call_next(exchange)`` and returns the reply."""


def compose(layers: Sequence[Middleware], core: Next) -> Next:
    """Return ``core`` with ``layers`` around it, the first one outermost."""
    if not layers:
        return core
    layer, call_next = layers[0], compose(layers[1:], core)
    return lambda exchange: layer(exchange, call_next)


async def retry(exchange: Exchange, call_next: Next) -> Reply:
    """Repeat a request that was certainly not sent, or a query without a usable answer, after a jittered backoff.

    Stop at the policy's ``attempts``, at the deadline, at the end of the lease, when the session's retry budget is
    empty, and if a setting prevents every send. ``attempts`` of the returned reply counts all attempts.
    """
    attempts = 1
    while True:
        reply = await call_next(exchange)
        is_repeatable = (reply.finding is Finding.NOT_SENT and misconfigured(reply.error) is None) or (
            exchange.call is Call.QUERY and reply.finding is Finding.UNCERTAIN
        )
        if (
            not is_repeatable
            or not exchange.lease_holds()
            or attempts >= exchange.policy.attempts
            or not await backoff(exchange, attempts - 1, reply.retry_after)
        ):
            return reply if reply.attempts == attempts else attrs.evolve(reply, attempts=attempts)
        attempts += 1
        exchange = attrs.evolve(exchange, attempt=exchange.attempt + 1)


async def backoff(exchange: Exchange, retries: int, retry_after: float | None) -> bool:
    """Wait before the next attempt and return True; return False at once if too little time or no retry is left."""
    seconds = exchange.policy.pause(retries, random.random(), retry_after)  # noqa: S311 - jitter is not a secret
    now = anyio.current_time()
    if not exchange.deadline.attempt(now + seconds) or not exchange.retries_left.take(now):
        return False
    number = exchange.asked.get("no_refund")
    with exchange.listeners.span(Paused, no_refund=number, cause="backoff", seconds=seconds):
        await anyio.sleep(seconds)
    return True


class Limit:
    """Runs each attempt inside the user's limiter (any async context manager).

    Waiting for the limiter does not count against the deadline. If the limiter raises before the attempt, the request
    was *not sent*; if it raises after the attempt, the reply of the attempt is returned.
    """

    def __init__(self, limiter: AbstractAsyncContextManager[Any]) -> None:
        self._limiter = limiter

    async def __call__(self, exchange: Exchange, call_next: Next) -> Reply:
        """Call ``call_next`` inside the limiter."""
        exchange.deadline.pause(anyio.current_time())
        entered, reply, raised = False, None, None
        try:
            async with self._limiter:
                entered = True
                exchange.deadline.resume(anyio.current_time())
                reply = await call_next(exchange)
        except Exception as error:  # noqa: BLE001 - a limiter may raise anything; keep the reply
            raised = error
        if reply is None:  # the limiter raised when it was entered, or suppressed a cancellation of the attempt
            exchange.deadline.resume(anyio.current_time())
            reason = "the limiter suppressed a cancellation" if raised is None else f"the limiter failed: {raised!r}"
            return unanswered(exchange, NoResponse(reason, entered, raised))
        return reply


async def attempt(exchange: Exchange, call_next: Next) -> Reply:
    """Call ``call_next`` with a share of the remaining time, and check the reply of the user's layers.

    These layers may raise anything, return anything and send several times. If a request may have made the refund, the
    reply is never *not sent* or *rejected*. Raises no ``Exception``.
    """
    seconds = exchange.deadline.attempt(anyio.current_time())
    exchange = attrs.evolve(exchange, seconds=seconds, send_count=SendCount())
    if not seconds:
        return _without_reply(exchange, "the deadline is over")
    try:
        with anyio.move_on_after(seconds):
            reply = await (_observed(exchange, call_next) if exchange.listeners.want() else call_next(exchange))
            problem = _problem(exchange, reply)
            return reply if problem is None else _without_reply(exchange, problem)
    except Exception as error:  # noqa: BLE001 - a user's layer may raise anything, also a group
        return _without_reply(exchange, f"a middleware raised {type(error).__name__}: {error}", error)
    what = "no answer" if exchange.send_count.open_sends > 0 else "nothing could be sent"
    return _without_reply(exchange, f"{what} within {seconds:.1f} s")


async def _observed(exchange: Exchange, call_next: Next) -> Reply:
    """Call ``call_next`` between two events; the second one is also reported after an exception or a cancellation."""
    exchange = attrs.evolve(exchange, headers={**exchange.headers})
    same = {"no_refund": exchange.asked.get("no_refund"), "request": str(exchange.call), "attempt": exchange.attempt}
    url = exchange.url.partition("?")[0]
    began, reply = exchange.listeners.timer(), None
    with exchange.listeners.span(AttemptBegan, **same, url=url, headers=exchange.headers):
        try:
            reply = await call_next(exchange)
        finally:
            shown = reply if isinstance(reply, Reply) else _without_reply(exchange, "cancelled")
            seconds, last = exchange.listeners.timer() - began, exchange.send_count.last_exchange
            status = None if last is None else last.status
            code = getattr(shown.refund or shown.error, "ret_code", None)
            fields = {"finding": shown.finding.name, "ret_code": code, "http_status": status, "seconds": seconds}
            exchange.listeners.tell(AttemptEnded, **same, **fields)
    return reply


_APPLY_ERRORS: Final[Mapping[Finding, type[LianLianError] | tuple[()]]] = {
    Finding.NOT_SENT: RefundNotSent,
    Finding.REJECTED: RefundRejected,
    Finding.CONFLICT: RefundConflict,
    Finding.NOT_FOUND: (),
}
"""By finding, the error that an apply reply must have; (): the finding is never valid. Other findings: any or none."""


def _problem(exchange: Exchange, reply: object) -> str | None:
    """Return why the reply of the user's layers is not reliable, or None if it is reliable."""
    if not isinstance(reply, Reply):
        return f"a middleware returned {type(reply).__name__}, not a Reply"
    if exchange.call is Call.APPLY and not isinstance(reply.error, _APPLY_ERRORS.get(reply.finding, object)):
        return f"a middleware answered {reply.finding.name} with {type(reply.error).__name__}: {reply.error}"
    other_sends = exchange.send_count.open_sends - (reply.finding is Finding.EXISTS)
    if reply.finding in (Finding.NOT_SENT, Finding.REJECTED, Finding.EXISTS) and other_sends > 0:
        return f"the answer is {reply.finding.name}, but another send of the same request may have worked"
    try:
        check_identity(exchange.asked, {} if reply.refund is None else reply.refund.raw)
    except LianLianError as error:
        return f"a middleware returned the record of another refund: {error}"
    return None


def _without_reply(exchange: Exchange, reason: str, cause: Exception | None = None) -> Reply:
    reply = unanswered(exchange, NoResponse(reason, exchange.send_count.open_sends > 0, cause))
    cast("LianLianError", reply.error).last_exchange = exchange.send_count.last_exchange
    return reply


class RateLimit:
    """A limiter that starts at most ``per_second`` attempts each second, evenly spaced and in order.

    Sessions of one event loop may share it as ``limiter=``.
    """

    def __init__(self, per_second: float) -> None:
        if not is_number(per_second) or per_second <= 0:
            raise ConfigurationError("RateLimit: per_second must be greater than 0")
        self._interval = 1 / per_second
        self._turn = anyio.Lock()
        self._last = float("-inf")

    async def __aenter__(self) -> None:
        async with self._turn:  # waiters start in order; a cancelled waiter uses up no start
            now = anyio.current_time()
            last = min(self._last, now)  # a session that is opened again may run on an event loop with another clock
            start = max(last + self._interval, now)
            await anyio.sleep(max(0.0, start - now))
            self._last = start

    async def __aexit__(self, *exc_info: object) -> None:
        """Release nothing, because the limiter counts only starts."""
