"""A proxy on a real socket that disturbs HTTP exchanges, cut at any byte of the request or the answer.

The proxy terminates TLS. It forwards what it received, also a part of a request, and the server decides what to do.
"""

from __future__ import annotations

import contextlib
import math
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from enum import StrEnum
from typing import Any, Literal

import anyio
import anyio.abc
import attrs
import httpx
from anyio.streams.tls import TLSStream

from lianlian_async.transport.connection import reset_when_closed

_LOST = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError)

STRAY = b'HTTP/1.1 200 OK\r\ncontent-length: 41\r\n\r\n{"ret_code":"1004","ret_msg":"no_refund"}'
"""A complete unsigned rejection that belongs to no request."""


class Cut(StrEnum):
    """What happens after the last byte that passes."""

    RESET = "reset"
    """RST."""
    TRUNCATE = "truncate"
    """The connection is closed; with TLS without close_notify."""
    HALF_CLOSE = "half-close"
    """FIN to the client, but the rest of the request is still forwarded."""
    STALL = "stall"
    """Nothing until the client gives up. A request that is complete at that time is held (``Proxy.held``)."""


class Form(StrEnum):
    """How the proxy writes an answer."""

    PLAIN = "plain"
    DRIP = "byte by byte"
    CHUNKED = "chunked with trailers"
    UNTIL_CLOSED = "without length, ended by closing, with TLS without close_notify"
    INTERIM = "after many 1xx responses"
    FLOOD = "1xx responses without end"
    SWAPPED = "the answer to an earlier request"
    STRAY = "followed by a second answer in the same segment"


@attrs.frozen
class Disturbance:
    """A disturbance of one exchange: at most one cut, after ``at`` bytes of the request or of the answer."""

    form: Form = Form.PLAIN
    cut: Cut | None = None
    side: Literal["request", "answer"] = "answer"
    at: int | None = None

    def __str__(self) -> str:
        return f"{self.form} answer" if self.cut is None else f"{self.cut} at byte {self.at} of {self.form} {self.side}"


FAIR = Disturbance()
LOST_ANSWER = Disturbance(cut=Cut.TRUNCATE, at=0)


def missing(message: bytes) -> float:
    """Return how many bytes of an HTTP message with Content-Length are missing; infinite if its head is incomplete."""
    head, separator, body = message.partition(b"\r\n\r\n")
    if not separator:
        return math.inf
    lines = head.lower().split(b"\r\n")
    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
    return max(0, length - len(body))


def dressed(form: Form, answer: bytes, earlier: bytes) -> bytes:
    """Return the bytes of ``answer`` in this form; ``earlier`` is the answer to an earlier request."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length:")]
    match form:
        case Form.CHUNKED:
            half = len(body) // 2
            chunks = b"".join(b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in (body[:half], body[half:]) if part)
            trailers = b"0\r\ncontent-length: 3\r\nx-checksum: none\r\n\r\n"
            return b"\r\n".join([*lines, b"transfer-encoding: chunked", b"", chunks]) + trailers
        case Form.UNTIL_CLOSED:
            return b"\r\n".join([*lines, b"connection: close", b"", body])
        case Form.INTERIM:
            return b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n" * 100 + answer
        case Form.SWAPPED:
            return earlier or answer
        case Form.STRAY:
            return answer + STRAY
    return answer


@attrs.define(eq=False)
class _Client:
    """The client's end of a connection."""

    stream: anyio.abc.ByteStream
    sock: Any

    async def receive(self, limit: float, received: bytes = b"") -> bytes:
        """Return ``received`` and the following bytes, up to ``limit`` or the end of the request."""
        while len(received) < limit and (more := missing(received)):
            received += await self.stream.receive(int(min(limit - len(received), more, 65536)))
        return received

    async def until_gone(self) -> bytes:
        """Wait until the client closes or resets the connection; return the bytes that still came."""
        received = b""
        with contextlib.suppress(*_LOST):
            while True:
                received += await self.stream.receive()
        return received


