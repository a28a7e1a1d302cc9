"""Notifications from the sandbox, on LianLian's schedule.

When a refund is final, its signed notification is POSTed to its ``notify_url`` every 2 minutes, at most 30 times, until
the response is HTTP 200 with ``ret_code`` 0000 within 5 seconds (LianLian's notification page).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import aclosing
from typing import Final, Self

import anyio
import attrs

from lianlian_async import asgi, wire
from lianlian_async.background import BackgroundTask
from lianlian_async.errors import MalformedMessage
from lianlian_async.exchange import HttpResponse, NoResponse
from lianlian_async.settings import check_seconds
from lianlian_async.transport import AsyncBaseTransport, HttpSender, check_http

from .gateway import SandboxGateway
from .ledger import Record

CONTENT_TYPE: Final = "text/json;charset=utf-8"
PATIENCE: Final = 5.0
"""Timeout of a delivery in seconds."""
_CONNECTIONS: Final = 64
"""Maximum number of concurrent deliveries."""


@attrs.frozen(kw_only=True)
class Delivery:
    """One POST and its result."""

    no_refund: str
    at: float
    """When the delivery ended with a response, an error or a timeout, in seconds of the gateway's clock."""
    body: bytes = attrs.field(repr=False)
    status: int | None
    """HTTP status; None: no response before the timeout."""
    acknowledged: bool

    def __str__(self) -> str:
        response = "no response" if self.status is None else f"HTTP {self.status}"
        return f"notification of {self.no_refund}: {response}, {'' if self.acknowledged else 'not '}acknowledged"


class Notifier:
    """Sends the notifications of all refunds of ``gateway`` while its ``async with`` block runs.

    The notifier is also an ASGI application that serves the gateway and sends notifications while the server runs.
    Delays follow the gateway's clock, so :meth:`SandboxGateway.advance` also shortens the wait for a delivery.

    Args:
        gateway: The gateway.
        transport: An httpx or httpx2 transport for the deliveries; default: the network.
        every: Seconds between two deliveries.
        times: Maximum number of deliveries of one notification.
        on_delivery: Called with each :class:`Delivery` after it ends.

    Raises ``ConfigurationError`` for an unsupported transport and a wrong ``every``.
    """

    def __init__(
        self,
        gateway: SandboxGateway,
        *,
        transport: AsyncBaseTransport | None = None,
        every: float = 120.0,
        times: int = 30,
        on_delivery: Callable[[Delivery], object] = lambda _: None,
    ) -> None:
        check_http(None, transport, None)
        self.deliveries: list[Delivery] = []
        """Every delivery so far, oldest first."""
        self._gateway = gateway
        self._http_transport = transport
        self._every = check_seconds("every", every, least=0, most=math.inf)
        self._times = times
        self._on_delivery = on_delivery
        self._begun = self._ended = 0

    @property
    def pending(self) -> int:
        """The number of refunds that still need deliveries, including refunds that are not final."""
        return len(self._gateway.refunds) - self._ended

    async def __aenter__(self) -> Self:
        self._transport = await HttpSender.open(None, self._http_transport, _CONNECTIONS, CONTENT_TYPE)
        self._slots = anyio.Semaphore(_CONNECTIONS)
        started = anyio.Event()
        self._background = BackgroundTask(lambda: self._run(started))
        await started.wait()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._background.aclose()
        await self._transport.aclose()

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve one ASGI connection to the gateway, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, self)
        else:
            await self._gateway(scope, receive, send)

    async def _run(self, started: anyio.Event) -> None:
        async with anyio.create_task_group() as self._tasks:
            started.set()
            while True:
                made = self._gateway.made
                self._start_new()
                await made.wait()

    def _start_new(self) -> None:
        """Start notifying about the refunds that were made since the last call."""
        for record in self._gateway.refunds[self._begun :]:
            self._begun += 1
            self._tasks.start_soon(self._notify, record)

    async def _notify(self, record: Record) -> None:
        await self._until(record.settles_at)
        body = self._gateway.notification(record)
        for _ in range(self._times):
            sent_at = self._gateway.now()
            if await self._send(record, body):
                break
            await self._until(sent_at + self._every)
        self._ended += 1

    async def _until(self, moment: float) -> None:
        while (seconds := moment - self._gateway.now()) > 0:
            with anyio.move_on_after(seconds):
                await self._gateway.advanced.wait()

    async def _send(self, record: Record, body: bytes) -> bool:
        """POST ``body`` once; return whether it was acknowledged."""
        async with self._slots:
            response = await post(self._transport, record.notify_url, body)
        delivery = Delivery(
            no_refund=record.no_refund,
            at=self._gateway.now(),
            body=body,
            status=response.status if isinstance(response, HttpResponse) else None,
            acknowledged=is_acknowledged(response),
        )
        self.deliveries.append(delivery)
        self._on_delivery(delivery)
        return delivery.acknowledged


async def post(sender: HttpSender, url: str, body: bytes, patience: float = PATIENCE) -> HttpResponse | NoResponse:
    """POST a notification; return the response, or why there is none after an error or ``patience`` seconds."""
    with anyio.move_on_after(patience):
        return await sender.post(url, body, patience)
    return NoResponse(f"timeout after {patience:g} s", may_have_arrived=True)


async def post_once(url: str, body: bytes, transport: AsyncBaseTransport | None = None) -> HttpResponse | NoResponse:
    """POST a notification on a connection of its own, like :func:`post`."""
    async with aclosing(await HttpSender.open(None, transport, 1, CONTENT_TYPE)) as sender:
        return await post(sender, url, body)


def is_acknowledged(response: HttpResponse | NoResponse) -> bool:
    """Return whether a response acknowledges a notification: HTTP 200 and ``ret_code`` 0000."""
    if isinstance(response, NoResponse) or response.status != 200:
        return False
    try:
        return wire.decode(response.body).get("ret_code") == "0000"
    except MalformedMessage:
        return False
