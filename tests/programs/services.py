"""Notify two services of many refunds, and kill a worker.

Run ``python -m tests.programs.services --refunds 2000 --seed 1``.

The services are FastAPI under uvicorn, then aiohttp's runner. Each has two worker processes behind a load balancer,
which share one ``PostgresJournal``. The sandbox's notifications are duplicated, concurrent, out of order, early,
replayed, and mixed with forgeries; one worker is killed (SIGKILL) midway. In the end each final refund must have been
handled with the state in the gateway's books and marked in the journal, no forgery may be acknowledged, and only
refunds that the killed worker had begun may be handled twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import cycle

import anyio
import attrs
import httpx
import psycopg

from lianlian_async import Merchant, NotificationEndpoint, Refund, RefundSession, refund_many
from lianlian_async.cli.sandbox.server import environment
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import NotificationFault, Notifier, SandboxGateway
from lianlian_async.transport import PoolTransport, asgi_transport
from tests.support import ROOT, postgres, program
from tests.support.notices import until
from tests.support.parties import refund_request

SERVICES = ("fastapi", "aiohttp")

BASE_URL = "http://127.0.0.1:9"
"""The gateway's base URL, equal for all sessions of the journal. The sessions of the workers send nothing to it."""

ALL_FAULTS = dict.fromkeys(NotificationFault, 0.3)

_TABLES = """
CREATE TABLE begun (no_refund text NOT NULL, worker text NOT NULL);
CREATE TABLE handled (no_refund text NOT NULL, sta_refund text NOT NULL, worker text NOT NULL);
"""


# ── a worker of the service ──────────────────────────────────────────────────────────────────────


