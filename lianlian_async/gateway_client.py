"""An open line to the gateway: the keys, the shared client and the middleware around them, for one event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio

from .clock import SessionClock
from .exchange import Call, Exchange, Finding, HttpResponse, Reply
from .merchant import Merchant
from .middleware import Attempt, Limit, Middleware, Retry, compose
from .retry import LONGEST_ATTEMPT, Deadline, RetryBudget, RetryPolicy, TokenBucket
from .rsa_worker import RsaWorker
from .signature_watch import SignatureWatch
from .transport import Transport

__all__ = ["GatewayClient"]


class GatewayClient:
    """What exists only while a session is open. :meth:`open` it, ``send`` exchanges over it, close it."""

    def __init__(
        self,
        rsa: RsaWorker,
        transport: Transport,
        *,
        budget: RetryBudget,
        limiter: AbstractAsyncContextManager[Any] | None,
        middleware: Sequence[Middleware],
        clock: SessionClock,
    ) -> None:
        self.clock = clock
        """Also knows the gateway's time."""
        self.protocol = rsa.protocol
        self.retries_left = TokenBucket(budget)
        """What is left of the retry budget."""
        self.signatures = SignatureWatch()
        """Whether the answers verify."""
        permit = () if limiter is None else (Limit(limiter),)
        self.send = compose((Retry(self.retries_left), *permit, Attempt(), *middleware), self._exchange)
        """The whole middleware chain."""
        self._transport = transport
        self._rsa = rsa

    @classmethod
    async def open(
        cls,
        merchant: Merchant,
        transport: Transport,
        *,
        budget: RetryBudget,
        limiter: AbstractAsyncContextManager[Any] | None,
        middleware: Sequence[Middleware],
        warm_up: int,
        clock: SessionClock,
    ) -> GatewayClient:
        """Load the keys, open ``warm_up`` connections, and compose the middleware.

        Takes ``transport`` over: if this fails, it is discarded.
        """
        try:
            rsa = await RsaWorker.open(merchant)
            await transport.warm_up(merchant.endpoints.apply, warm_up, LONGEST_ATTEMPT)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await transport.discard()
            raise
        return cls(rsa, transport, budget=budget, limiter=limiter, middleware=middleware, clock=clock)

    async def seal(self, fields: Mapping[str, str]) -> bytes:
        """Sign, off the event loop."""
        return await self._rsa.seal(fields)

    def exchange(
        self, call: Call, fields: Mapping[str, str], body: bytes, until: Deadline, policy: RetryPolicy
    ) -> Exchange:
        """One request, ready to be sent."""
        endpoints = self.protocol.merchant.endpoints
        url = endpoints.apply if call is Call.APPLY else endpoints.query
        return Exchange(call=call, url=url, body=body, asked=fields, deadline=until, policy=policy)

    async def _exchange(self, exchange: Exchange) -> Reply:
        """The innermost layer: out over the wire, and what came back."""
        exchange.send_count.open_sends += 1
        began = self.clock().boot
        delivery = await self._transport.post(exchange.url, exchange.body, exchange.seconds, exchange.lease_holds)
        if isinstance(delivery, HttpResponse):
            self.clock.heard(delivery.headers.get("date", ""), began)
        reply = await self._rsa.check(self.protocol.read, exchange, delivery)
        self.signatures.saw(exchange, reply)
        if reply.finding in (Finding.NOT_SENT, Finding.REJECTED):
            exchange.send_count.open_sends -= 1
        return reply

    async def aclose(self) -> None:
        """Close the client, if it is ours, once no signature is being made any more."""
        await self._rsa.rest()
        await self._transport.aclose()
