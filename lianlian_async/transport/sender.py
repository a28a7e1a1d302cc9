"""Send one HTTP request and return its response, or a ``NoResponse`` that states whether it may have arrived.

:func:`probe_server` examines the connection to a server.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any, Final, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import httpx

from lianlian_async.background import asyncio_loop, is_failure
from lianlian_async.clock import parse_http_date, system_clock
from lianlian_async.errors import ConfigurationError, GatewayUnavailable
from lianlian_async.exchange import Delivery, HttpResponse, NoResponse
from lianlian_async.version import USER_AGENT
from lianlian_async.wire import MAX_MESSAGE_BYTES

from .connection import discard_if_bytes_follow, proxy_for, trace_loopback
from .own_transport import AsyncBaseTransport, AsyncClient, HttpBackend, library_of, own_transport
from .pool import PoolTransport
from .tracked_request import Body, SendRefusedError, TrackedRequest, request_classes

logger = logging.getLogger("lianlian_async")

_JSON: Final = "application/json;charset=utf-8"
_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}

# A caller's client or transport raises these before the first byte of a request is written. After any other exception
# the request may have arrived. This includes LocalProtocolError, which an HTTP/2 client raises if the server closed the
# stream after the request, and InvalidURL, which httpx raises for the address of a redirect.
_NEVER_SENT: Final = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol")

_CLOSED: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError)  # by version of Python


@lru_cache(maxsize=512)  # saves 8 % of the CPU time of a refund; there are two URLs and few lengths
def _head(library: Any, url: str, content_type: str, length: int) -> tuple[httpx.URL, httpx.Headers]:
    """Return the URL and the headers of a request that is sent without a caller's client."""
    parsed = library.URL(url)
    headers = [(b"Host", parsed.netloc), (b"Content-Type", content_type.encode()), (b"Content-Length", b"%d" % length)]
    headers += [(name.encode(), text.encode()) for name, text in _HEADERS.items()]
    return parsed, library.Headers(headers)


