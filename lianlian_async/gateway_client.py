"""The gateway client of an open session: keys, HTTP client and middleware, for one event loop."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Self, cast

import anyio

from .clock import SessionClock
from .exchange import Call, Delivery, Exchange, Finding, HttpResponse, NoResponse, Reply, SendCount, last_exchange
from .logs import Listeners
from .merchant import Merchant
from .middleware import Limit, Middleware, attempt, compose, retry
from .models import RefundQuery
from .protocol import unanswered
from .retry import LONGEST_ATTEMPT, Deadline, RetryBudget, RetryPolicy, TokenBucket
from .rsa_worker import RsaWorker
from .signature_watch import SignatureWatch
from .transport import HttpSender


class GatewayClient:
    """Sends exchanges while a session is open: call :meth:`open`, then ``send``, then :meth:`aclose`."""

    def __init__(
        self,
        rsa: RsaWorker,
        transport: HttpSender,
        *,
        budget: RetryBudget,
        limiter: AbstractAsyncContextManager[Any] | None,
        middleware: Sequence[Middleware],
        clock: SessionClock,
        listeners: Listeners,
    ) -> None:
        self.clock = clock
        self.listeners = listeners
        listeners.backend = transport.backend
        self.protocol = rsa.protocol
        self._retries_left = TokenBucket(budget)
        self.signatures = SignatureWatch()
        limit = () if limiter is None else (Limit(limiter),)
        self.send = compose((retry, *limit, attempt, *middleware), self._exchange)
        """Sends an :class:`Exchange` through the whole middleware chain."""
        self.seal = rsa.seal
        """Signs fields; see :meth:`.RsaWorker.seal`."""
        self._transport = transport
        self._rsa = rsa

    @classmethod
    async def open(cls, merchant: Merchant, transport: HttpSender, *, warm_up: int, **options: Any) -> Self:
        """Load the keys and try to open ``warm_up`` connections; close ``transport`` if an exception is raised."""
        try:
            rsa = await RsaWorker.open(merchant)
            await transport.warm_up(merchant.endpoints.apply, warm_up, LONGEST_ATTEMPT)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await transport.aclose()
            raise
        return cls(rsa, transport, **options)

    def exchange(
        self, call: Call, fields: Mapping[str, str], body: bytes, until: Deadline, policy: RetryPolicy
    ) -> Exchange:
        """Return an exchange of the signed ``body`` that is ready to send."""
        endpoints = self.protocol.merchant.endpoints
        url = endpoints.apply if call is Call.APPLY else endpoints.query
        return Exchange(
            call=call,
            url=url,
            body=body,
            asked=fields,
            deadline=until,
            policy=policy,
            retries_left=self._retries_left,
            send_count=SendCount(),
            listeners=self.listeners,
        )

    async def query_exchange(self, query: RefundQuery, until: Deadline, policy: RetryPolicy) -> Exchange:
        """Return a signed query that is ready to send."""
        fields = self.protocol.query_fields(query)
        return self.exchange(Call.QUERY, fields, await self.seal(fields), until, policy)

    async def _exchange(self, exchange: Exchange) -> Reply:
        """Send a request and read its response, as the innermost layer of the middleware chain."""
        count = exchange.send_count
        if exchange.call is Call.APPLY and count.open_sends:  # a middleware repeats a request that may have arrived
            return unanswered(exchange, NoResponse("a middleware tried to send it again", may_have_arrived=True))
        count.open_sends += 1  # before any await: a middleware may leave this task running in the background
        is_open, problem, cause = False, "its outcome was recorded meanwhile", None
        try:
            is_open = await exchange.is_open()
        except Exception as error:  # noqa: BLE001 - a journal may raise anything
            problem, cause = f"the journal failed: {error}", error
        finally:  # also after a cancellation
            if not is_open:
                count.take_back()
        if not is_open:
            return unanswered(exchange, NoResponse(problem, may_have_arrived=False, cause=cause))
        began, delivery = self.clock(), cast("Delivery | None", None)
        try:
            delivery = await self._transport.post(
                exchange.url,
                exchange.body,
                exchange.seconds,
                exchange.lease_holds,
                exchange.headers,
                not_sent=count.take_back,
            )
        finally:  # also if the attempt's timeout cancels it
            summary = last_exchange(delivery, began.wall, self.clock().boot - began.boot)
            count.last_exchange = summary
        if isinstance(delivery, HttpResponse):
            self.clock.observe_date(delivery.headers.get("date", ""), began.boot)
            count.open_sends += delivery.sends - 1  # the answer is to the last send only
        reply = await self._rsa.check(self.protocol.read, exchange, delivery)
        if reply.error is not None:
            reply.error.last_exchange = summary
        self.signatures.saw(exchange, reply)
        if reply.finding in (Finding.NOT_SENT, Finding.REJECTED):
            count.take_back()
        return reply

    async def aclose(self) -> None:
        """Wait for the last signature, then close the HTTP transport; a caller's client stays open."""
        await self._rsa.wait_until_idle()
        await self._transport.aclose()
