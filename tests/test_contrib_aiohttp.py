"""The aiohttp adapter: the lifespan, responses to errors, and the handler of the notifications."""

from __future__ import annotations

import io
import socket

import anyio
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from lianlian_async import NotificationEndpoint
from lianlian_async.contrib.aiohttp import apply_shielded, get_session, lifespan, notifications, refund_errors
from lianlian_async.journal import SqliteJournal
from lianlian_async.sandbox import Fault
from tests.support.notices import HEADERS, Handler, notification, until
from tests.support.parties import refund_request, sandbox

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """Aiohttp runs on asyncio only."""
    return "asyncio"


@pytest.fixture
def handler():
    return Handler()


def service(session, *contexts):
    """A service that makes refunds."""

    async def make_refund(request):
        assert get_session(request) is session
        refund = await apply_shielded(session, refund_request(request.match_info["number"]))
        return web.json_response(refund.sta_refund)

    app = web.Application(middlewares=[refund_errors])
    app.cleanup_ctx.append(lifespan(*contexts, session))
    app.router.add_post("/refunds/{number}", make_refund)
    return app


def client(app):
    return TestClient(TestServer(app))


@pytest.mark.parametrize("is_split", [False, True])
async def test_none_of_several_sessions_is_chosen(is_split):
    """The session of another merchant must not be used, whether one or several lifespans open the sessions."""
    sessions = [sandbox().session() for _ in range(3)]

    async def find(request):
        with pytest.raises(RuntimeError, match="exactly one RefundSession must be open"):
            get_session(request)
        return web.Response()

    app = web.Application()
    app.cleanup_ctx.extend(map(lifespan, sessions) if is_split else [lifespan(*sessions)])
    app.router.add_get("/", find)
    async with client(app) as http, http.get("/") as answer:
        assert answer.status == 200


async def test_the_session_lives_as_long_as_the_application(tmp_path):
    """The journal and its session are open while requests are served, and closed afterwards."""
    gateway, journal = sandbox(), SqliteJournal(tmp_path / "journal.sqlite")
    session = gateway.session(journal=journal)
    async with client(service(session, journal)) as http:
        for _ in range(2):
            async with http.post("/refunds/1") as answer:
                assert await answer.json() == "0"
    assert repr(session).endswith("closed>")
    assert gateway.requests == {"apply": 1}


@pytest.mark.parametrize("number", [0, 2])
async def test_a_missing_or_ambiguous_session_is_an_error(caplog, number):
    """A handler gets a session only if the application has exactly one."""
    app = service(sandbox().session())
    app.cleanup_ctx[0] = lifespan(*(sandbox().session() for _ in range(number)))
    async with client(app) as http, http.post("/refunds/1") as answer:
        assert answer.status == 500
    assert "RuntimeError: exactly one RefundSession must be open: pass it to app.cleanup_ctx" in caplog.text


async def test_an_error_is_an_honest_response():
    """A rejected refund has the status and the body of the shared function; other errors stay aiohttp's."""
    async with client(service(sandbox(default_order=None).session())) as http:
        async with http.post("/refunds/1") as answer:
            body = await answer.json()
            assert (answer.status, body["error"], body["ret_code"]) == (422, "RefundRejected", "5002")
        async with http.post("/nowhere") as answer:
            assert answer.status == 404


async def test_an_unknown_refund_says_when_to_repeat_the_request():
    """The response has the status 202 and Retry-After."""
    gateway = sandbox()
    gateway.script(Fault.HTTP_500, times=99)
    async with client(service(gateway.session(deadline=0.1))) as http, http.post("/refunds/1") as answer:
        assert (answer.status, (await answer.json())["no_refund"]) == (202, "R-1")
        assert 0 < int(answer.headers["Retry-After"]) <= 900


async def test_a_refund_outlives_its_client(caplog):
    """The server cancels the handler of a client that disconnects; the refund is made, and its outcome is logged."""
    gateway = sandbox()
    gateway.script(Fault.DELAY, delay=0.2)
    runner = web.AppRunner(service(gateway.session()), handler_cancellation=True)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await web.SockSite(runner, listener).start()
        async with await anyio.connect_tcp(*listener.getsockname()) as stream:
            await stream.send(b"POST /refunds/1 HTTP/1.1\r\nHost: shop\r\nContent-Length: 0\r\n\r\n")
            await until(lambda: gateway.times_made("R-1"))
        await until(lambda: caplog.messages)
        await runner.cleanup()
    (message,) = caplog.messages
    assert message.startswith("the caller of a refund was cancelled; the refund's outcome: Refund(")
    assert gateway.times_made("R-1") == 1


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