class HttpSender:
    """Sends requests over a caller's client, which stays open, or over a transport, which :meth:`aclose` closes."""

    def __init__(self, over: AsyncClient | AsyncBaseTransport, content_type: str) -> None:
        self._over: Any = over
        self._library: Any = library_of(over)
        self._is_client = isinstance(over, self._library.AsyncClient)
        self._request_class, self._body_class = request_classes(self._library)
        foreign = (getattr(self._library, name) for name in _NEVER_SENT)
        self._never_sent = (*foreign, ConfigurationError, SendRefusedError)
        self._content_type = content_type
        self._is_closed = False
        self._is_own = type(over).__module__.startswith(f"{__package__}.")
        self.backend: str = "aiohttp" if type(over).__name__ == "AiohttpTransport" else self._library.__name__

    @classmethod
    async def open(
        cls,
        client: AsyncClient | None,
        transport: AsyncBaseTransport | None,
        max_connections: int,
        content_type: str = _JSON,
        *,
        backend: HttpBackend | None = None,
        urls: Sequence[str] = (),
    ) -> HttpSender:
        """Return a sender over ``client`` or ``transport`` if given, else over the library's own transport.

        The library's own transport checks the proxies for ``urls`` now, other proxies when it opens a connection.
        """
        given = transport if client is None else client  # not `or`: a mocked transport with a length may be false
        if given is None:
            make = partial(own_transport, max_connections, backend, urls, on_asyncio=asyncio_loop() is not None)
            given = await anyio.to_thread.run_sync(make)
        return cls(given, content_type)

    async def post(
        self,
        url: str,
        body: bytes,
        seconds: float,
        lease_holds: Callable[[], bool] = lambda: True,
        added: Mapping[str, str] | None = None,
        *,
        not_sent: Callable[[], object] = lambda: None,
    ) -> Delivery:
        """POST ``body`` with the headers ``added``, with at most half of ``seconds`` to connect; follow no redirect.

        ``lease_holds`` is called first; if the transport is the library's own or built on httpcore, also right before
        the request is written. The caller must limit the time of the whole call: a client's read timeout restarts with
        each read, and a transport has none. ``not_sent`` is called if a cancellation ends the call before the body was
        read. Reads little more than 64 KiB of the response, without decompressing it.
        """
        if self._is_closed or (self._is_client and self._over.is_closed):
            return NoResponse("the HTTP client is closed", may_have_arrived=False)
        try:
            content = self._body_class(body, lease_holds)
            content.check_lease()
            request = self._request(url, content, seconds)
            if added:
                request.headers.update(added)
        except Exception as error:  # noqa: BLE001 - a caller's client may raise anything; nothing was sent yet
            return NoResponse(describe(error, url, seconds / 2, self._library), may_have_arrived=False, cause=error)
        answered = False
        try:
            response = await self._send(request)
            answered = True
            try:
                headers = {
                    name.lower().decode("latin-1"): text.decode("latin-1") for name, text in response.headers.raw
                }
                received = await _read(response)
                discard_if_bytes_follow(response)
            finally:
                await response.aclose()
        except BaseException as error:  # a client or transport may raise anything
            content.lease_holds = lambda: False  # a transport that goes on in the background cannot read the body
            if not is_failure(error):
                if not answered and request.is_unread:
                    not_sent()
                raise
            # Our own transports read the body right before they write it.
            is_not_sent = isinstance(error, self._never_sent) or (self._is_own and request.is_unread)
            sent = answered or not is_not_sent or request.may_have_been_sent(error)
            return NoResponse(describe(error, url, seconds / 2, self._library), may_have_arrived=sent, cause=error)
        # Our own transports send once, but a mock of httpx below them, such as respx, reads the body, too.
        sends = 1 if self._is_own else max(1, content.sends)
        return HttpResponse(response.status_code, headers, received, sends)

    def _request(self, url: str, body: Body, seconds: float) -> TrackedRequest:
        if self._is_client:  # the client may add headers, cookies and a base URL
            headers = {"Content-Type": self._content_type, **_HEADERS}
            timeout = self._library.Timeout(seconds, connect=seconds / 2)
            made = self._over.build_request("POST", url, content=body.content, headers=headers, timeout=timeout)
            return self._request_class(made.url, made.headers, body, **made.extensions)
        target, head = _head(self._library, url, self._content_type, len(body.content))
        return self._request_class(target, head, body, timeout={"connect": seconds / 2, "pool": seconds})

    async def _send(self, request: httpx.Request) -> httpx.Response:
        if self._is_client:
            response = await self._over.send(request, stream=True, follow_redirects=False)
        else:
            response = await self._over.handle_async_request(request)
        return cast("httpx.Response", response)  # or httpx2's, which has the same attributes

    async def warm_up(self, url: str, connections: int, seconds: float) -> None:
        """Open ``connections`` connections to the server of ``url`` with HEAD requests, within ``seconds``.

        Responses are ignored; failures are only logged, because the next request reports them.
        """

        async def open_one() -> None:
            try:
                response = await self._send(_head_request(self._library, url, seconds))
                await response.aread()  # keeps the connection for the next request
            except Exception as error:  # noqa: BLE001 - as in post
                logger.info("no connection opened in advance: %s", describe(error, url, seconds, self._library))

        with anyio.move_on_after(seconds):
            async with anyio.create_task_group() as tasks:
                for _ in range(connections):
                    tasks.start_soon(open_one)

    async def aclose(self) -> None:
        """Refuse further requests, and close the transport; a caller's client stays open."""
        self._is_closed = True
        if not self._is_client:
            await self._over.aclose()


