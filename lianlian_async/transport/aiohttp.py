"""An httpx transport over aiohttp's client: several times faster than httpx's own, on asyncio only (extra ``fast``).

httpx-aiohttp would do the same, but reports a connection that broke after the request was sent as one that was
never made: with refunds, the difference between asking and sending again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from functools import partial
from typing import Final, cast

import aiohttp
import anyio.lowlevel
import httpx
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from yarl import URL

from .socket_options import close_normally, reset_when_closed
from .tracked_request import Body, LeaseEndedError

__all__ = ["AiohttpTransport"]


class _SpoiltConnectionError(aiohttp.ClientConnectionError):
    """On the connection lies what nobody asked for; nothing was written to it."""


_BEFORE_SENDING: Final = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    aiohttp.NonHttpUrlClientError,
    _SpoiltConnectionError,
)
"""Raised before a byte of the request is written; whatever else is raised, the request may have arrived."""


class _LeasedPayload(aiohttp.BytesPayload):
    """A request's body that is written only while its lease holds; aiohttp writes the head together with it."""

    def __init__(self, body: Body) -> None:
        super().__init__(body.content)
        self._body = body

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        self._body.check_lease()
        await super().write_with_length(writer, content_length)


class _Request(aiohttp.ClientRequest):
    """A request that is not sent where an answer lies already: it would be taken for the answer to this one."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        if conn.protocol is None or conn.protocol.should_close:
            raise _SpoiltConnectionError("an idle connection bore something that nobody asked for")
        sock = cast("asyncio.Transport", conn.transport).get_extra_info("socket")
        reset_when_closed(sock)
        conn.add_callback(partial(close_normally, sock))  # called when the answer has been read
        return await super().send(conn)


class _Response(aiohttp.ClientResponse):
    """A response whose connection is reset when it is closed before the answer has been read."""

    def close(self) -> None:
        """Drop what neither asyncio nor the kernel has sent yet: aiohttp would have it sent first."""
        transport = None if self.connection is None else self.connection.transport
        super().close()
        if transport is not None:
            reset_when_closed(transport.get_extra_info("socket"))
            transport.abort()


class AiohttpTransport(httpx.AsyncBaseTransport):
    """At most ``max_connections`` requests at a time over an ``aiohttp.ClientSession``; others wait in order.

    For one event loop of asyncio. HTTP/1.1 only; proxies and cookies are not used. ``keepalive_expiry`` is in seconds.
    A request's time to connect counts from its arrival: waiting for one of the connections is part of it.
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
        stream = cast("httpx.AsyncByteStream", request.stream)
        content = b"".join([chunk async for chunk in stream])
        try:
            response = await session.request(
                request.method,
                self._target(request.url),
                data=_LeasedPayload(stream) if isinstance(stream, Body) else content,
                headers=[(name.decode("ascii"), value.decode("ascii")) for name, value in request.headers.raw],
                timeout=aiohttp.ClientTimeout(connect=timeout.get("connect"), sock_read=timeout.get("read")),
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            reason = error.__cause__ if isinstance(error.__cause__, LeaseEndedError) else None
            if isinstance(stream, Body) and (reason is not None or isinstance(error, _BEFORE_SENDING)):
                stream.was_not_sent()
            raise reason or _as_httpx(error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling() or not session.closed:
                raise
            # Closing cancels what the connector waits for, in tasks that nobody has cancelled.
            raise httpx.ReadError("closed while the request was under way") from error
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=_ResponseStream(response),
            extensions={"http_version": b"HTTP/1.1", "reason_phrase": (response.reason or "").encode()},
        )

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=self._max_connections, ssl=self._ssl_context, keepalive_timeout=self._keepalive_expiry
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            request_class=_Request,
            response_class=_Response,
        )
        return self._session

    def _target(self, url: httpx.URL) -> URL:
        text = str(url)
        target = self._targets.get(text)
        if target is None:
            # Who it is from stands in the headers by now: httpx has seen to that.
            target = self._targets[text] = URL(text, encoded=True).with_user(None)
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
    text = str(error) or type(error).__name__
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout(text)
        case aiohttp.ClientConnectorError():
            return httpx.ConnectError(text if error.strerror else f"{text}: {error.os_error}")
        case _SpoiltConnectionError():
            return httpx.ConnectError(text)
        case aiohttp.InvalidURL() | aiohttp.NonHttpUrlClientError():
            return httpx.UnsupportedProtocol(text)
        case aiohttp.ServerTimeoutError():
            return httpx.ReadTimeout(text)
        case aiohttp.ClientOSError():
            return httpx.ReadError(text)
        case _:
            return httpx.RemoteProtocolError(text)
