"""The connection pool: the most recently used connection is reused first, nothing leaks, and requests wait in order."""

from __future__ import annotations

import asyncio
import contextlib
from importlib.util import find_spec

import anyio
import anyio.lowlevel
import httpx
import pytest

from lianlian_async import (
    ConfigurationError,
    Endpoints,
    MalformedMessage,
    Merchant,
    RefundNotSent,
    RefundSession,
    RetryPolicy,
)
from lianlian_async.transport import HttpSender, PoolTransport
from tests.support import certificates
from tests.support.parties import Connection, Server, answering, refund_request, serving, trickling, unused_port

pytestmark = pytest.mark.anyio


def pool_of(max_connections):
    return contextlib.aclosing(PoolTransport(max_connections))


async def fetch(pool, url, /, **timeouts):
    """Send one request over ``pool``, and return the body of its response."""
    timeout = {"connect": 5.0, "read": 5.0, "write": 5.0, "pool": 5.0, **timeouts}
    request = httpx.Request("POST", url, content=b"{}", extensions={"timeout": timeout})
    response = await pool.handle_async_request(request)
    try:
        return await response.aread()
    finally:
        await response.aclose()


async def until(condition):
    """Let the other tasks run until ``condition`` holds."""
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in the kernel
            await anyio.sleep(0.001)


class Holding:
    """A server's handler that waits for permission, then responds with the number of the connection."""

    def __init__(self):
        self.waiting = []
        self.go = anyio.Event()

    async def __call__(self, connection: Connection):
        while (request := await connection.request()) is not None:
            self.waiting.append(request[1])
            await self.go.wait()
            await connection.respond(str(connection.number).encode())


# ── reuse ────────────────────────────────────────────────────────────────────────────────────────


async def test_connection_is_reused():
    """One connection serves requests one after the other."""
    async with answering() as server, pool_of(8) as pool:
        for _ in range(5):
            assert await fetch(pool, server.url) == b"{}"
        assert [number for number, _, _ in server.requests] == [1] * 5
    assert server.opened == 1


async def test_the_connection_used_last_is_taken_first():
    """With little traffic, few connections are used, so the other connections expire."""
    handler = Holding()
    async with serving(handler) as server, pool_of(4) as pool:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(fetch, pool, server.url)
            await until(lambda: len(handler.waiting) == 3)
            handler.go.set()
        last = {await fetch(pool, server.url) for _ in range(5)}
    assert server.opened == 3
    assert len(last) == 1


async def test_each_origin_has_its_own_connections():
    """The apply server and the query server never share a connection."""
    async with answering(b"1") as one, answering(b"2") as two, pool_of(2) as pool:
        for _ in range(3):
            assert await fetch(pool, one.url) == b"1"
            assert await fetch(pool, two.url) == b"2"
    assert one.opened == two.opened == 1


async def test_idle_connections_expire(monkeypatch):
    """A connection that is idle for longer than the keep-alive time is closed, also one to another origin."""
    monkeypatch.setattr("lianlian_async.transport.pool.KEEPALIVE_SECONDS", 0.0)
    handler = Holding()
    async with serving(handler) as busy, answering() as other, pool_of(4) as pool:
        await fetch(pool, other.url)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(fetch, pool, busy.url)
            await until(lambda: len(handler.waiting) == 3)
            handler.go.set()
        await fetch(pool, busy.url)
        await until(lambda: busy.open <= 1 and other.open == 0)
        assert await fetch(pool, other.url) == b"{}"
    assert other.opened == 2


async def test_a_connection_that_the_server_closed_is_replaced():
    """If the server closes a connection between two requests, a new one is opened."""

    async def once(connection: Connection):
        await connection.request()
        await connection.respond(b"{}")

    async with serving(once) as server, pool_of(1) as pool:
        for opened in (1, 2, 3):
            assert await fetch(pool, server.url) == b"{}"
            await until(lambda: server.open == 0)
            assert server.opened == opened


async def test_closing_the_pool_closes_its_idle_connections():
    """Nothing stays open after the pool is closed."""
    handler = Holding()
    handler.go.set()
    async with serving(handler) as server:
        async with pool_of(4) as pool, anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(fetch, pool, server.url)
        await until(lambda: server.open == 0)
    assert 1 <= server.opened <= 4


