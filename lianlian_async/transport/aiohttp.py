"""An httpx transport over aiohttp's client: several times faster than httpx's own, on asyncio only (extra ``fast``).

httpx-aiohttp is unsuitable: if a connection breaks after the request was sent, it reports that no connection was made,
so a refund would be sent again without a query.
"""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Final, cast

import aiohttp
import anyio.lowlevel
import httpx
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from yarl import URL

from .connection import check_loopback, close_normally, reset_when_closed, trusting_context
from .pool import KEEPALIVE_SECONDS
from .tracked_request import Body, SendRefusedError


class LeasedPayload(aiohttp.Payload):
    """A :class:`Body` that aiohttp writes together with the head. Each read checks the lease and counts as a send."""

    _autoclose = True  # nothing to close

    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self._size = len(body.content)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the text. aiohttp 3.14 does not call it here."""
        return b"".join(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Write the body."""
        await writer.write(b"".join(self._value))


class _Connector(aiohttp.TCPConnector):
    """A connector that checks the host with :func:`check_loopback` before it opens or reuses a connection."""

    async def connect(self, req: aiohttp.ClientRequest, *args: Any, **options: Any) -> Connection:
        check_loopback(str(req.url.host))
        return await super().connect(req, *args, **options)


class _ClientRequest(aiohttp.ClientRequest):
    """A request that refuses a connection with unread bytes: aiohttp would read them as the response."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        if conn.protocol is None or conn.protocol.should_close:
            raise SendRefusedError("an idle connection received unexpected bytes")
        sock = cast("asyncio.Transport", conn.transport).get_extra_info("socket")
        reset_when_closed(sock)
        # Called when conn is released or closed. _Response.close then resets it if it was not read to its end.
        conn.add_callback(partial(close_normally, sock))
        return await super().send(conn)


class _Response(aiohttp.ClientResponse):
    """A response that resets its connection if it is closed before it has been read."""

    def close(self) -> None:
        """Reset the connection and discard unsent bytes; aiohttp alone would still send them."""
        transport = None if self.connection is None else self.connection.transport
        super().close()
        if transport is not None:
            reset_when_closed(transport.get_extra_info("socket"))
            transport.abort()


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends at most ``max_connections`` concurrent requests over an ``aiohttp.ClientSession``; others wait.

    The requests to one server wait in order. Creating it reads the CA bundle. Use it in one asyncio event loop.
    HTTP/1.1 only, without proxies and cookies. A request's connect timeout includes its wait for a free connection.
    """

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._ssl_context = trusting_context()
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send ``request`` and return the head of its response."""
        session = self._session or self._open()
        if request.url.scheme not in ("http", "https") or not request.url.host:
            raise httpx.UnsupportedProtocol(f"not an absolute http or https URL: {request.url}")
        timeout = request.extensions.get("timeout", {})
        stream = cast("httpx.AsyncByteStream", request.stream)
        data = LeasedPayload(stream) if isinstance(stream, Body) else b"".join([chunk async for chunk in stream])
        try:
            response = await session.request(
                request.method,
                URL(str(request.url), encoded=True).with_user(None),  # httpx's transports ignore credentials, too
                data=data,
                headers=[(name.decode("ascii"), value.decode("ascii")) for name, value in request.headers.raw],
                timeout=aiohttp.ClientTimeout(connect=timeout.get("connect"), sock_read=timeout.get("read")),
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            raise (error.__cause__ if isinstance(error.__cause__, SendRefusedError) else _as_httpx(error)) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling() or not session.closed:
                raise
            # Nobody cancelled this task: closing the session cancelled the wait for a connection.
            raise httpx.ReadError("the transport was closed during the request") from error
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_ResponseStream(response),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": (response.reason or "").encode()},
        )

    def _open(self) -> aiohttp.ClientSession:
        connector = _Connector(limit=self._max_connections, ssl=self._ssl_context, keepalive_timeout=KEEPALIVE_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            request_class=_ClientRequest,
            response_class=_Response,
        )
        return self._session

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


class _ResponseStream(httpx.AsyncByteStream):
    """The bytes of a response. Closing it resets the connection if bytes are unread."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while chunk := await self._response.content.readany():
                yield chunk
                # readany does not wait while bytes are available, so this task would not notice a cancellation.
                await anyio.lowlevel.checkpoint_if_cancelled()
        except aiohttp.ClientError as error:
            raise _as_httpx(error) from error

    async def aclose(self) -> None:
        self._response.close()


_AS_HTTPX: Final = (
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    ((aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError), httpx.UnsupportedProtocol),
    (aiohttp.ServerTimeoutError, httpx.ReadTimeout),
    (aiohttp.ClientOSError, httpx.ReadError),
    (aiohttp.ClientError, httpx.RemoteProtocolError),
)


def _as_httpx(error: aiohttp.ClientError) -> httpx.RequestError:
    """Return the httpx exception for ``error``; both say the same about whether the request may have been sent."""
    text = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorError) and not error.strerror:
        text += f": {error.os_error}"
    return next(kind(text) for kinds, kind in _AS_HTTPX if isinstance(error, kinds))
