"""An httpx transport over aiohttp's client: several times faster than httpx's own, on asyncio only (extra ``fast``).

httpx-aiohttp would do the same, but reports a connection that broke after the request was sent as one that was
never made: with refunds, the difference between asking and sending again.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
import anyio.lowlevel
import httpx
from yarl import URL

from .request import Body

__all__ = ["AiohttpTransport"]

# From the most special to the most general. The first two are raised before a byte of the request is written.
_AS_HTTPX: Final[dict[type[Exception], type[httpx.RequestError]]] = {
    aiohttp.ClientConnectorError: httpx.ConnectError,
    aiohttp.ConnectionTimeoutError: httpx.ConnectTimeout,
    aiohttp.ServerTimeoutError: httpx.ReadTimeout,
    aiohttp.ClientOSError: httpx.ReadError,
    aiohttp.ClientError: httpx.RemoteProtocolError,
}


class AiohttpTransport(httpx.AsyncBaseTransport):
    """At most ``max_connections`` requests at a time over an ``aiohttp.ClientSession``; others wait in order.

    For one event loop of asyncio. HTTP/1.1 only; proxies and cookies are not used. ``keepalive_expiry`` is in seconds.
    """

    def __init__(self, max_connections: int, *, ssl_context: ssl.SSLContext, keepalive_expiry: float) -> None:
        self._max_connections = max_connections
        self._ssl_context = ssl_context
        self._keepalive_expiry = keepalive_expiry
        self._session: aiohttp.ClientSession | None = None
        self._targets: dict[str, URL] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request``, and come back with the head of its response."""
        session = self._session or self._open()
        if request.url.scheme not in ("http", "https") or not request.url.host:
            raise httpx.UnsupportedProtocol(f"no http or https URL: {request.url}")
        timeout = request.extensions.get("timeout", {})
        # The way in which this fails tells whether it was sent, so taking the body here says nothing yet.
        body = request.stream.content if isinstance(request.stream, Body) else await request.aread()
        try:
            response = await session.request(
                request.method,
                self._target(request.url),
                data=body,
                headers=[(name.decode("ascii"), value.decode("ascii")) for name, value in request.headers.raw],
                timeout=aiohttp.ClientTimeout(connect=timeout.get("connect"), sock_read=timeout.get("read")),
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            raise _as_httpx(error) from error
        return httpx.Response(response.status, headers=response.raw_headers, stream=_ResponseStream(response))

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=self._max_connections, ssl=self._ssl_context, keepalive_timeout=self._keepalive_expiry
        )
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
        )
        return self._session

    def _target(self, url: httpx.URL) -> URL:
        text = str(url)
        target = self._targets.get(text)
        if target is None:
            target = self._targets[text] = URL(text, encoded=True)
        return target

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


class _ResponseStream(httpx.AsyncByteStream):
    """A response's bytes; closing it gives the connection back, or away if there are bytes left."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while chunk := await self._response.content.readany():
                yield chunk
                # A stream that always has something to read never waits, and would never meet its cancellation.
                await anyio.lowlevel.checkpoint_if_cancelled()
        except aiohttp.ClientError as error:
            raise _as_httpx(error) from error

    async def aclose(self) -> None:
        self._response.close()


def _as_httpx(error: aiohttp.ClientError) -> httpx.RequestError:
    """What aiohttp raised as an exception of httpx's, as far as the difference between sent and not sent goes."""
    kind = next(kind for foreign, kind in _AS_HTTPX.items() if isinstance(error, foreign))
    return kind(str(error) or type(error).__name__)