async def test_connection_released_after_the_close_is_closed():
    """A request that ends after the pool was closed gets its response, and its connection is closed."""
    handler = Holding()
    async with serving(handler) as server:
        async with anyio.create_task_group() as tasks, pool_of(1) as pool:
            tasks.start_soon(fetch, pool, server.url)
            await until(lambda: handler.waiting)
            await pool.aclose()
            handler.go.set()
        await until(lambda: server.open == 0)
    assert server.opened == 1


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


async def test_no_more_than_max_connections_are_open():
    """Requests beyond max_connections wait for a free connection."""
    most = 0

    async def handler(connection: Connection):
        nonlocal most
        while await connection.request() is not None:
            most = max(most, server.open)
            await connection.respond(b"{}")

    async with serving(handler) as server, pool_of(3) as pool, anyio.create_task_group() as tasks:
        for _ in range(60):
            tasks.start_soon(fetch, pool, server.url)
    assert most == server.opened == 3


async def test_waiting_requests_are_served_in_order():
    """Waiting requests get the connection in the order of their arrival."""
    async with answering() as server, pool_of(1) as pool, anyio.create_task_group() as tasks:
        for number in range(8):
            tasks.start_soon(fetch, pool, f"{server.url}/{number}")
            await anyio.wait_all_tasks_blocked()
    assert [head.split(b" ", 2)[1] for _, head, _ in server.requests] == [b"/%d" % number for number in range(8)]


@pytest.mark.virtual_time
async def test_pool_timeout():
    """A request that finds no free connection in time raises PoolTimeout and leaks no slot."""
    handler = Holding()
    async with serving(handler) as server, pool_of(1) as pool, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: fetch(pool, server.url, read=100))
        await until(lambda: handler.waiting)
        began = anyio.current_time()
        with pytest.raises(httpx.PoolTimeout, match="no free connection within 7 s"):
            await fetch(pool, server.url, pool=7)
        assert anyio.current_time() == pytest.approx(began + 7)
        handler.go.set()
        assert await fetch(pool, server.url) == b"1"


async def test_without_a_pool_timeout():
    """A request without pool timeout waits for its turn."""
    async with answering() as server, pool_of(1) as pool:
        response = await pool.handle_async_request(httpx.Request("POST", server.url, content=b"{}"))
        assert await response.aread() == b"{}"
        await response.aclose()


# ── failure and cancellation ─────────────────────────────────────────────────────────────────────


async def assert_all_free(pool, server: Server, slots):
    """Check that all slots of the pool are free: as many requests run at the same time without waiting."""
    barrier = 0

    async def meet():
        nonlocal barrier
        request = httpx.Request("POST", server.url, content=b"{}", extensions={"timeout": {"pool": 5.0}})
        response = await pool.handle_async_request(request)
        barrier += 1
        await until(lambda: barrier == slots)
        await response.aread()
        await response.aclose()

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for _ in range(slots):
                tasks.start_soon(meet)


async def test_failed_connection_is_not_reused():
    """After a failed exchange the next request uses a new connection."""
    broken = True

    async def handler(connection: Connection):
        nonlocal broken
        while await connection.request() is not None:
            if broken:
                broken = False
                return
            await connection.respond(str(connection.number).encode())

    async with serving(handler) as server, pool_of(1) as pool:
        with pytest.raises(httpx.RemoteProtocolError):
            await fetch(pool, server.url)
        assert await fetch(pool, server.url) == b"2"
        await until(lambda: server.open == 1)


async def test_refused_connection_frees_its_slot():
    """Repeated failures to connect leak no slot."""
    async with answering() as server, pool_of(2) as pool:
        for _ in range(6):
            with pytest.raises(httpx.ConnectError):
                await fetch(pool, f"http://127.0.0.1:{unused_port()}")
        await assert_all_free(pool, server, 2)


async def test_response_that_fails_at_closing_frees_its_slot():
    """A response whose body breaks off frees its slot and its connection."""

    async def handler(connection: Connection):
        while await connection.request() is not None:
            await connection.stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
            return

    async with serving(handler) as server, answering() as healthy, pool_of(1) as pool:
        for _ in range(3):
            with pytest.raises(httpx.RemoteProtocolError):
                await fetch(pool, server.url)
        await assert_all_free(pool, healthy, 1)
        assert server.opened == 3


