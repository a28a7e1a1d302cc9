"""An open line to the gateway: the keys, the RSA thread, the shared client and the onion, for one event loop."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from time import perf_counter
from typing import Any, Final

import anyio
import anyio.to_thread

from .exchange import Call, Exchange, Known, Reply
from .merchant import Merchant
from .middleware import Attempt, Middleware, Permit, Retry, onion
from .protocol import Protocol
from .retry import Bucket, Deadline, RetryBudget, RetryPolicy
from .transport import Transport

__all__ = ["Line"]

INLINE_VERIFY_SECONDS: Final = 0.0005
"""A signature is checked on the event loop only if that took less when the line was opened, else in the thread."""


class Line:
    """What exists only while a session is open. :meth:`open` it, ``send`` exchanges over it, close it."""

    def __init__(
        self,
        protocol: Protocol,
        transport: Transport,
        rsa: anyio.CapacityLimiter,
        *,
        budget: RetryBudget,
        limiter: AbstractAsyncContextManager[Any] | None,
        middleware: Sequence[Middleware],
        verify_inline: bool,
    ) -> None:
        self.protocol = protocol
        self.bucket = Bucket(budget)
        """What is left of the retry budget."""
        permit = () if limiter is None else (Permit(limiter),)
        self.send = onion((Retry(self.bucket), *permit, Attempt(), *middleware), self._exchange)
        """The whole onion."""
        self._transport = transport
        self._rsa = rsa
        self._verify_inline = verify_inline

    @classmethod
    async def open(
        cls,
        merchant: Merchant,
        transport: Transport,
        *,
        budget: RetryBudget,
        limiter: AbstractAsyncContextManager[Any] | None,
        middleware: Sequence[Middleware],
    ) -> Line:
        """Load the keys, in the thread, and measure what checking a signature costs."""
        # One thread at a time does RSA: more would fight the event loop for the interpreter, and win.
        rsa = anyio.CapacityLimiter(1)
        keys = await anyio.to_thread.run_sync(merchant.load_keys, limiter=rsa)
        protocol = Protocol(merchant, keys.private, keys.gateway)
        cost = await anyio.to_thread.run_sync(_verification_seconds, protocol, limiter=rsa)
        return cls(
            protocol,
            transport,
            rsa,
            budget=budget,
            limiter=limiter,
            middleware=middleware,
            verify_inline=cost < INLINE_VERIFY_SECONDS,
        )

    async def seal(self, fields: Mapping[str, str]) -> bytes:
        """Sign, in the thread; once for each request, so that every attempt sends the same bytes."""
        return await anyio.to_thread.run_sync(self.protocol.seal, fields, limiter=self._rsa)

    def exchange(
        self, call: Call, fields: Mapping[str, str], body: bytes, until: Deadline, policy: RetryPolicy
    ) -> Exchange:
        """One request, ready to be sent."""
        endpoints = self.protocol.merchant.endpoints
        url = endpoints.apply if call is Call.APPLY else endpoints.query
        return Exchange(call=call, url=url, body=body, asked=fields, deadline=until, policy=policy)

    async def _exchange(self, exchange: Exchange) -> Reply:
        """The heart of the onion: out over the wire, and what came back."""
        exchange.trail.open_sends += 1
        delivery = await self._transport.post(exchange.url, exchange.body, exchange.seconds)
        if self._verify_inline:
            reply = self.protocol.read(exchange, delivery)
        else:
            reply = await anyio.to_thread.run_sync(self.protocol.read, exchange, delivery, limiter=self._rsa)
        if reply.known in (Known.NOT_SENT, Known.REJECTED):
            exchange.trail.open_sends -= 1
        return reply

    async def aclose(self) -> None:
        """Close the client, if it is ours, once no signature is being made any more."""
        async with self._rsa:
            await self._transport.aclose()


def _verification_seconds(protocol: Protocol) -> float:
    """What checking one answer costs on this machine with these keys: the best of three."""
    longest = max(key.bits for key in protocol.gateway_keys)
    # Any signature of full length costs the same; one that is shorter is refused before it costs anything.
    fields = {"sign": b64encode(b"\x55" * ((longest + 7) // 8)).decode()}

    def once() -> float:
        began = perf_counter()
        protocol.verify(fields)
        return perf_counter() - began

    return min(once() for _ in range(3))
