"""The notification endpoint under real servers (uvicorn, aiohttp): slow clients, odd requests, lifespans."""

from __future__ import annotations

import asyncio
import gzip
import logging
from contextlib import asynccontextmanager

import attrs
import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI

from lianlian_async import NotificationEndpoint
from lianlian_async.contrib import aiohttp as contrib_aiohttp
from lianlian_async.contrib import fastapi as contrib_fastapi
from lianlian_async.journal import SqliteJournal
from tests.support.notices import Handler, notification, trusting, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """Both servers run on asyncio only."""
    return "asyncio"


@attrs.frozen
class Service:
    """A server on ``port`` of this machine."""

    port: int
    connections: object
    """Returns the open connections."""

    async def ask(self, *pieces: bytes) -> bytes:
        """Send these bytes, then read until the server closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    async def leave(self, *pieces: bytes) -> None:
        """Send these bytes and close the connection."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.writelines(pieces)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def by_uvicorn(app, **options):
    """Serve an ASGI application."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5, **options))
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        [socket] = server.servers[0].sockets
        yield Service(socket.getsockname()[1], lambda: server.server_state.connections)
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def alone(endpoint):
    async with by_uvicorn(endpoint) as service:
        yield service


@asynccontextmanager
async def in_fastapi(endpoint):
    app = FastAPI(lifespan=contrib_fastapi.lifespan(endpoint))
    app.include_router(contrib_fastapi.notifications(endpoint, "/refund"))
    async with by_uvicorn(app) as service:
        yield service


@asynccontextmanager
async def in_aiohttp(endpoint):
    app = web.Application()
    app.cleanup_ctx.append(contrib_aiohttp.lifespan(endpoint))
    app.router.add_post("/refund", contrib_aiohttp.notifications(endpoint))
    # aiohttp reads on for so long, to let the client see the answer before the connection is reset.
    runner = web.AppRunner(app, lingering_time=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield Service(runner.addresses[0][1], lambda: runner.server.connections)
    finally:
        await runner.cleanup()


@asynccontextmanager
async def on_unix_socket(endpoint, path):
    """Run both servers, each on a Unix socket; yield the paths of the sockets."""
    app = web.Application()
    app.router.add_post("/refund", contrib_aiohttp.notifications(endpoint))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, f"{path}/aiohttp").start()
    try:
        async with by_uvicorn(endpoint, uds=f"{path}/uvicorn"):
            yield [f"{path}/aiohttp", f"{path}/uvicorn"]
    finally:
        await runner.cleanup()


every_server = pytest.mark.parametrize("served", [alone, in_fastapi, in_aiohttp])


def head(*fields: str, method: str = "POST", path: str = "/refund") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: shop.example", *fields, "", ""]).encode()


def whole(body: bytes, *fields: str) -> bytes:
    return head(f"Content-Length: {len(body)}", *fields) + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


CHUNKED = "Transfer-Encoding: chunked"


@every_server
async def test_slow_and_endless_bodies_leave_no_connection_open(served):
    """Such clients get a response and are disconnected; correct clients are served at the same time."""
    handler = Handler()
    endpoint = NotificationEndpoint(trusting(), handler, body_seconds=0.2)
    body = notification()
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    async with served(endpoint) as service:
        slow = [service.ask(whole(body)[:-n]) for n in range(1, 26)]
        silent = [service.ask(head(CHUNKED)) for _ in range(25)]
        too_big = [service.ask(head(CHUNKED), piece, b"1\r\n \r\n") for _ in range(25)]
        *answers, acknowledged = await asyncio.gather(
            *slow, *silent, *too_big, service.ask(whole(body, "Connection: close"))
        )
        assert [status(answer) for answer in answers] == [408] * 50 + [413] * 25
        assert status(acknowledged) == 200
        await until(lambda: not service.connections())
    assert endpoint.counts == {"too slow": 50, "too big": 25, "acted": 1}


@every_server
async def test_a_client_that_never_stops_sending_is_cut_off(served):
    """The server closes the connection while the client is still sending."""
    async with served(NotificationEndpoint(trusting(), Handler())) as service:
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)

        async def send_for_ever():
            writer.write(head(CHUNKED))
            while True:
                writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
                await writer.drain()

        with pytest.raises(ConnectionError):
            await send_for_ever()
        await until(lambda: not service.connections())


@every_server
@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        pytest.param(lambda body: head(method="GET"), 405, id="GET"),
        pytest.param(lambda body: head(method="HEAD"), 405, id="HEAD"),
        pytest.param(lambda body: head("Content-Length: 9", method="PUT"), 405, id="PUT without its body"),
        pytest.param(lambda body: whole(body, "Content-Encoding: UTF-8"), 200, id="a character set as encoding"),
        pytest.param(lambda body: whole(b"{", "Content-Encoding: gzip"), 400, id="not the gzip that it says"),
        pytest.param(lambda body: whole(gzip.compress(b"{"), "Content-Encoding: gzip"), 400, id="gzip"),
        pytest.param(lambda body: head(f"Content-Length: {len(body) + 1}") + body, 408, id="a length too long"),
        pytest.param(lambda body: head("Content-Length: 9") + body[:9], 400, id="a length too short"),
        pytest.param(lambda body: head(CHUNKED) + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), 200, id="in chunks"),
    ],
)
async def test_odd_requests_are_answered(served, request_of, expected, caplog):
    """Malformed requests cause no traceback, and their connections are closed."""
    endpoint = NotificationEndpoint(trusting(), Handler(), body_seconds=0.2)
    raw = request_of(notification()).replace(b"\r\nHost", b"\r\nConnection: close\r\nHost", 1)
    async with served(endpoint) as service:
        assert status(await service.ask(raw)) == expected
        await until(lambda: not service.connections())
    assert not [record for record in caplog.records if record.exc_info]


@every_server
async def test_disconnect_in_the_body_leaves_no_traceback(served, caplog):
    """The client disconnects in its body, or while the handler runs; the handler still finishes."""
    caplog.set_level(logging.WARNING)
    release = asyncio.Event()
    handler = Handler([release.wait])
    endpoint = NotificationEndpoint(trusting(), handler)
    async with served(endpoint) as service:
        await service.leave(whole(notification())[:-20])
        await until(lambda: not service.connections())
        await service.leave(whole(notification()))
        await until(lambda: handler.begun)
        release.set()
        await until(lambda: handler.done and not service.connections())
    assert not [record for record in caplog.records if record.exc_info]
    assert endpoint.counts["acted"] == 1


@pytest.mark.parametrize(("proxies", "expected"), [(["127.0.0.1", "::1"], 403), (["unix"], 200)])
async def test_a_proxy_on_a_unix_socket_is_trusted_only_if_it_is_declared(tmp_path, proxies, expected):
    """Both servers report a peer on a Unix socket without an address."""
    endpoint = NotificationEndpoint(trusting(), Handler(), allow_from=["203.0.113.0/24"], trusted_proxies=proxies)
    request = whole(notification(), "X-Forwarded-For: 203.0.113.7:4711", "Connection: close")
    async with on_unix_socket(endpoint, tmp_path) as paths:
        for path in paths:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(request)
            assert status(await reader.read()) == expected
            writer.close()


@pytest.mark.parametrize("is_inbox", [False, True])
async def test_served_alone_with_its_lifespan_the_endpoint_opens_its_journal(tmp_path, is_inbox):
    """The endpoint is the server's only application, and opens the journal itself."""
    handler, journal = Handler(), SqliteJournal(tmp_path / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), handler, journal=journal, inbox=is_inbox)
    for expected in ({"acted": 1}, {"duplicate": 1}):
        endpoint.counts.clear()
        async with by_uvicorn(endpoint, lifespan="on") as service:
            assert status(await service.ask(whole(notification(), "Connection: close"))) == 200
            await until(lambda: handler.done)
        assert not journal.is_open
        assert expected.items() <= endpoint.counts.items()
    assert handler.numbers == ["R-1"]


async def test_served_alone_without_a_lifespan_the_endpoint_says_how(tmp_path, caplog):
    """Notifications are not acknowledged, and the log says how to open the endpoint."""
    endpoint = NotificationEndpoint(trusting(), Handler(), journal=SqliteJournal(tmp_path / "journal.sqlite"))
    async with by_uvicorn(endpoint, lifespan="off") as service:
        assert status(await service.ask(whole(notification(), "Connection: close"))) == 500
    assert "or the server's lifespan (uvicorn: --lifespan on)" in caplog.text


@pytest.mark.parametrize("lifespan", ["on", "auto"])
async def test_a_journal_that_cannot_be_opened_ends_the_server(tmp_path, caplog, lifespan, monkeypatch):
    """If the journal cannot be opened, the server must not start: it would refuse every notification."""
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])  # a sandbox that was served has left one
    journal = SqliteJournal(tmp_path / "missing" / "journal.sqlite")
    endpoint = NotificationEndpoint(trusting(), Handler(), journal=journal)
    server = uvicorn.Server(uvicorn.Config(endpoint, port=0, log_config=None, lifespan=lifespan))
    with pytest.raises(SystemExit):
        await server.serve()
    assert "JournalError: journal" in caplog.text