@pytest.mark.parametrize("calls", [300])
async def test_cancelled_requests_leak_nothing(calls):
    """Requests cancelled while they wait, connect, send or read free every slot and close every socket."""
    ended = 0

    async def cancelled(number):
        nonlocal ended
        with anyio.move_on_after(0.0005 * (number % 12)):
            await transport.post(server.url, b"{}", 5.0)
        ended += 1

    async with serving(trickling) as server, pool_of(8) as pool:
        transport = await HttpSender.open(None, pool, 8)
        async with anyio.create_task_group() as tasks:
            for number in range(calls):
                tasks.start_soon(cancelled, number)
        assert ended == calls
        await assert_all_free(pool, server, 8)
        await until(lambda: server.open <= 8)
        await pool.aclose()
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("keeps", [True, False], ids=["keep-alive", "close"])
async def test_a_request_cancelled_at_any_step_leaks_nothing(anyio_backend_name, how, keeps):
    """A request that is cancelled after any number of steps of the event loop frees its slot."""
    if how == "task" and anyio_backend_name != "asyncio":
        pytest.skip("trio has no other cancellation than its scopes")

    async def handler(connection: Connection):
        while await connection.request() is not None:
            await connection.respond(b"{}", headers="" if keeps else "connection: close\r\n")
            if not keeps:
                return

    async def in_scope(scope):
        nonlocal finished
        with scope:
            await transport.post(server.url, b"{}", 5.0)
            finished = True

    async def cancelled_after(steps):
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            tasks.start_soon(in_scope, scope)
            await steps_of_the_loop(steps)
            scope.cancel()

    async def task_cancelled_after(steps):
        task = asyncio.create_task(in_scope(anyio.CancelScope()))
        await steps_of_the_loop(steps)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    finished = False
    steps = 0
    async with serving(handler) as server, pool_of(1) as pool:
        transport = await HttpSender.open(None, pool, 1)
        while not finished:
            await (cancelled_after if how == "scope" else task_cancelled_after)(steps)
            await assert_all_free(pool, server, 1)
            steps += 1
        await pool.aclose()
        await until(lambda: server.open == 0)
    assert steps > 3


async def steps_of_the_loop(number):
    for _ in range(number):
        await anyio.lowlevel.checkpoint()


# ── proxies ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_used(monkeypatch, name, form):
    """Requests go to the proxy of the environment, with or without a scheme."""
    async with answering(b"by proxy") as proxy:
        monkeypatch.setenv(name, form.format(proxy.port))
        async with pool_of(1) as pool:
            assert await fetch(pool, "http://gateway.invalid/exchangerefund.htm") == b"by proxy"
    assert proxy.requests[0][1].startswith(b"POST http://gateway.invalid/exchangerefund.htm ")


