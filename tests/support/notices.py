"""Helpers for the tests of notifications: signed bodies as LianLian sends them, and handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import attrs

from lianlian_async import Endpoints, Merchant, NotificationEndpoint, Refund, RefundRequest, wire
from lianlian_async.journal import Journal
from lianlian_async.signing import SigningKey
from tests.support import keypairs
from tests.support.parties import EPOCH, OID_PARTNER, as_json, made, refund_request

HEADERS = {"Content-Type": "text/json;charset=utf-8"}
ACKNOWLEDGED = b'{"ret_code":"0000","ret_msg":"ok"}'


def asked(number: int | str = 1) -> dict[str, str]:
    """Return the identifying wire fields of the refund R-``number`` of ``parties.refund_request``."""
    return {"oid_partner": OID_PARTNER, "no_refund": f"R-{number}", "dt_refund": wire.format_timestamp(EPOCH)}


def notification(number: int | str = 1, key: SigningKey | None = None, **changes: str | None) -> bytes:
    """Return a signed notification that R-``number`` succeeded, with ``changes`` (None omits a field)."""
    changes = {"ret_code": None, "ret_msg": None, "sta_refund": "2", "settle_date": "20260106", **changes}
    return as_json(made(asked(number), key=key, **changes))


def is_acknowledged(ack) -> bool:
    """Return whether LianLian would accept ``ack`` as an acknowledgement."""
    if b"0000" not in ack.body:
        assert ack.status != 200
        return False
    assert (ack.status, ack.body) == (200, ACKNOWLEDGED)
    return True


@attrs.define
class Handler:
    """A handler that records its refunds; each call awaits and removes the first function in ``then``."""

    then: list[Callable[[], Awaitable[object]]] = attrs.field(factory=list)
    begun: list[Refund] = attrs.field(factory=list)
    done: list[Refund] = attrs.field(factory=list)

    async def __call__(self, refund: Refund) -> None:
        self.begun.append(refund)
        if self.then:
            await self.then.pop(0)()
        self.done.append(refund)

    @property
    def numbers(self) -> list[str | None]:
        """The numbers of the refunds for which the handler has returned."""
        return [refund.no_refund for refund in self.done]


async def fails() -> None:
    """Raise an error, as a handler does whose database is down."""
    raise ConnectionError("the shop's database is down")


def trusting(**options: Any) -> Merchant:
    """Return a merchant with the tests' keys and the sandbox's endpoints."""
    settings = {
        "oid_partner": OID_PARTNER,
        "private_key": keypairs.pair("merchant").private,
        "gateway_public_keys": keypairs.pair("gateway").public,
        "endpoints": Endpoints("https://sandbox.invalid/exchangerefund.htm", "https://sandbox.invalid/refundquery.htm"),
    }
    return Merchant(**settings | options)


def inbox(journal: Journal, handler: Callable[[Refund], Awaitable[object]], **options: Any) -> NotificationEndpoint:
    """Return an endpoint in inbox mode: it acknowledges first and calls the handler in the background."""
    return NotificationEndpoint(trusting(), handler, journal=journal, inbox=True, **options)


async def deliver(endpoint: NotificationEndpoint, *numbers: int) -> None:
    """Deliver notifications that these refunds succeeded, one by one; check that each is acknowledged."""
    for number in numbers:
        assert is_acknowledged(await endpoint.handle(notification(number), HEADERS))


async def begin(journal: Journal, number: int = 1, **changes: Any) -> RefundRequest:
    """Record R-``number`` of ``parties.refund_request`` in the journal, as an apply call does."""
    from tests.support import journals  # imports psycopg and the simulation, which most programs do without

    request = refund_request(number, **changes)
    fields = request.to_dict()
    intent = journals.intent(request.no_refund, fields=fields)
    await journal.begin(intent, journals.now())
    return request


async def until(condition: Callable[[], object], *, look_every: float = 0.01) -> None:
    """Wait, without a timeout, until ``condition`` holds."""
    while not condition():  # noqa: ASYNC110 - what it waits for happens in the library
        await anyio.sleep(look_every)
