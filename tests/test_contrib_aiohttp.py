"""The aiohttp adapter: the session under its key, its life, and the handler of the notifications."""

from __future__ import annotations

import io

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from lianlian_async import NotificationEndpoint
from lianlian_async.contrib.aiohttp import SESSION, get_session, lifespan, notifications
from lianlian_async.journal import SqliteJournal
from tests.support.notices import HEADERS, Handler, notification
from tests.support.parties import refund_request, sandbox

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """Aiohttp runs on asyncio only."""
    return "asyncio"


@pytest.fixture
def handler():
    return Handler()


def service(*contexts):
    """A service that makes refunds."""

    async def make_refund(request):
        refund = await get_session(request).apply_refund(refund_request(request.match_info["number"]))
        return web.json_response(refund.sta_refund)

    app = web.Application()
    app.cleanup_ctx.append(lifespan(*contexts))
    app.router.add_post("/refunds/{number}", make_refund)
    return app


def client(app):
    return TestClient(TestServer(app))


async def test_the_session_is_under_its_key(tmp_path):
    """A handler gets the application's session with its journal."""
    gateway, journal = sandbox(), SqliteJournal(tmp_path / "journal.sqlite")
    app = service(journal, gateway.session(journal=journal))
    async with client(app) as http:
        for _ in range(2):
            async with http.post("/refunds/1") as answer:
                assert await answer.json() == "0"
        assert repr(app[SESSION]).endswith("open>")
    assert repr(app[SESSION]).endswith("closed>")
    assert gateway.requests == {"apply": 1}


async def test_subapplication_finds_the_session_of_its_parent():
    """A subapplication uses its parent's session."""
    gateway = sandbox()
    whole, part = web.Application(), service()
    whole.cleanup_ctx.append(lifespan(gateway.session()))
    whole.add_subapp("/part", part)
    async with client(whole) as http, http.post("/part/refunds/1") as answer:
        assert await answer.json() == "0"


async def test_a_missing_session_is_a_clear_error():
    """The error says what to do."""

    async def ask(request):
        with pytest.raises(RuntimeError, match=r"no RefundSession is open: pass one to app.cleanup_ctx.append\(life"):
            get_session(request)
        return web.Response(text="as told")

    app = web.Application()
    app.router.add_get("/", ask)
    async with client(app) as http, http.get("/") as answer:
        assert await answer.text() == "as told"


async def test_a_closed_session_is_a_clear_error():
    """A background job that outlives the application gets an error."""
    app = service(sandbox().session())
    async with client(app):
        pass
    with pytest.raises(RuntimeError, match="this RefundSession is closed"):
        await app[SESSION].apply_refund(refund_request())


async def test_notifications_reach_the_endpoint(handler):
    """POST with any content type reaches the endpoint, whose response is sent unchanged."""
    session = sandbox().session()
    endpoint = NotificationEndpoint(session.merchant, handler, session=session, allow_from=["127.0.0.0/8", "::1"])
    app = service(session, endpoint)
    app.router.add_post("/lianlian/refund", notifications(endpoint))
    async with client(app) as http:
        for body, status in ((notification(), 200), (b"{", 400), (b"x" * 70_000, 413)):
            async with http.post("/lianlian/refund", data=body, headers=HEADERS) as answer:
                assert answer.status == status
                assert answer.headers["content-type"] == "application/json;charset=utf-8"
                assert (await answer.read() == b'{"ret_code":"0000","ret_msg":"ok"}') == (status == 200)
        async with http.get("/lianlian/refund") as answer:
            assert answer.status == 405
    assert handler.numbers == ["R-1"]


@pytest.mark.parametrize(("forwarded", "status"), [(["203.0.113.7"], 200), (["203.0.113.7", "198.51.100.7"], 403)])
async def test_the_address_comes_from_the_connection(handler, forwarded, status):
    """A trusted proxy names the client's address, in one header or in several."""
    endpoint = NotificationEndpoint(
        sandbox().merchant(), handler, allow_from=["203.0.113.0/24"], trusted_proxies=["127.0.0.0/8", "::1"]
    )
    app = web.Application()
    app.router.add_post("/", notifications(endpoint))
    headers = [("X-Forwarded-For", address) for address in forwarded]
    async with client(app) as http, http.post("/", data=notification(), headers=headers) as answer:
        assert answer.status == status


async def test_endless_body_is_cut_off(handler):
    """The server reads no more than the application allows."""
    app = web.Application()
    app.router.add_post("/", notifications(NotificationEndpoint(sandbox().merchant(), handler)))
    async with client(app) as http, http.post("/", data=io.BytesIO(bytes(2**20 + 1))) as answer:
        assert answer.status == 413
