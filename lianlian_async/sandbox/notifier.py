"""The sandbox tells merchants how their refunds ended: on LianLian's schedule, and with all that may go wrong.

Each final refund is POSTed to its ``notify_url``, really signed, every 2 minutes and 30 times at most, until the
answer is HTTP 200 with ``ret_code`` 0000 within 5 seconds (LianLian's notification page).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from enum import Enum
from random import Random
from types import TracebackType
from typing import Final, Self

import anyio
import attrs

from lianlian_async import asgi, wire
from lianlian_async.background import BackgroundTask
from lianlian_async.errors import ConfigurationError, MalformedMessage
from lianlian_async.exchange import HttpResponse
from lianlian_async.signing import SigningKey, signature_source
from lianlian_async.transport import AsyncBaseTransport, AsyncClient, Transport

from .gateway import SandboxGateway
from .ledger import Record

__all__ = ["CONTENT_TYPE", "Delivery", "Mischief", "Notifier", "is_acknowledged", "post"]

CONTENT_TYPE: Final = "text/json;charset=utf-8"
PATIENCE: Final = 5.0
"""Seconds."""


class Mischief(Enum):
    """What may happen to the notifications of one refund, besides what ought to."""

    EARLY = "early"
    """The bank is so quick that the final state is notified before the apply call is answered."""
    DUPLICATED = "duplicated"
    """It is sent once more after it was acknowledged."""
    CONCURRENT = "concurrent"
    """Each time it is sent three times at once."""
    REORDERED = "reordered"
    """A notification of the refund's first state comes behind that of its last one."""
    TAMPERED = "tampered"
    """Forgeries go ahead: changed fields, a missing signature, another key's signature."""
    REPLAYED = "replayed"
    """Somebody who kept it sends it again, ``every`` seconds after it was acknowledged."""


@attrs.frozen(kw_only=True)
class Delivery:
    """One POST, and what came of it."""

    no_refund: str
    at: float
    """When it was answered, or given up, by the gateway's clock."""
    body: bytes = attrs.field(repr=False)
    forged: bool
    status: int | None
    """HTTP status; None: no answer within 5 seconds."""
    acknowledged: bool

    def __str__(self) -> str:
        what = "forgery" if self.forged else "notification"
        answer = "no answer" if self.status is None else f"HTTP {self.status}"
        return f"{what} of {self.no_refund}: {answer}, {'' if self.acknowledged else 'not '}acknowledged"


