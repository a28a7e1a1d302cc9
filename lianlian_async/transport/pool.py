"""A connection pool of flat cost: single-connection httpx transports, the last one used is the first one taken.

httpx's own pool looks at every connection and every waiting request for each request that comes and goes.
Here each connection stands for itself, so a request costs the same whether 10 or 1,000 are under way.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, cast

import anyio
import attrs
import httpx

from .environment import proxy_for, trusting_context
from .socket_options import close_normally, reset_when_closed

__all__ = ["KEEPALIVE_SECONDS", "PoolTransport"]

KEEPALIVE_SECONDS: Final = 5.0
"""How long an idle connection is kept: less than servers and load balancers keep theirs, so that a request
never meets a connection that is being closed at the other end."""


@attrs.define(eq=False)
class _Connection:
    """A connection of its own, and its socket once that is connected."""

    transport: httpx.AsyncHTTPTransport
    proxy: httpx.Proxy | None
    idle_since: float = 0.0
    _socket: Any = None

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send ``request``; until its answer has been read, the connection is reset when it is closed."""
        extensions = request.extensions
        trace = extensions.get("trace")

        async def watch(event: str, info: Mapping[str, Any]) -> None:
            if event.endswith(".connect_tcp.complete"):  # also to a proxy, where httpcore ignores socket_options
                self._socket = info["return_value"].get_extra_info("socket")
                reset_when_closed(self._socket)
            if trace is not None:
                await trace(event, info)

        if self._socket is not None:
            reset_when_closed(self._socket)
        request.extensions = {**extensions, "trace": watch}
        try:
            return await self.transport.handle_async_request(request)
        except httpx.TransportError as error:
            if self.proxy is not None:
                error.add_note(f"by way of the proxy {self.proxy.url.netloc.decode()}")
            raise
        finally:
            request.extensions = extensions

    def answered(self) -> None:
        """The answer has been read: nothing is under way any more."""
        if self._socket is not None:
            close_normally(self._socket)

    async def aclose(self) -> None:
        """Close the connection, whatever is cancelled."""
        with anyio.CancelScope(shield=True):
            await self.transport.aclose()


class PoolTransport(httpx.AsyncBaseTransport):
    """At most ``max_connections`` requests at a time, each on a connection of its own; others wait in order.

    All connections share ``ssl_context``; making the default one reads the CA bundle (tens of milliseconds).
    Proxies are taken from the environment (``HTTPS_PROXY``, ``NO_PROXY`` …) as a connection needs one;
    ``ConfigurationError`` for one that cannot be used. HTTP/1.1 only.
    """

    def __init__(
        self,
        max_connections: int,
        *,
        ssl_context: ssl.SSLContext | None = None,
        keepalive_expiry: float = KEEPALIVE_SECONDS,
    ) -> None:
        self._ssl_context = ssl_context or trusting_context()
        self._keepalive_expiry = keepalive_expiry
        self._limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=keepalive_expiry)
        self._slots = anyio.Semaphore(max_connections, fast_acquire=True)
        self._idle: dict[tuple[str, str, int | None], deque[_Connection]] = {}
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request`` on the connection to its origin that was used last, or on a new one."""
        await self._acquire(request)
        origin = (request.url.scheme, request.url.host, request.url.port)
        stack = self._idle.setdefault(origin, deque())
        try:
            connection = stack.pop() if stack else self._connect(request.url)
        except BaseException:
            self._slots.release()
            raise
        try:
            response = await connection.send(request)
        except BaseException:
            # Nobody knows what is left on a connection that failed or was abandoned: it is not used again.
            await self.discard(connection)
            raise
        stream = cast("httpx.AsyncByteStream", response.stream)  # what AsyncHTTPTransport always gives
        response.stream = _Released(stream, self, stack, connection)
        return response

    async def _acquire(self, request: httpx.Request) -> None:
        seconds = request.extensions.get("timeout", {}).get("pool")
        with anyio.move_on_after(seconds):
            await self._slots.acquire()
            return
        raise httpx.PoolTimeout(f"no free connection within {seconds} s", request=request)

    def _connect(self, url: httpx.URL) -> _Connection:
        proxy = proxy_for(url)
        transport = httpx.AsyncHTTPTransport(verify=self._ssl_context, limits=self._limits, proxy=proxy)
        return _Connection(transport, proxy)

    async def release(self, stack: deque[_Connection], connection: _Connection) -> None:
        """Take a connection back for the next request to its origin."""
        if self._closed:
            await self.discard(connection)
            return
        connection.idle_since = now = anyio.current_time()
        stack.append(connection)
        self._slots.release()
        for each in tuple(self._idle.values()):
            # At the bottom lie those that are used least. Others may take from the stack during each wait.
            while each and now - each[0].idle_since > self._keepalive_expiry:
                await each.popleft().aclose()

    async def discard(self, connection: _Connection) -> None:
        """Close a connection for good, and give its place free."""
        self._slots.release()
        await connection.aclose()

    async def aclose(self) -> None:
        """Close every idle connection; those in use close with their response."""
        self._closed = True
        for stack in self._idle.values():
            while stack:
                await stack.pop().aclose()


@attrs.define(eq=False)
class _Released(httpx.AsyncByteStream):
    """A response's bytes; closing them gives the connection back."""

    _stream: httpx.AsyncByteStream
    _pool: PoolTransport
    _stack: deque[_Connection]
    _connection: _Connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk
        self._connection.answered()

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._pool.discard(self._connection)
            raise
        await self._pool.release(self._stack, self._connection)
