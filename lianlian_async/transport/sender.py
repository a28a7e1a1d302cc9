"""One HTTP exchange over the shared client; foreign exceptions become *lost*, with or without *may have arrived*."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, cast

import anyio
import httpx

from lianlian_async.background import is_failure
from lianlian_async.errors import ConfigurationError
from lianlian_async.exchange import Delivery, HttpResponse, NoResponse
from lianlian_async.wire import MAX_MESSAGE_BYTES

from .default_client import HttpBackend, own_client
from .reasons import describe
from .tracked_request import Body, LeaseEndedError, WatchedRequest

__all__ = ["AsyncBaseTransport", "AsyncClient", "Transport", "asgi_transport"]

AsyncClient = httpx.AsyncClient
AsyncBaseTransport = httpx.AsyncBaseTransport

logger = logging.getLogger("lianlian_async")

_JSON: Final = "application/json;charset=utf-8"
_HEADERS: Final = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": "lianlian-async",
}

# Raised before the first byte of a request is written. All else may have arrived: also LocalProtocolError,
# which an HTTP/2 client raises for a stream that the server closed after it had the request, and InvalidURL,
# which httpx raises for the address of a redirect.
_NEVER_SENT: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    ConfigurationError,
    LeaseEndedError,
)


@lru_cache(maxsize=512)  # two addresses, and bodies of about the same length
def _head(url: str, content_type: str, length: int) -> tuple[httpx.URL, httpx.Headers]:
    """Where a request of ours goes, and all of its headers."""
    parsed = httpx.URL(url)
    headers = [(b"Host", parsed.netloc), (b"Content-Type", content_type.encode()), (b"Content-Length", b"%d" % length)]
    return parsed, httpx.Headers([*headers, *((name.encode(), text.encode()) for name, text in _HEADERS.items())])


class Transport:
    """The shared ``httpx.AsyncClient``, closed with the session unless it was given from outside."""

    def __init__(self, client: httpx.AsyncClient, *, owned: bool, lent: bool, content_type: str) -> None:
        self._client = client
        self._owned = owned
        self._lent = lent
        self._content_type = content_type

    @classmethod
    async def open(
        cls,
        client: httpx.AsyncClient | None,
        transport: httpx.AsyncBaseTransport | None,
        max_connections: int,
        content_type: str = _JSON,
        *,
        backend: HttpBackend | None = None,
        urls: Sequence[str] = (),
    ) -> Transport:
        """Over ``client`` if given, else over a client of our own, on ``transport`` if given.

        The proxies that lead to ``urls`` are checked at once; others when a request needs them.
        """
        owned, lent = client is None, transport is not None
        if client is None:
            client = await own_client(transport, max_connections, backend, urls)
        return cls(client, owned=owned, lent=lent, content_type=content_type)

    async def post(
        self, url: str, body: bytes, seconds: float, lease_holds: Callable[[], bool] = lambda: True
    ) -> Delivery:
        """POST ``body``, with at most half of ``seconds`` to connect.

        ``lease_holds`` is asked before anything is done, and again right before bytes leave, as far as the client
        lets us: on our own stacks, and on every client that is built on httpcore.
        Bound the whole call from outside: no time limit between two bytes ends an answer that trickles.
        Reads little more than 1 MiB of the answer, as it came; follows no redirect.
        """
        if self._client.is_closed:
            return NoResponse("the httpx client is closed", may_have_arrived=False)
        try:
            content = Body(body, lease_holds)
            content.check_lease()
            request = self._request(url, content, seconds)
        except Exception as error:  # noqa: BLE001 - a given client may raise anything, but it has sent nothing yet
            return NoResponse(describe(error, url, seconds / 2), may_have_arrived=False, cause=error)
        answered = False
        try:
            response = await self._client.send(request, stream=True, follow_redirects=False)
            answered = True
            try:
                raw = response.headers.raw
                headers = {name.lower().decode("latin-1"): text.decode("latin-1") for name, text in raw}
                received = await _read(response, headers)
            finally:
                await response.aclose()
        except BaseException as error:  # a client or transport may raise anything, and none of it may pass
            if not is_failure(error):
                raise
            sent = answered or not isinstance(error, _NEVER_SENT) or request.may_have_been_sent(error)
            return NoResponse(describe(error, url, seconds / 2), may_have_arrived=sent, cause=error)
        return HttpResponse(response.status_code, headers, received)

    def _request(self, url: str, body: Body, seconds: float) -> WatchedRequest:
        if not self._owned:  # its own headers, cookies and base URL count, too
            headers = {"Content-Type": self._content_type, **_HEADERS}
            timeout = httpx.Timeout(seconds, connect=seconds / 2)
            made = self._client.build_request("POST", url, content=body.content, headers=headers, timeout=timeout)
            return WatchedRequest(made.url, made.headers, body, **made.extensions)
        # Our own client has nothing to add, and looking for it costs more than all the rest of a request.
        target, head = _head(url, self._content_type, len(body.content))
        return WatchedRequest(target, head, body, timeout={"connect": seconds / 2, "pool": seconds})

    async def warm_up(self, url: str, connections: int, seconds: float) -> None:
        """Open that many connections to the server of ``url``, each by a HEAD request, within ``seconds``.

        What the server answers does not matter, and neither does a failure: who sends next will meet it again.
        """

        async def open_one() -> None:
            try:
                await self._client.head(url, headers=_HEADERS, follow_redirects=False, timeout=seconds)
            except Exception as error:  # noqa: BLE001 - as in post
                logger.info("no connection opened in advance: %s", describe(error, url, seconds))

        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as tasks:
                for _ in range(connections):
                    tasks.start_soon(open_one)

    async def aclose(self) -> None:
        """Close the client, if it is ours."""
        if self._owned:
            await self._client.aclose()

    async def discard(self) -> None:
        """Close only what :meth:`open` made: after an opening that failed, a given transport stays open."""
        if not self._lent:
            await self.aclose()


async def _read(response: httpx.Response, headers: Mapping[str, str]) -> bytes:
    if response.is_stream_consumed:  # by a hook of the given client, or by a transport that has it all at once
        return response.content
    stream = cast("httpx.AsyncByteStream", response.stream)  # as it came, unpacked by nobody
    if _is_short(headers):
        return b"".join([chunk async for chunk in stream])
    received = bytearray()
    with anyio.CancelScope() as enough:
        async for chunk in stream:
            received += chunk
            if len(received) > MAX_MESSAGE_BYTES:
                enough.cancel()  # not break: trio wants every generator inside to be run to its end
    return bytes(received)


def _is_short(headers: Mapping[str, str]) -> bool:
    """Whether the headers bind the body to the size of a message: most do, and need no watching."""
    length = headers.get("content-length", "")
    bound = length.isdecimal() and len(length) < 9 and int(length) <= MAX_MESSAGE_BYTES
    return bound and "transfer-encoding" not in headers  # which goes before


def asgi_transport(app: Any) -> httpx.AsyncBaseTransport:
    """A transport that calls an ASGI application in this process, such as the sandbox gateway."""
    return httpx.ASGITransport(app=app)