class Notifier:
    """Notifies of the refunds of ``gateway``, as long as ``async with`` it is in use; an ASGI application too.

    As one it serves the gateway, and notifies for the server's lifetime. Time is the gateway's own, so that
    :meth:`SandboxGateway.advance` brings the next delivery near.

    Args:
        gateway: whose refunds.
        client: an ``httpx.AsyncClient`` to send with, not closed; or else
        transport: an httpx transport for a client of its own.
        every: seconds between two deliveries.
        times: deliveries at most.
        patience: seconds that the merchant has to answer.
        mischief: how likely each :class:`Mischief` is per refund.
        seed: where the dice that decide it start.
        max_connections: deliveries at the same time.
        on_delivery: called with each delivery when it is over.

    Raises ``ConfigurationError`` for a probability that is none.
    """

    def __init__(
        self,
        gateway: SandboxGateway,
        *,
        client: AsyncClient | None = None,
        transport: AsyncBaseTransport | None = None,
        every: float = 120.0,
        times: int = 30,
        patience: float = PATIENCE,
        mischief: Mapping[Mischief, float] | None = None,
        seed: int = 0,
        max_connections: int = 64,
        on_delivery: Callable[[Delivery], object] = lambda _: None,
    ) -> None:
        self._mischief = dict(mischief or {})
        if any(not 0 <= share <= 1 for share in self._mischief.values()):
            raise ConfigurationError("mischief: each probability must be from 0 to 1")
        self.deliveries: list[Delivery] = []
        """Every delivery so far, oldest first."""
        self._gateway = gateway
        self._client = client
        self._http_transport = transport
        self._every = every
        self._times = times
        self._patience = patience
        self._random = Random(seed)  # noqa: S311 -- dice that fall the same way again are the point
        self._max_connections = max_connections
        self._on_delivery = on_delivery
        self._begun = self._ended = 0

    @property
    def pending(self) -> int:
        """How many refunds are still being notified of, those that are not final yet included."""
        return len(self._gateway.refunds) - self._ended

    async def __aenter__(self) -> Self:
        self._transport = await Transport.open(self._client, self._http_transport, self._max_connections, CONTENT_TYPE)
        self._slots = anyio.Semaphore(self._max_connections)
        started = anyio.Event()
        self._background = BackgroundTask(lambda: self._run(started))
        await started.wait()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._background.aclose()
        await self._transport.aclose()

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve one connection to the gateway, or the server's lifespan."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, self)
            return

        async def overtaken(message: asgi.Message) -> None:
            if message["type"] == "http.response.start":
                for early in self._look():
                    await early.wait()
            await send(message)

        await self._gateway(scope, receive, overtaken)

    # ── which refunds ────────────────────────────────────────────────────────────────────────────

    async def _run(self, started: anyio.Event) -> None:
        async with anyio.create_task_group() as self._tasks:
            started.set()
            while True:
                made = self._gateway.made
                self._look()
                await made.wait()

    def _look(self) -> list[anyio.Event]:
        """Begin to notify of what is new; for each refund that is notified of early, an event when it was."""
        records = self._gateway.refunds[self._begun :]
        self._begun += len(records)
        early = []
        for record in records:
            how = {each for each, share in self._mischief.items() if self._random.random() < share}
            told = anyio.Event()
            if Mischief.EARLY in how:
                record.settles_at = self._gateway.now()
                early.append(told)
            self._tasks.start_soon(self._notify, record, how, told)
        return early

    # ── one refund ───────────────────────────────────────────────────────────────────────────────

    async def _notify(self, record: Record, how: set[Mischief], told: anyio.Event) -> None:
        await self._until(record.settles_at)
        body = self._gateway.notification(record)
        for _ in range(self._times):
            sent_at = self._gateway.now()
            if Mischief.TAMPERED in how:
                await self._send(record, self._random.choice(_FORGERIES)(body, self._gateway), forged=True)
            acknowledged = await self._send(record, body, times=3 if Mischief.CONCURRENT in how else 1)
            told.set()
            if acknowledged:
                break
            await self._until(sent_at + self._every)
        if Mischief.REORDERED in how:
            await self._send(record, self._gateway.notification(record, at=-math.inf))
        if Mischief.DUPLICATED in how:
            await self._send(record, body)
        if Mischief.REPLAYED in how:
            await self._until(self._gateway.now() + self._every)
            await self._send(record, body)
        self._ended += 1

    async def _until(self, moment: float) -> None:
        while (seconds := moment - self._gateway.now()) > 0:
            with anyio.move_on_after(seconds):
                await self._gateway.advanced.wait()

    async def _send(self, record: Record, body: bytes, *, times: int = 1, forged: bool = False) -> bool:
        """POST ``body``, ``times`` side by side; whether one of them was acknowledged."""
        deliveries: list[Delivery] = []

        async def send() -> None:
            async with self._slots:
                answer = await post(self._transport, record.application.notify_url, body, self._patience)
            delivery = Delivery(
                no_refund=record.application.no_refund,
                at=self._gateway.now(),
                body=body,
                forged=forged,
                status=None if answer is None else answer.status,
                acknowledged=is_acknowledged(answer),
            )
            deliveries.append(delivery)
            self._on_delivery(delivery)

        async with anyio.create_task_group() as tasks:
            for _ in range(times):
                tasks.start_soon(send)
        self.deliveries += deliveries
        return any(delivery.acknowledged for delivery in deliveries)


async def post(transport: Transport, url: str, body: bytes, patience: float = PATIENCE) -> HttpResponse | None:
    """What a merchant's server answers to a notification; None if it does not within ``patience`` seconds."""
    with anyio.move_on_after(patience):
        delivery = await transport.post(url, body, patience)
        if isinstance(delivery, HttpResponse):
            return delivery
    return None


def is_acknowledged(answer: HttpResponse | None) -> bool:
    """Whether a merchant's server has taken the notification."""
    if answer is None or answer.status != 200:
        return False
    try:
        return wire.decode(answer.body).get("ret_code") == "0000"
    except MalformedMessage:
        return False


# ── forgeries ────────────────────────────────────────────────────────────────────────────────────


def _with(**changes: Callable[[str], str]) -> Callable[[bytes, SandboxGateway], bytes]:
    """Some fields changed, under the signature of the others."""

    def forge(body: bytes, _gateway: SandboxGateway) -> bytes:
        fields = wire.decode(body)
        return wire.encode({**fields, **{name: change(fields[name]) for name, change in changes.items()}})

    return forge


def _unsigned(body: bytes, _gateway: SandboxGateway) -> bytes:
    return wire.encode({name: text for name, text in wire.decode(body).items() if name != "sign"})


def _signed_by_the_merchant(body: bytes, gateway: SandboxGateway) -> bytes:
    fields = wire.decode(body)
    key: SigningKey = gateway.merchant_key
    return wire.encode({**fields, "sign": key.sign(signature_source(fields))})


_FORGERIES: Final = (
    _with(sta_refund=lambda status: "3" if status == "2" else "2"),
    _with(money_refund=lambda money: wire.format_money(Decimal(money) + 1)),
    _with(no_refund=lambda number: f"{number}-2"),
    _with(sign=str.swapcase),
    _unsigned,
    _signed_by_the_merchant,
)
