"""Support tickets: refunds and errors tell the HTTP exchange, and every request names the library's version."""

from __future__ import annotations

import pickle
from decimal import Decimal

import anyio
import httpx
import pytest

from lianlian_async import (
    BatchStopped,
    RefundConflict,
    RefundNotFinal,
    RefundNotFound,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    RefundSession,
    RetryPolicy,
    __version__,
    asgi,
)
from lianlian_async.errors import LastExchange
from lianlian_async.journal import MemoryJournal
from lianlian_async.sandbox import Fault, When
from lianlian_async.transport import asgi_transport
from tests.support.parties import EPOCH, boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

ONCE = RetryPolicy(attempts=1)


class Proxy:
    """A reverse proxy before the sandbox: adds its headers to each response, and keeps the headers of each request."""

    def __init__(self, gateway, **headers):
        self.gateway = gateway
        self.headers = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
        self.seen = []

    async def __call__(self, scope, receive, send):
        async def added(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self.headers]}
            await send(message)

        self.seen.append(asgi.headers(scope))
        await self.gateway(scope, receive, added)

    def session(self, **options):
        options = {"clock": boot_clock, **options}
        return RefundSession(self.gateway.merchant(), transport=asgi_transport(self), **options)


async def error_of(kind, call, *arguments):
    with pytest.raises(kind) as raised:
        await call(*arguments)
    return raised.value


async def test_every_request_names_the_version_of_the_library():
    """The sandbox receives a User-Agent with the version, with apply and query calls."""
    proxy = Proxy(sandbox())
    async with proxy.session() as session:
        refund = await session.apply_refund(refund_request())
        await session.query_refund(refund.query())
    assert [headers["user-agent"] for headers in proxy.seen] == [f"lianlian-async/{__version__}"] * 2


async def test_a_refund_tells_its_exchange():
    """HTTP status, time, duration and the headers that name the request; no other header, and no long or foreign text.

    Equality and repr ignore the exchange; pickling keeps it.
    """
    proxy = Proxy(
        sandbox(settle_after=1000), x_request_id="7f\x1b" + "a" * 200, cf_ray="8c", set_cookie="session=s3cret"
    )
    proxy.gateway.script(Fault.DELAY, delay=3, when=When.AFTER)
    async with proxy.session() as session:
        refund = await session.apply_refund(refund_request())
        again = await session.query_refund(refund.query())
    told = refund.last_exchange
    assert (told.status, told.at, told.seconds) == (200, EPOCH, 3)
    assert told.headers == {"date": "Mon, 05 Jan 2026 08:00:03 GMT", "x-request-id": "7f?" + "a" * 97, "cf-ray": "8c"}
    assert str(told).startswith("HTTP 200 after 3.000 s, sent at 2026-01-05T08:00:00.000+00:00; date: Mon, 05 Jan")
    assert again == refund
    assert again.last_exchange != told
    assert "last_exchange" not in repr(refund)
    assert pickle.loads(pickle.dumps(refund)).last_exchange == told


async def test_a_rejection_tells_its_exchange():
    """The error has the exchange of the rejection, also in another process and as the cause of a stopped batch."""
    proxy = Proxy(sandbox(default_order=None), via="1.1 edge")
    async with proxy.session() as session:
        error = await error_of(RefundRejected, session.apply_refund, refund_request())
        missing = await error_of(RefundNotFound, session.query_refund, refund_request().query())
    assert (error.last_exchange.status, error.last_exchange.headers["via"]) == (200, "1.1 edge")
    assert missing.last_exchange.status == 200
    assert pickle.loads(pickle.dumps(error)).last_exchange == error.last_exchange
    assert BatchStopped(error).last_exchange == error.last_exchange


async def test_an_unknown_refund_tells_the_last_query():
    """After an apply call and a query without an answer in time, the error has the time and duration of the query."""
    proxy = Proxy(sandbox())
    proxy.gateway.script(Fault.BAD_GATEWAY, call="apply")
    proxy.gateway.script(Fault.NO_ANSWER, call="query", times=9)
    async with proxy.session(deadline=10) as session:
        error = await error_of(RefundOutcomeUnknown, session.apply_refund, refund_request())
    told = error.last_exchange
    assert (told.status, told.headers, told.seconds > 0) == (None, {}, True)
    assert EPOCH <= told.at < error.ask_again_at
    assert str(told).startswith("no response after ")


async def test_a_caller_that_leaves_learns_the_last_exchange():
    """The unknown outcome of a caller whose deadline ends before the flight has the exchange so far."""
    proxy = Proxy(sandbox())
    proxy.gateway.script(Fault.BAD_GATEWAY, call="apply", when=When.BEFORE)
    async with proxy.session() as session, anyio.create_task_group() as tasks:
        tasks.start_soon(error_of, RefundOutcomeUnknown, session.apply_refund, refund_request())
        await anyio.sleep(1)
        with pytest.raises(RefundOutcomeUnknown) as raised:
            await session.apply_refund(refund_request(), deadline=5)
    assert raised.value.last_exchange.status == 200


async def test_a_conflict_tells_the_exchange_of_the_other_record():
    """The query finds another refund under the number: the error tells which answer said so."""
    proxy = Proxy(sandbox())
    async with proxy.session() as session:
        await session.apply_refund(refund_request(money_refund=Decimal("5.00")))
    async with proxy.session() as session:
        error = await error_of(RefundConflict, session.apply_refund, refund_request())
    assert error.last_exchange.status == 200


async def test_a_refund_that_was_not_sent_tells_when_it_was_tried():
    """There is no status; time and duration are those of the last attempt."""

    async def refuse(request):
        await anyio.sleep(2)
        raise httpx.ConnectError("refused")

    transport = httpx.MockTransport(refuse)
    async with RefundSession(sandbox().merchant(), transport=transport, retry=ONCE, clock=boot_clock) as session:
        error = await error_of(RefundNotSent, session.apply_refund, refund_request())
    assert error.last_exchange == LastExchange(EPOCH, 2.0, None, {})


async def test_what_comes_from_no_exchange_tells_none():
    """A refund from the journal has no exchange; the error about a refund that is not final has the refund's."""
    proxy = Proxy(sandbox(settle_after=1000))
    async with MemoryJournal() as journal, proxy.session(journal=journal) as session:
        refund = await session.apply_refund(refund_request())
        assert (await session.apply_refund(refund_request())).last_exchange is None
        error = RefundNotFinal(refund, last_error=None)
    assert error.last_exchange == refund.last_exchange is not None
