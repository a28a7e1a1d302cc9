"""One HTTP exchange over the shared client; foreign exceptions become *lost*, with or without *may have arrived*."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

import anyio
import anyio.to_thread
import httpx

from lianlian_async.exchange import Answer, Delivery, Lost
from lianlian_async.wire import MAX_MESSAGE_BYTES

from .pool import PoolTransport

__all__ = ["AsyncBaseTransport", "AsyncClient", "Transport", "asgi_transport"]

AsyncClient = httpx.AsyncClient
AsyncBaseTransport = httpx.AsyncBaseTransport

_JSON: Final = "application/json;charset=utf-8"
_HEADERS: Final = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "lianlian-async",
}

# Raised before the first byte of a request is written. All else may have arrived: also LocalProtocolError,
# which an HTTP/2 client raises for a stream that the server closed after it had the request.
_NEVER_SENT: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
)


class _Body(httpx.ByteStream):
    """A request's body that knows whether anybody has begun to send it.

    A given client may have layers of its own, such as a transport that retries or a hook that calls another
    server: what they raise after a first send looks as if nothing had been sent.
    """

    begun = False

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        return super().__iter__()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _AsyncIterator(iter(self))


class _AsyncIterator(AsyncIterator[bytes]):
    """Not a generator: one that is cancelled while it sends would be left to trio's garbage collector."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


class Transport:
    """The shared ``httpx.AsyncClient``, closed with the session unless it was given from outside."""

    def __init__(self, client: httpx.AsyncClient, *, owned: bool, content_type: str = _JSON) -> None:
        self._client = client
        self._owned = owned
        self._headers = {"Content-Type": content_type, **_HEADERS}
        self._raw_headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        self._targets: dict[str, httpx.URL] = {}

    @classmethod
    async def open(
        cls,
        client: httpx.AsyncClient | None,
        transport: httpx.AsyncBaseTransport | None,
        max_connections: int,
        content_type: str = _JSON,
    ) -> Transport:
        """Over ``client`` if given, else over a client of our own, on ``transport`` if given."""
        owned = client is None
        if client is None:
            client = await anyio.to_thread.run_sync(_make_client, transport, max_connections)
        return cls(client, owned=owned, content_type=content_type)

    async def post(self, url: str, body: bytes, seconds: float) -> Delivery:
        """POST ``body``, with at most ``seconds`` for each of the exchange's steps and half of it to connect.

        Bound the whole call from outside: a server that sends a byte now and then never times out by itself.
        Reads little more than 1 MiB of the answer, as it came; follows no redirect.
        """
        if self._client.is_closed:
            return Lost("the httpx client is closed", may_have_arrived=False)
        try:
            request = self._request(url, body, seconds)
        except Exception as error:  # noqa: BLE001 - a given client may raise anything, but it has sent nothing yet
            return Lost(_describe(error), may_have_arrived=False, cause=error)
        request.stream = watched = _Body(body)
        try:
            response = await self._client.send(request, stream=True, follow_redirects=False)
            try:
                received = await _read(response)
            finally:
                await response.aclose()
        except _NEVER_SENT as error:
            return Lost(_describe(error), may_have_arrived=watched.begun, cause=error)
        except Exception as error:  # noqa: BLE001 - a client or transport may raise anything, and none of it may pass
            return Lost(_describe(error), may_have_arrived=True, cause=error)
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers.raw}
        return Answer(response.status_code, headers, received)

    def _request(self, url: str, body: bytes, seconds: float) -> httpx.Request:
        timeout = httpx.Timeout(seconds, connect=seconds / 2)
        if not self._owned:  # its own headers, cookies and base URL count, too
            return self._client.build_request("POST", url, content=body, headers=self._headers, timeout=timeout)
        # Our own client has nothing to add, and looking for it costs more than all the rest of a request.
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = httpx.URL(url)
        extensions = {"timeout": timeout.as_dict()}
        return httpx.Request("POST", target, content=body, headers=self._raw_headers, extensions=extensions)

    async def aclose(self) -> None:
        """Close the client, if it is ours."""
        if self._owned:
            await self._client.aclose()


async def _read(response: httpx.Response) -> bytes:
    if response.is_stream_consumed:  # by a hook of the given client, or by a transport that has it all at once
        return response.content
    received = bytearray()
    with anyio.CancelScope() as enough:
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > MAX_MESSAGE_BYTES:
                enough.cancel()  # not break: trio wants every generator inside to be run to its end
    return bytes(received)


def _make_client(transport: httpx.AsyncBaseTransport | None, max_connections: int) -> httpx.AsyncClient:
    # Our own pool loads the CA bundle (tens of milliseconds): hence this runs in a thread.
    return httpx.AsyncClient(transport=transport or PoolTransport(max_connections))


def asgi_transport(app: Any) -> httpx.AsyncBaseTransport:
    """A transport that calls an ASGI application in this process, such as the sandbox gateway."""
    return httpx.ASGITransport(app=app)


def _describe(error: Exception) -> str:
    told: BaseException = error
    while not str(told) and told.__context__ is not None:  # on trio the words often stand with the cause
        told = told.__context__
    return f"{type(error).__name__}: {told}".rstrip(": ")
