"""A connection pool of single-connection httpx transports; the most recently used connection is reused first.

httpx's own pool examines every connection and every waiting request at the beginning and end of each request. In this
pool, the cost of a request does not depend on the number of concurrent requests.
"""

from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, cast

import anyio
import httpx

from .connection import close_normally, proxy_for, reset_when_closed, trusting_context

KEEPALIVE_SECONDS: Final = 5.0
"""Seconds in which an idle connection may be reused. Most servers and load balancers keep idle connections longer, so a
request rarely meets a connection that the server is closing."""
_LIMITS: Final = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_SECONDS)


class _Connection(httpx.AsyncByteStream):
    """One connection to one origin, and its current response's body; closing the body returns it to the pool."""

    def __init__(self, pool: "PoolTransport", stack: "deque[_Connection]", proxy: httpx.Proxy | None) -> None:
        if proxy is not None and proxy.url.scheme == "https":
            proxy.ssl_context = pool.ssl_context  # without it, httpcore reads the CA files for each connection
        self.stack = stack
        self.idle_since = 0.0
        self._pool = pool
        self._proxy = proxy
        self._transport = httpx.AsyncHTTPTransport(verify=pool.ssl_context, limits=_LIMITS, proxy=proxy)
        self._socket: Any = None  # known after the TCP connect

    async def send(self, request: httpx.Request) -> httpx.Response:
        """Send ``request``. If the connection is closed before the response has been read, it is reset (RST)."""
        extensions = request.extensions
        trace = extensions.get("trace")

        async def watch(event: str, info: Mapping[str, Any]) -> None:
            if event.endswith(".connect_tcp.complete"):  # not by socket_options: httpcore ignores them for a proxy
                self._socket = info["return_value"].get_extra_info("socket")
                reset_when_closed(self._socket)
            if trace is not None:
                await trace(event, info)

        if self._socket is not None:
            reset_when_closed(self._socket)
        request.extensions = {**extensions, "trace": watch}
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TransportError as error:
            if self._proxy is not None:
                error.add_note(f"through the proxy {self._proxy.url.netloc.decode()}")
            raise
        finally:
            request.extensions = extensions
        self._stream = cast("httpx.AsyncByteStream", response.stream)  # AsyncHTTPTransport's streams are async
        response.stream = self
        return response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk
        if self._socket is not None:
            close_normally(self._socket)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._pool.discard(self)
            raise
        await self._pool.release(self)

    async def shut(self) -> None:
        """Close the connection, even if the caller is cancelled."""
        with anyio.CancelScope(shield=True):
            await self._transport.aclose()


class PoolTransport(httpx.AsyncBaseTransport):
    """Sends at most ``max_connections`` concurrent requests, each on its own connection; other requests wait in order.

    Creating the pool reads the CA bundle (tens of milliseconds). Each new connection reads its proxy from the
    environment (``HTTPS_PROXY``, ``NO_PROXY`` …) and raises ``ConfigurationError`` if the proxy is unusable. HTTP/1.1
    only.
    """

    def __init__(self, max_connections: int) -> None:
        self.ssl_context = trusting_context()
        self._slots = anyio.Semaphore(max_connections, fast_acquire=True)
        self._idle: dict[tuple[str, str, int | None], deque[_Connection]] = {}
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request`` on the most recently used idle connection to its origin, or on a new connection."""
        await self._acquire(request)
        url, connection = request.url, None
        stack = self._idle.setdefault((url.scheme, url.host, url.port), deque())
        try:
            connection = stack.pop() if stack else _Connection(self, stack, proxy_for(url))
            return await connection.send(request)
        except BaseException:
            # A failed or cancelled request may leave unread bytes on its connection: do not reuse it.
            await self.discard(connection)
            raise

    async def _acquire(self, request: httpx.Request) -> None:
        seconds = request.extensions.get("timeout", {}).get("pool")
        with anyio.move_on_after(seconds):
            await self._slots.acquire()
            return
        raise httpx.PoolTimeout(f"no free connection within {seconds} s", request=request)

    async def release(self, connection: _Connection) -> None:
        """Keep a connection for the next request to its origin; close all that were idle for too long."""
        if self._closed:
            await self.discard(connection)
            return
        connection.idle_since = now = anyio.current_time()
        connection.stack.append(connection)
        self._slots.release()
        for each in tuple(self._idle.values()):
            # The first connection is the least recently used one. Other requests may pop connections during the await.
            while each and now - each[0].idle_since > KEEPALIVE_SECONDS:
                await each.popleft().shut()

    async def discard(self, connection: _Connection | None) -> None:
        """Let the next request start, and close ``connection`` if there is one."""
        self._slots.release()
        if connection is not None:
            await connection.shut()

    async def aclose(self) -> None:
        """Close every idle connection; a connection in use is closed together with its response."""
        self._closed = True
        for stack in self._idle.values():
            while stack:
                await stack.pop().shut()
