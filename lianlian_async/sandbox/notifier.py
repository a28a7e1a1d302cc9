"""Notifications from the sandbox, on LianLian's schedule, with faults on request.

When a refund is final, its signed notification is POSTed to its ``notify_url`` every 2 minutes, at most 30 times, until
the response is HTTP 200 with ``ret_code`` 0000 within 5 seconds (LianLian's notification page).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import aclosing
from enum import Enum
from random import Random
from typing import Final, Self

import anyio
import attrs

from lianlian_async import asgi, wire
from lianlian_async.background import BackgroundTask
from lianlian_async.errors import ConfigurationError, MalformedMessage
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


class NotificationFault(Enum):
    """A fault of a refund's notifications. The gateway's own faults are :class:`.Fault`."""

    EARLY = "early"
    """The refund is final at once. If the notifier serves the gateway, the notification precedes the apply response."""
    DUPLICATED = "duplicated"
    """The notification is sent once more after the last delivery."""
    CONCURRENT = "concurrent"
    """Each scheduled delivery is sent three times concurrently."""
    REORDERED = "reordered"
    """A notification with the state *initialized* is sent after the one with the final state."""
    TAMPERED = "tampered"
    """Before each scheduled delivery, a forgery is sent: another amount with the genuine signature."""
    REPLAYED = "replayed"
    """The notification is sent once more, ``every`` seconds after the last delivery."""


@attrs.frozen(kw_only=True)
class Delivery:
    """One POST and its result."""

    no_refund: str
    at: float
    """When the delivery ended with a response, an error or a timeout, in seconds of the gateway's clock."""
    body: bytes = attrs.field(repr=False)
    forged: bool
    status: int | None
    """HTTP status; None: an error, or no response before the timeout."""
    acknowledged: bool

    def __str__(self) -> str:
        kind = "forgery" if self.forged else "notification"
        response = "no response" if self.status is None else f"HTTP {self.status}"
        return f"{kind} of {self.no_refund}: {response}, {'' if self.acknowledged else 'not '}acknowledged"


