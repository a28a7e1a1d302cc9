"""The sandbox behind a real HTTP server."""

import threading
from decimal import Decimal

import anyio
import httpx
import pytest
import uvicorn

from lianlian_async.sandbox import Fault, SandboxGateway, When
from tests.support.sandbox_client import APPLICATION, CROSS_BORDER, Client

pytestmark = pytest.mark.anyio


@pytest.fixture
def client():
    """A client of a sandbox that uvicorn serves in a thread."""
    gateway, ready = SandboxGateway(default_order=Decimal("1000.00")), threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            ready.set()

    server = Server(uvicorn.Config(gateway, port=0, log_config=None, lifespan="on", ws="none", date_header=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(30)
    host, port = server.servers[0].sockets[0].getsockname()
    yield Client(gateway, base_url=f"http://{host}:{port}")
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


async def test_response_has_one_date_header(client):
    """The response has the gateway's Date header only."""
    response = await client.send(CROSS_BORDER, json=client.signed(APPLICATION))
    assert len(response.headers.get_list("date")) == 1


async def test_a_refund_is_made_and_found(client):
    """Both calls work over a socket."""
    applied = await client.apply()
    assert client.is_signed(applied)
    assert (await client.query())["oid_refundno"] == applied["oid_refundno"]


@pytest.mark.parametrize(("when", "made"), [(When.BEFORE, 0), (When.AFTER, 1)])
async def test_a_reset_is_a_broken_connection(client, when, made):
    """The connection ends before the response is complete."""
    client.gateway.script(Fault.RESET, when=when)
    with pytest.raises(httpx.TransportError):
        await client.apply()
    assert client.gateway.times_made("R-1") == made
    assert (await client.apply(no_refund="R-2"))["ret_code"] == "0000"


@pytest.mark.parametrize("fault", [Fault.NO_ANSWER, Fault.LATE])
async def test_no_answer_ends_when_the_client_disconnects(client, fault):
    """After the client's disconnect the server can stop."""
    client.gateway.script(fault)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.apply)
        while not client.gateway.requests["apply"]:  # noqa: ASYNC110 -- the server lives in another thread
            await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    assert (await client.apply(no_refund="R-2"))["ret_code"] == "0000"


async def test_too_large_body_is_refused_unread(client):
    """9002 for a body of several megabytes in many pieces."""
    response = await client.send(CROSS_BORDER, content=b"{" + b" " * 4 * 1024 * 1024 + b"}")
    assert response.json()["ret_code"] == "9002"