async def work(service: str, name: str, listener: socket.socket, dsn: str) -> None:
    """Serve the route of the notifications on ``listener`` until a signal arrives."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as shop:

        async def on_refund(refund: Refund) -> None:
            await shop.execute("INSERT INTO begun VALUES (%s, %s)", [refund.no_refund, name])
            await anyio.sleep(0.002)
            await shop.execute("INSERT INTO handled VALUES (%s, %s, %s)", [refund.no_refund, refund.sta_refund, name])

        merchant, journal = Merchant.from_env(), PostgresJournal(dsn)
        session = RefundSession(merchant, journal=journal)
        endpoint = NotificationEndpoint(merchant, on_refund, journal=journal, session=session, handler_seconds=2.0)
        await (_fastapi if service == "fastapi" else _aiohttp)(listener, endpoint, journal, session, endpoint)


async def _fastapi(listener: socket.socket, endpoint: NotificationEndpoint, *contexts) -> None:
    import uvicorn
    from fastapi import FastAPI

    from lianlian_async.contrib.fastapi import lifespan, notifications

    app = FastAPI(lifespan=lifespan(*contexts))
    app.include_router(notifications(endpoint, "/lianlian/refund"))
    await uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None)).serve(sockets=[listener])


async def _aiohttp(listener: socket.socket, endpoint: NotificationEndpoint, *contexts) -> None:
    from aiohttp import web

    from lianlian_async.contrib.aiohttp import lifespan, notifications

    app = web.Application()
    app.cleanup_ctx.append(lifespan(*contexts))
    app.router.add_post("/lianlian/refund", notifications(endpoint))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        await anext(signals)
    await runner.cleanup()


# ── the process that notifies and kills ──────────────────────────────────────────────────────────


@attrs.frozen
class Report:
    """The result for one service."""

    service: str
    refunds: int
    deliveries: int
    forgeries: int
    handled: int
    """Refunds that were handled."""
    handled_by_the_killed: int
    again: int
    """Refunds that were handled more than once."""
    problems: dict[str, str]
    """Violations by ``no_refund``; must be empty."""
    seconds: float


class LoadBalancer(httpx.AsyncBaseTransport):
    """Sends requests to the workers in turn, and to the next one if a worker cannot be reached."""

    def __init__(self, ports: Iterable[int]) -> None:
        self._ports = cycle(ports)
        self._pool = PoolTransport(64)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=next(self._ports))
        try:
            return await self._pool.handle_async_request(request)
        except httpx.ConnectError:
            request.url = request.url.copy_with(port=next(self._ports))
            return await self._pool.handle_async_request(request)

    async def aclose(self) -> None:
        await self._pool.aclose()


@contextmanager
def _workers(service: str, gateway: SandboxGateway, dsn: str) -> Iterator[dict[int, subprocess.Popen]]:
    """Run two workers, and yield them by port."""
    variables = os.environ | environment(gateway, BASE_URL) | {postgres.DSN: dsn}
    workers = {}
    try:
        for name in ("first", "second"):
            with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
                command = [*program("services"), "--work", service, "--name", name]
                command += ["--listener", str(listener.fileno())]
                process = subprocess.Popen(command, cwd=ROOT, env=variables, pass_fds=[listener.fileno()])
                workers[listener.getsockname()[1]] = process
        yield workers
    finally:
        for process in workers.values():
            process.terminate()
        for process in workers.values():
            process.wait()


async def notify_and_kill(service: str, dsn: str, *, refunds: int, seed: int) -> Report:
    """Run everything for one service; ``dsn`` names an empty database."""
    began = time.monotonic()
    gateway = SandboxGateway(default_order=Decimal("10.00"), settle_after=0.5)
    dice = random.Random(seed)
    late: list[Refund] = []

    async def too_late(refund: Refund) -> None:
        late.append(refund)

    for number in dice.sample(range(refunds), refunds // 4):
        gateway.fail(f"R-{number}")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as shop, PostgresJournal(dsn) as journal:
        await shop.execute(_TABLES)
        with _workers(service, gateway, dsn) as workers:
            first, second = workers.values()
            notifier = Notifier(
                gateway,
                transport=LoadBalancer(workers),
                every=1.0,
                times=300,
                faults=ALL_FAULTS,
                seed=seed,
            )
            merchant = gateway.merchant(BASE_URL)
            session = RefundSession(merchant, transport=asgi_transport(notifier), journal=journal)
            url = "http://127.0.0.1/lianlian/refund"
            requests = (refund_request(number, notify_url=url) for number in range(refunds))
            async with notifier, session, anyio.create_task_group() as tasks:
                tasks.start_soon(_kill_midway, shop, first, dice.randint(refunds // 4, refunds // 2))
                async for outcome in refund_many(session, requests):
                    assert outcome.refund is not None, outcome.error
                await until(lambda: not notifier.pending)
                # Mark the refunds that the killed worker handled but did not mark; no handler may be called.
                endpoint = NotificationEndpoint(merchant, too_late, journal=journal, session=session)
                await endpoint.sweep()
            ends = first.poll(), second.poll()
        rows = await (await shop.execute("SELECT no_refund, sta_refund, worker FROM handled")).fetchall()
        begun = set(await (await shop.execute("SELECT no_refund, worker FROM begun")).fetchall())
        left = [entry.no_refund async for entry in journal.pending()]
        left += [entry.no_refund async for entry in (await journal.inbox()).pending()]
    problems = _problems(gateway, notifier, rows, begun) | dict.fromkeys(left, "still pending in the journal")
    problems |= {str(refund.no_refund): "left to the sweep" for refund in late}
    if ends != (-signal.SIGKILL, None):
        problems["workers"] = f"ended with {ends}"
    times = Counter(number for number, _, _ in rows)
    return Report(
        service=service,
        refunds=refunds,
        deliveries=len(notifier.deliveries),
        forgeries=sum(delivery.forged for delivery in notifier.deliveries),
        handled=len(times),
        handled_by_the_killed=sum(worker == "first" for _, _, worker in rows),
        again=sum(count > 1 for count in times.values()),
        problems=problems,
        seconds=round(time.monotonic() - began, 1),
    )


async def _kill_midway(shop: psycopg.AsyncConnection, worker: subprocess.Popen, after: int) -> None:
    """Kill ``worker`` when ``after`` refunds are handled, some of them by this worker."""
    count = "SELECT count(*), count(*) FILTER (WHERE worker = 'first') FROM handled"
    while True:
        row = await (await shop.execute(count)).fetchone()
        if row[0] >= after and row[1]:
            break
        await anyio.sleep(0.001)
    worker.kill()
    worker.wait()


def _problems(gateway: SandboxGateway, notifier: Notifier, rows, begun) -> dict[str, str]:
    problems = {}
    told: dict[str, list[tuple[str, str]]] = {}
    for number, status, worker in rows:
        told.setdefault(number, []).append((status, worker))
    for record in gateway.refunds:
        number = record.no_refund
        handled = told.pop(number, [])
        if not handled:
            problems[number] = "missed"
        elif {status for status, _ in handled} != {record.status(gateway.now())}:
            problems[number] = "handled in another state"
        elif len(handled) > 1 and ((number, "first") not in begun or len(handled) > 2):
            problems[number] = f"handled {len(handled)} times"
    problems |= dict.fromkeys(told, "handled, but never made")
    for delivery in notifier.deliveries:
        if delivery.forged and delivery.acknowledged:
            problems[delivery.no_refund] = "a forgery was acknowledged"
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refunds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    for name in ("--work", "--name", "--listener"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        listener = socket.socket(fileno=int(options.listener))
        anyio.run(work, options.work, options.name, listener, os.environ[postgres.DSN])
        return 0
    problems = 0
    with postgres.server() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        for service in SERVICES:
            connection.execute(f"CREATE DATABASE {service}")
            database = psycopg.conninfo.make_conninfo(dsn, dbname=service)

            async def run(service: str = service, database: str = database) -> Report:
                return await notify_and_kill(service, database, refunds=options.refunds, seed=options.seed)

            report = anyio.run(run)
            print(json.dumps({"seed": options.seed, **attrs.asdict(report)}, indent=2), flush=True)
            problems += len(report.problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