class Notifier:
    """Sends the notifications of all refunds of ``gateway`` while its ``async with`` block runs.

    The notifier is also an ASGI application that serves the gateway and sends notifications while the server runs.
    Delays follow the gateway's clock, so :meth:`SandboxGateway.advance` also shortens the wait for a delivery.

    Args:
        gateway: The sandbox gateway whose refunds are notified.
        transport: An httpx or httpx2 transport for the deliveries; default: the network.
        every: Seconds between two deliveries.
        times: Maximum number of deliveries of one notification.
        faults: Probability of each :class:`NotificationFault` per refund.
        seed: Seed of the random faults.
        on_delivery: Called with each :class:`Delivery` after it ends. If it raises, the notifications stop, and the end
            of the ``async with`` block raises the error in an ``ExceptionGroup``, unless the block itself raises.

    Raises ``ConfigurationError`` for an unsupported transport, a wrong ``every``, and a probability below 0 or above 1.
    """

    def __init__(
        self,
        gateway: SandboxGateway,
        *,
        transport: AsyncBaseTransport | None = None,
        every: float = 120.0,
        times: int = 30,
        faults: Mapping[NotificationFault, float] | None = None,
        seed: int = 0,
        on_delivery: Callable[[Delivery], object] = lambda _: None,
    ) -> None:
        check_http(None, transport, None)
        self._faults = dict(faults or {})
        if any(not 0 <= share <= 1 for share in self._faults.values()):
            raise ConfigurationError("faults: each probability must be from 0 to 1")
        self.deliveries: list[Delivery] = []
        """Every delivery that has ended, oldest first."""
        self._gateway = gateway
        self._http_transport = transport
        self._every = check_seconds("every", every, least=0, most=math.inf)
        self._times = times
        self._random = Random(seed)  # noqa: S311 - the same seed gives the same faults
        self._on_delivery = on_delivery
        self._begun = self._ended = 0

    @property
    def pending(self) -> int:
        """The number of refunds that still need deliveries, including refunds that are not final."""
        return len(self._gateway.refunds) - self._ended

    async def __aenter__(self) -> Self:
        self._transport = await HttpSender.open(None, self._http_transport, _CONNECTIONS, CONTENT_TYPE, backend="httpx")
        self._slots = anyio.Semaphore(_CONNECTIONS)
        self._gateway.advance(0)  # replaces its events: they belong to the event loop in which a task waited for them
        started, self._errors = anyio.Event(), list[BaseException | None]()
        self._background = BackgroundTask(lambda: self._run(started), self._errors.append)
        await started.wait()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        await self._background.aclose()
        await self._transport.aclose()
        if exc_type is None and (error := self._errors[0]) is not None:
            raise error

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve one ASGI connection to the gateway, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, self)
            return

        async def send_after_early(message: asgi.Message) -> None:
            if message["type"] == "http.response.start":
                for delivered in self._start_new():
                    await delivered.wait()
            await send(message)

        await self._gateway(scope, receive, send_after_early)

    async def _run(self, started: anyio.Event) -> None:
        async with anyio.create_task_group() as self._tasks:
            started.set()
            while True:
                made = self._gateway.made
                self._start_new()
                with anyio.move_on_after(self._gateway.next_late):
                    await made.wait()

    def _start_new(self) -> list[anyio.Event]:
        """Start notifying about new refunds; return, for each early one, an event that its first delivery sets."""
        records = self._gateway.refunds[self._begun :]
        self._begun += len(records)
        early = []
        for record in records:
            faults = {each for each, share in self._faults.items() if self._random.random() < share}
            delivered = anyio.Event()
            if NotificationFault.EARLY in faults:
                record.settles_at = self._gateway.now()
                early.append(delivered)
            self._tasks.start_soon(self._notify, record, faults, delivered)
        return early

    async def _notify(self, record: Record, faults: set[NotificationFault], delivered: anyio.Event) -> None:
        await self._until(record.settles_at)
        body = self._gateway.notification(record)
        fields = wire.decode(body)
        for _ in range(self._times):
            sent_at = self._gateway.now()
            if NotificationFault.TAMPERED in faults:
                forgery = fields | {"money_refund": wire.format_money(record.money_refund + 1)}
                await self._send(record, wire.encode(forgery), forged=True)
            async with anyio.create_task_group() as tasks:
                for _ in range(2 if NotificationFault.CONCURRENT in faults else 0):
                    tasks.start_soon(self._send, record, body)
                acknowledged = await self._send(record, body)
            delivered.set()
            if acknowledged:
                break
            await self._until(sent_at + self._every)
        if NotificationFault.REORDERED in faults:
            await self._send(record, self._gateway.notification(record, at=-math.inf))
        if NotificationFault.DUPLICATED in faults:
            await self._send(record, body)
        if NotificationFault.REPLAYED in faults:
            await self._until(self._gateway.now() + self._every)
            await self._send(record, body)
        self._ended += 1

    async def _until(self, moment: float) -> None:
        while (seconds := moment - self._gateway.now()) > 0:
            with anyio.move_on_after(seconds):
                await self._gateway.advanced.wait()

    async def _send(self, record: Record, body: bytes, forged: bool = False) -> bool:
        """POST ``body``; return whether it was acknowledged."""
        async with self._slots:
            response = await post(self._transport, record.notify_url, body)
        delivery = Delivery(
            no_refund=record.no_refund,
            at=self._gateway.now(),
            body=body,
            forged=forged,
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
    """POST a notification as :func:`post` does, on a connection of its own."""
    async with aclosing(await HttpSender.open(None, transport, 1, CONTENT_TYPE, backend="httpx")) as sender:
        return await post(sender, url, body)


def is_acknowledged(response: HttpResponse | NoResponse) -> bool:
    """Return whether a response acknowledges a notification: HTTP 200 and ``ret_code`` 0000."""
    if isinstance(response, NoResponse) or response.status != 200:
        return False
    try:
        return wire.decode(response.body).get("ret_code") == "0000"
    except MalformedMessage:
        return False