async def test_no_connection_to_an_https_proxy_reads_the_ca_files(monkeypatch, tmp_path):
    """Reading them takes tens of milliseconds, on the event loop; the pool has read them when it was created."""
    context, file = certificates.self_signed(tmp_path)

    async def handler(connection: Connection):
        while await connection.request() is not None:
            await connection.respond(b"by proxy")

    async with serving(handler, tls=context) as proxy:
        monkeypatch.setenv("ALL_PROXY", f"https://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        async with pool_of(1) as pool:
            monkeypatch.delenv("SSL_CERT_FILE")
            assert await fetch(pool, "http://gateway.invalid/") == b"by proxy"


@pytest.mark.parametrize("bypass", ["127.0.0.1", "*", "example.com, 127.0.0.1"])
async def test_no_proxy_is_honoured(monkeypatch, bypass):
    """Hosts in NO_PROXY are reached directly, all others through the proxy."""
    async with answering(b"by proxy") as proxy, answering(b"direct") as server:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", bypass)
        async with pool_of(2) as pool:
            assert await fetch(pool, server.url) == b"direct"
            if bypass != "*":
                assert await fetch(pool, "http://gateway.invalid/") == b"by proxy"


@pytest.mark.parametrize(
    "bypass", ["127.0.0.1:{port}", "127.0.0.0/8", "10.0.0.0/8, 127.0.0.0/24", "::1/128,127.0.0.1/32"]
)
async def test_no_proxy_names_ports_and_networks(monkeypatch, bypass):
    """An entry of NO_PROXY with a port is for that port only, one with a prefix length for the network."""
    async with answering(b"by proxy") as proxy, answering(b"direct") as server, answering(b"direct") as other:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", bypass.format(port=server.port))
        async with pool_of(1) as pool:
            assert await fetch(pool, server.url) == b"direct"
            assert await fetch(pool, other.url) == (b"by proxy" if "port" in bypass else b"direct")


@pytest.mark.parametrize("variables", [{"NO_PROXY": "127.0.0.1"}, {"HTTP_PROXY": ""}, {"HTTP_PROXY": "{proxy}"}])
@pytest.mark.parametrize("backend", ["httpx", "aiohttp"])
async def test_unused_proxy_is_not_checked(monkeypatch, merchant_keys, gateway_keys, variables, backend):
    """A ``socks://`` in ALL_PROXY is refused only if no other variable is for the endpoints."""
    async with answering(b"{}") as server:
        monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(proxy=server.url))
        merchant = Merchant(
            oid_partner="201103171000000000",
            private_key=merchant_keys.private,
            gateway_public_keys=[gateway_keys.public],
            endpoints=Endpoints(f"{server.url}/apply", f"{server.url}/query"),
            notify_url="https://shop.example/lianlian/refund",
        )
        session = RefundSession(merchant, retry=RetryPolicy(attempts=1), http_backend=backend)
        if variables == {"HTTP_PROXY": ""}:
            with pytest.raises(ConfigurationError, match=r"ALL_PROXY: .* or add 127.0.0.1 to NO_PROXY"):
                await session.__aenter__()
            return
        async with session:
            with pytest.raises(MalformedMessage):
                await session.query_refund(refund_request().query())
    assert server.requests


async def test_unchecked_unusable_proxy_is_not_sent(monkeypatch):
    """A proxy that turns out to be unusable at the first request: *not sent*, and no slot leaks."""
    async with answering() as server, pool_of(1) as pool:
        transport = await HttpSender.open(None, pool, 1)
        monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
        delivery = await transport.post(server.url, b"{}", 5.0)
        assert not delivery.may_have_arrived
        assert "ALL_PROXY" in delivery.reason
        monkeypatch.delenv("ALL_PROXY")
        await assert_all_free(pool, server, 1)


@pytest.mark.parametrize("url", ["http://gateway.invalid/", "https://gateway.invalid/"])
@pytest.mark.lianlian_allow_network  # through a proxy on this machine
async def test_a_dead_proxy_is_named_without_its_password(monkeypatch, url):
    """Nobody listens at the proxy: the reason names it, too."""
    proxy = f"127.0.0.1:{unused_port()}"
    monkeypatch.setenv("ALL_PROXY", f"http://user:sesame@{proxy}")
    transport = await HttpSender.open(None, None, 1, backend="httpx")
    delivery = await transport.post(url, b"{}", 5.0)
    await transport.aclose()
    assert not delivery.may_have_arrived
    assert f"through the proxy {proxy}" in delivery.reason
    assert "sesame" not in delivery.reason


@pytest.mark.lianlian_allow_network  # through a proxy on this machine
async def test_proxy_that_refuses_the_tunnel_is_not_sent(monkeypatch, merchant):
    """The proxy never saw the refund: *not sent*, and the slot is free."""
    async with answering(status="403 Forbidden") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with RefundSession(merchant, max_connections=1, retry=RetryPolicy(attempts=2, initial=0.001)) as session:
            with pytest.raises(RefundNotSent, match="403 Forbidden"):
                await session.apply_refund(refund_request())
    assert [head.split(b" ")[0] for _, head, _ in proxy.requests] == [b"CONNECT"] * 2
    assert not any(body for _, _, body in proxy.requests)


@pytest.mark.parametrize(
    "proxy",
    [
        "ftp://user:sesame@proxy.example",
        "http://user:sesame@[::",
        "http://user:sesame@127.0.0.1:99999",
        pytest.param(
            "socks5://user:sesame@proxy.example",
            marks=pytest.mark.skipif(find_spec("socksio") is not None, reason="httpx[socks] is installed"),
        ),
    ],
)
async def test_unusable_proxy_is_reported_at_opening(monkeypatch, merchant, proxy):
    """The ConfigurationError names the variable and shows no password."""
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY") as caught:
        await RefundSession(merchant).__aenter__()
    assert "sesame" not in str(caught.value)
