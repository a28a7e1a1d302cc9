"""The external parties of the core tests: refund requests, a sandbox on virtual time, HTTP servers on sockets.

No object in this module replaces a part of the library.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import anyio
import anyio.abc
import attrs

from lianlian_async import RefundRequest, wire
from lianlian_async.clock import Moment
from lianlian_async.sandbox import SandboxGateway
from lianlian_async.signing import SigningKey, signature_source
from tests.support import keypairs

EPOCH = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
"""The wall-clock time at the start of virtual time."""

OID_PARTNER = "201103171000000000"


def wall_clock() -> datetime:
    """Return the wall-clock time for the event loop's virtual time."""
    return EPOCH + timedelta(seconds=anyio.current_time())


def boot_clock() -> Moment:
    """Return the clocks of a machine that was booted at the start of virtual time."""
    return Moment(wall_clock(), anyio.current_time(), "this boot")


def refund_request(number: int | str = 1, **overrides: Any) -> RefundRequest:
    """Return a request for a refund of 10.00 yuan with the number R-``number`` and a separate order."""
    fields = {
        "no_refund": f"R-{number}",
        "dt_refund": EPOCH,
        "money_refund": Decimal("10.00"),
        "no_order": f"O-{number}",
        "dt_order": EPOCH - timedelta(days=3),
    }
    return RefundRequest(**fields | overrides)


def sandbox(**options: Any) -> SandboxGateway:
    """Return a sandbox with the tests' keys on the event loop's clock; other orders are worth 10.00 yuan each."""
    settings: dict[str, Any] = {
        "oid_partner": OID_PARTNER,
        "merchant_key": keypairs.pair("merchant").private,
        "gateway_key": keypairs.pair("gateway").private,
        "default_order": Decimal("10.00"),
        "clock": anyio.current_time,
    }
    if "started_at" not in options:
        settings["started_at"] = wall_clock()
    return SandboxGateway(**settings | options)


def sealed(fields: Mapping[str, str], key: SigningKey | None = None) -> dict[str, str]:
    """Return ``fields`` with a signature of the gateway, or of another ``key``."""
    key = key or keypairs.pair("gateway").private
    unsigned = {**fields, "sign_type": "RSA"}
    return {**unsigned, "sign": key.sign(signature_source(unsigned))}


def made(asked: Mapping[str, str], key: SigningKey | None = None, **changes: str | None) -> dict[str, str]:
    """Return the signed 0000 answer for the requested refund; None omits a field."""
    fields: dict[str, str | None] = {
        "ret_code": "0000",
        "ret_msg": "交易成功",
        "oid_partner": asked["oid_partner"],
        "no_refund": asked.get("no_refund", "R-1"),
        "dt_refund": asked["dt_refund"],
        "money_refund": asked.get("money_refund", "10.00"),
        "oid_refundno": asked.get("oid_refundno", "2013051613121201"),
        "sta_refund": "0",
        **changes,
    }
    return sealed({name: text for name, text in fields.items() if text is not None}, key)


# ── servers on sockets ───────────────────────────────────────────────────────────────────────────


@attrs.define(eq=False)
class Connection:
    """One connection of a :class:`Server`: its number and its byte stream."""

    number: int
    stream: anyio.abc.ByteStream
    unread: bytes = b""

    async def request(self) -> tuple[bytes, bytes] | None:
        """Return the next request's head and body; None after the client has closed the connection."""
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while b"\r\n\r\n" not in self.unread:
                self.unread += await self.stream.receive()
            head, _, rest = self.unread.partition(b"\r\n\r\n")
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            while len(rest) < length:
                rest += await self.stream.receive()
            self.unread = rest[length:]
            return head, rest[:length]
        return None

    async def respond(self, body: bytes, status: str = "200 OK", headers: str = "") -> None:
        """Send one complete response."""
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        await self.stream.send(head.encode() + body)


Handler = Callable[[Connection], Awaitable[None]]


@attrs.define(eq=False)
class Server:
    """Counts connections on a loopback port; ``handler`` is called for each connection."""

    handler: Handler
    port: int = 0
    opened: int = 0
    open: int = 0
    requests: list[tuple[int, bytes, bytes]] = attrs.field(factory=list)
    """The connection's number, the head and the body of each request that :func:`answering` handled."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, stream: anyio.abc.ByteStream) -> None:
        self.opened += 1
        self.open += 1
        try:
            async with stream:
                with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                    await self.handler(Connection(self.opened, stream))
        finally:
            self.open -= 1


@contextlib.asynccontextmanager
async def serving(handler: Handler, *, tls: Any = None) -> AsyncIterator[Server]:
    """Serve on a loopback port while the block runs."""
    from anyio.streams.tls import TLSListener

    server = Server(handler)
    tcp = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    server.port = tcp.extra(anyio.abc.SocketAttribute.local_port)
    listener: Any = tcp if tls is None else TLSListener(tcp, tls, standard_compatible=False)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server.serve)
        try:
            yield server
        finally:
            tasks.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def answering(body: bytes = b"{}", status: str = "200 OK", headers: str = "") -> AsyncIterator[Server]:
    """Serve the same response to every request, and keep connections alive."""

    async def handler(connection: Connection) -> None:
        while (request := await connection.request()) is not None:
            server.requests.append((connection.number, *request))
            await connection.respond(body, status, headers)

    async with serving(handler) as server:
        yield server


async def trickling(connection: Connection) -> None:
    """Respond to each request with ``{ }``, sent slowly: one byte every millisecond."""
    while await connection.request() is not None:
        await connection.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n")
        for byte in (b"{", b" ", b"}"):
            await anyio.sleep(0.001)
            await connection.stream.send(byte)


def unused_port() -> int:
    """Return a loopback port on which no server listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port: int = reserved.getsockname()[1]
        return port


def as_json(fields: Mapping[str, str]) -> bytes:
    """Return ``fields`` as JSON bytes, as the gateway sends them."""
    return wire.encode(fields)
