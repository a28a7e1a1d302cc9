"""The sandbox's notifications with faults, as a network, a hostile sender or a careless gateway causes them."""

import math
from enum import Enum
from random import Random

import anyio

from lianlian_async import asgi, wire
from lianlian_async.sandbox import Delivery, Notifier, Record, SandboxGateway
from lianlian_async.signing import signature_source


class Mischief(Enum):
    """Faults of a refund's notifications."""

    EARLY = "early"
    """The refund is final at once, and its notification is sent before the apply response."""
    DUPLICATED = "duplicated"
    """The notification is sent once more after the last delivery."""
    CONCURRENT = "concurrent"
    """Each delivery is sent three times concurrently."""
    REORDERED = "reordered"
    """A notification with the state *initialized* is sent after the one with the final state."""
    TAMPERED = "tampered"
    """Before each delivery, a forgery is sent: another amount with the genuine signature."""
    REPLAYED = "replayed"
    """The notification is sent once more, ``every`` seconds after the last delivery."""


class MischievousNotifier(Notifier):
    """Applies each :class:`Mischief` to a refund with its probability; the same seed gives the same mischief."""

    def __init__(self, gateway, *, mischief, seed=0, **options):
        super().__init__(gateway, **options)
        self._mischief = mischief
        self._random = Random(seed)

    async def __call__(self, scope, receive, send):
        """Send the early notifications before the response that the refund was made."""

        async def send_after_early(message: asgi.Message) -> None:
            if message["type"] == "http.response.start":
                for delivered in self._start_new():
                    await delivered.wait()
            await send(message)

        await super().__call__(scope, receive, send if scope["type"] == "lifespan" else send_after_early)

    def _start_new(self) -> list[anyio.Event]:
        """Start notifying about new refunds; return, for each early one, an event that its first delivery sets."""
        early = []
        for record in self._gateway.refunds[self._begun :]:
            self._begun += 1
            mischief = {each for each, share in self._mischief.items() if self._random.random() < share}
            delivered = anyio.Event()
            if Mischief.EARLY in mischief:
                record.settles_at = self._gateway.now()
                early.append(delivered)
            self._tasks.start_soon(self._disturb, record, mischief, delivered)
        return early

    async def _disturb(self, record: Record, mischief: set[Mischief], delivered: anyio.Event) -> None:
        await self._until(record.settles_at)
        body = self._gateway.notification(record)
        for _ in range(self._times):
            sent_at = self._gateway.now()
            if Mischief.TAMPERED in mischief:
                forgery = wire.decode(body) | {"money_refund": wire.format_money(record.money_refund + 1)}
                await self._send(record, wire.encode(forgery))
            acknowledged = await self._send_several(record, body, 3 if Mischief.CONCURRENT in mischief else 1)
            delivered.set()
            if acknowledged:
                break
            await self._until(sent_at + self._every)
        if Mischief.REORDERED in mischief:
            await self._send(record, self._gateway.notification(record, at=-math.inf))
        if Mischief.DUPLICATED in mischief:
            await self._send(record, body)
        if Mischief.REPLAYED in mischief:
            await self._until(self._gateway.now() + self._every)
            await self._send(record, body)
        self._ended += 1

    async def _send_several(self, record: Record, body: bytes, times: int) -> bool:
        results = []

        async def send() -> None:
            results.append(await self._send(record, body))

        async with anyio.create_task_group() as tasks:
            for _ in range(times):
                tasks.start_soon(send)
        return any(results)


def is_forged(gateway: SandboxGateway, delivery: Delivery) -> bool:
    """Return whether the gateway did not sign the delivered notification."""
    fields = wire.decode(delivery.body)
    return not gateway.gateway_key.public_key().verify(signature_source(fields), fields.get("sign", ""))