@attrs.define(eq=False)
class Proxy:
    """Forwards exchanges to ``upstream``; ``plan`` are the disturbances of the next exchanges."""

    upstream: Callable[[bytes], Awaitable[bytes]]
    """Takes a request, or a part of one, and returns the answer."""
    tls: ssl.SSLContext | None = None
    next_disturbance: Callable[[], Disturbance] | None = None
    """Used when ``plan`` is empty."""
    port: int = 0
    plan: deque[Disturbance] = attrs.field(factory=deque)
    held: list[bytes] = attrs.field(factory=list)
    """Requests of clients that gave up; forward them later, or never."""
    request: bytes = b""
    """The last complete request."""
    answer: bytes = b""
    """The last answer of the server."""
    success: bytes = b""
    """The last answer with ret_code 0000."""

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    async def serve(self, tcp: anyio.abc.SocketStream) -> None:
        """Serve one connection."""
        sock = tcp.extra(anyio.abc.SocketAttribute.raw_socket)
        async with tcp:
            with contextlib.suppress(*_LOST, OSError):
                stream: anyio.abc.ByteStream = tcp
                if self.tls is not None:
                    stream = await TLSStream.wrap(
                        tcp, server_side=True, ssl_context=self.tls, standard_compatible=False
                    )
                client, received = _Client(stream, sock), b""
                while await self._exchange(client, self._next(), received):
                    received = await stream.receive()  # the next exchange begins with its first byte

    def _next(self) -> Disturbance:
        if self.plan:
            return self.plan.popleft()
        return FAIR if self.next_disturbance is None else self.next_disturbance()

    async def _exchange(self, client: _Client, disturbance: Disturbance, received: bytes) -> bool:
        """Carry one exchange; return whether the connection stays open."""
        cut, at = disturbance.cut, math.inf if disturbance.at is None else disturbance.at
        if cut is not None and disturbance.side == "request":
            received = await client.receive(at, received)
            received, rest = received[: int(at)], received[int(at) :]
            if cut is Cut.HALF_CLOSE:
                _send_fin(client.sock)
                await self.forward(await client.receive(math.inf, received + rest))
                return False
            await self.forward(received)
            if cut is Cut.STALL:
                rest += await client.until_gone()
                if rest and not missing(received + rest):
                    self.held.append(received + rest)
            elif cut is Cut.RESET:
                reset_when_closed(client.sock)
            return False
        earlier, received = self.success, await client.receive(math.inf, received)
        written = dressed(disturbance.form, await self.forward(received), earlier)
        if disturbance.form is Form.FLOOD:
            while True:
                await client.stream.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
                await anyio.sleep(0.5)
        for piece in _pieces(written, disturbance):
            await client.stream.send(piece)
        match cut:
            case None:
                return disturbance.form is not Form.UNTIL_CLOSED
            case Cut.RESET:
                reset_when_closed(client.sock)
            case Cut.HALF_CLOSE:
                _send_fin(client.sock)
                await client.until_gone()
            case Cut.STALL:
                await client.until_gone()
                await client.stream.send(written[int(at) :])
        return False

    async def forward(self, request: bytes) -> bytes:
        """Forward ``request``, and return the server's answer."""
        answer = await self.upstream(request)
        if not missing(request):
            self.request, self.answer = request, answer
            if b'"0000"' in answer:
                self.success = answer
        return answer


def to_port(port: int) -> Callable[[bytes], Awaitable[bytes]]:
    """Return an upstream on a loopback port; it does not wait for the answer to an incomplete request."""

    async def forward(request: bytes) -> bytes:
        async with await anyio.connect_tcp("127.0.0.1", port) as server:
            if request:
                await server.send(request)
            answer = b""
            while missing(answer) and not missing(request):
                answer += await server.receive()
        return answer

    return forward


def to_app(app: Any) -> Callable[[bytes], Awaitable[bytes]]:
    """Return an upstream that is an ASGI application, which gets even an incomplete body once the head is complete."""
    transport = httpx.ASGITransport(app)

    async def forward(request: bytes) -> bytes:
        head, separator, body = request.partition(b"\r\n\r\n")
        if not separator:
            return b""
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = [line.split(": ", 1) for line in lines]
        answer = await transport.handle_async_request(
            httpx.Request(method, f"http://gateway{path}", headers=headers, content=body)
        )
        fields = b"".join(b"%b: %b\r\n" % each for each in answer.headers.raw)
        return b"HTTP/1.1 %d OK\r\n%b\r\n%b" % (answer.status_code, fields, await answer.aread())

    return forward


def _send_fin(sock: Any) -> None:
    sock.shutdown(socket.SHUT_WR)


def _pieces(written: bytes, disturbance: Disturbance) -> Iterator[bytes]:
    if disturbance.form is Form.DRIP:
        yield from (written[at : at + 1] for at in range(len(written)))
    elif disturbance.at != 0:
        yield written[: disturbance.at]


@contextlib.asynccontextmanager
async def proxies(*served: Proxy) -> AsyncIterator[None]:
    """Serve every proxy on a loopback port of its own while the block runs."""
    async with contextlib.AsyncExitStack() as listeners, anyio.create_task_group() as tasks:
        for proxy in served:
            listener = await listeners.enter_async_context(
                await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
            )
            proxy.port = listener.extra(anyio.abc.SocketAttribute.local_port)
            tasks.start_soon(listener.serve, proxy.serve)
        yield
        tasks.cancel_scope.cancel()