async def _read(response: httpx.Response) -> bytes:
    if response.is_stream_consumed:  # by a hook of the caller's client, or by a mocked transport
        return response.content
    received = bytearray()
    with anyio.CancelScope() as enough:
        async for chunk in cast("httpx.AsyncByteStream", response.stream):
            if received:  # one segment may have thousands of chunks: let other tasks run, and notice a cancellation
                await anyio.lowlevel.checkpoint()
            received += chunk
            if len(received) > MAX_MESSAGE_BYTES:
                enough.cancel()  # not break: on trio every inner async generator must be exhausted
    return bytes(received)


def _head_request(library: Any, url: str, seconds: float) -> httpx.Request:
    extensions = {"timeout": library.Timeout(seconds).as_dict(), "trace": partial(trace_loopback, library.URL(url))}
    return cast("httpx.Request", library.Request("HEAD", url, headers=_HEADERS, extensions=extensions))


async def probe_server(url: str, seconds: float = 10.0) -> tuple[str | None, float | None, str, datetime | None]:
    """Send a HEAD request to ``url`` over a new connection of :class:`PoolTransport`, within ``seconds``.

    Return: the proxy's URL without credentials (None: direct); by how many seconds this machine's wall clock is ahead
    of the server's (None: no usable ``Date``); the certificate's issuer and expiry (empty and None: no TLS).
    Raises ``GatewayUnavailable``, or ``ConfigurationError`` if the proxy or the CA certificates are unusable.
    """
    proxy = proxy_for(httpx.URL(url))
    async with await anyio.to_thread.run_sync(PoolTransport, 1) as transport:  # in a thread: reads the CA files
        try:
            with anyio.fail_after(seconds):
                response = await transport.handle_async_request(_head_request(httpx, url, seconds))
                tls = response.extensions["network_stream"].get_extra_info("ssl_object")
                certificate = None if tls is None else tls.getpeercert()
                await response.aread()
        except (httpx.TransportError, TimeoutError) as error:
            reason = describe(error, url, seconds)
            raise GatewayUnavailable(reason, attempts=1, last_error=reason, ret_code=None) from error
    date, issuer, expires_at = parse_http_date(response.headers.get("date", "")), "", None
    if certificate is not None:
        names = dict(chain.from_iterable(certificate["issuer"]))
        issuer = names.get("organizationName") or names.get("commonName", "")
        expires_at = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
    ahead = None if date is None else (system_clock().wall - date).total_seconds()
    return None if proxy is None else str(proxy.url), ahead, issuer, expires_at


def asgi_transport(app: Any) -> httpx.AsyncBaseTransport:
    """Return a transport that calls an ASGI application in this process, such as the sandbox gateway."""
    return httpx.ASGITransport(app=app)


def describe(error: BaseException, url: str, connect_seconds: float, library: Any = httpx) -> str:
    """Return a message with the type, the cause and the notes of ``error`` (such as the proxy)."""
    if isinstance(error, SendRefusedError):  # its type would suggest that the connection failed
        return str(error)
    is_transport, causes = isinstance(error, library.TransportError), list(islice(_causes(error), 20))
    # Other exceptions in the chain show internals of httpcore, anyio and trio, such as "pop from an empty deque".
    kinds = (library.TransportError, OSError) if is_transport else BaseException
    cause = next((str(each) for each in causes if isinstance(each, kinds) and str(each)), "")
    is_tls = url.startswith("https:") and any(isinstance(each, (ssl.SSLError, *_CLOSED)) for each in causes)
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2]  # a notify_url may contain a password
    if isinstance(error, library.ConnectTimeout):
        cause = f"no connection to {host} within {connect_seconds:g} s"
    elif is_tls and isinstance(error, library.ConnectError):
        if any(isinstance(each, _CLOSED) for each in causes):
            cause = "the connection was closed or reset"
        cause = f"the TLS handshake with {host} failed: {cause}"
    elif is_transport and not cause:
        is_timeout = isinstance(error, library.TimeoutException)
        cause = f"no answer from {host} in time" if is_timeout else f"the connection to {host} was lost"
    if "_ALERT_" in cause:
        cause += f"; {host} may require a client certificate"
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {cause}".rstrip(": ") + notes


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
