"""Several worker processes of a real server share one ``PostgresJournal``."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from contextlib import AsyncExitStack, contextmanager
from decimal import Decimal

import httpx
import pytest

from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway
from tests.support import ROOT
from tests.support.parties import refund_request

pytestmark = pytest.mark.anyio

WORKERS = 3
SERVERS = {
    "uvicorn": "uvicorn --workers {workers} --fd {fd} --log-level warning {app}",
    "gunicorn": "gunicorn --worker-class asgi --workers {workers} --bind fd://{fd} --log-level warning {app}",
}


@pytest.fixture
def anyio_backend():
    """psycopg, uvicorn and gunicorn run on asyncio only."""
    return "asyncio"


@contextmanager
def served(server, gateway, base_url, dsn):
    """Run the service with ``WORKERS`` workers, and yield its URL; the server must stop cleanly."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = SERVERS[server].format(workers=WORKERS, fd=listener.fileno(), app="tests.support.web_service:app")
        variables = os.environ | environment(gateway, base_url) | {"SHOP_DSN": dsn, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split()], cwd=ROOT, env=variables, pass_fds=[listener.fileno()]
        )
    try:
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (0, -signal.SIGTERM)


async def connections(stack, url):
    """Return one open connection to each worker."""
    by_worker = {}
    while len(by_worker) < WORKERS:
        found = [httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=1), timeout=60) for _ in range(8)]
        answers = await asyncio.gather(*(client.get("/worker") for client in found))
        for client, answer in zip(found, answers, strict=True):
            stack.push_async_callback(client.aclose)
            by_worker.setdefault(answer.json(), client)
    return by_worker.values()


@pytest.mark.parametrize("server", SERVERS)
async def test_a_refund_posted_to_all_workers_at_once_is_made_once(server, database):
    """Every worker responds with the number of the one refund, although the gateway makes whatever it gets."""
    gateway = SandboxGateway(repeated=Repeated.AGAIN, default_order=Decimal("100000000.00"))
    gateway.script(Fault.DELAY, call="apply", delay=0.3)
    with serving(gateway) as base_url, served(server, gateway, base_url, database) as url:
        async with AsyncExitStack() as stack:
            posts = [
                client.post("/refunds", json=refund_request().to_dict()) for client in await connections(stack, url)
            ]
            answers = await asyncio.gather(*posts)
    (record,) = gateway.refunds
    assert [(each.status_code, each.json()) for each in answers] == [(200, record.oid_refundno)] * WORKERS
    assert gateway.requests["apply"] == gateway.times_made("R-1") == 1
