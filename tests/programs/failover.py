"""Let a journal's database lose its last commits: ``python -m tests.programs.failover --refunds 125``.

The gateway carries out every request, so a second request for a refund moves the money twice. The database is copied
or its commits are delayed, refunds are made, the database is killed (SIGKILL), and the copy or the restarted server
takes over. Then the same refunds are requested again: by the same batch in the same process, by the batch in a new
process, and by the workers of a queue. No refund may be made twice.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal

import psycopg
from procrastinate.exceptions import ConnectorException

from lianlian_async import LianLianError, Merchant, RefundRequest, RefundSession
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Repeated, SandboxGateway
from tests.programs import fleet
from tests.support import ROOT, postgres, program
from tests.support.notices import until
from tests.support.parties import refund_request

KILLS = 3
"""Kills of the server that commits."""


def requests(count: int):
    """The batch."""
    return [refund_request(number, money_refund=Decimal("10.00")) for number in range(count)]


def a_gateway(delay: float = 0.0) -> SandboxGateway:
    """Return a gateway that carries out every request."""
    return SandboxGateway(default_order=Decimal("100000.00"), repeated=Repeated.AGAIN, delay=delay)


def made_twice(gateway: SandboxGateway, refunds: int) -> int:
    """Return how many refunds were made more than once."""
    return sum(gateway.times_made(request.no_refund) > 1 for request in requests(refunds))


def loses_the_last_commits(server: postgres.Server) -> Callable[[], None]:
    """Copy the database; return a function that kills it and starts the copy in its place."""
    server.back_up()

    def fail_over() -> None:
        server.kill()
        server.start("copy")

    return fail_over


def commits_late(server: postgres.Server) -> Callable[[], None]:
    """Let the database answer before a commit is on disk; return a function that kills and restarts it."""
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        for setting in ("synchronous_commit = off", "wal_writer_delay = '10s'"):
            connection.execute(f"ALTER SYSTEM SET {setting}")
        connection.execute("SELECT pg_reload_conf()")
    return server.crash


async def run_batch(dsn: str, gateway: SandboxGateway, refunds: int, then: Callable[[], None] | None = None) -> None:
    """Make the refunds; call ``then``, and make them again with the same journal and session."""
    async with PostgresJournal(dsn) as journal, gateway.session(journal=journal, max_connections=50) as session:
        await _all_made(session, refunds)
        if then is not None:
            then()
            await _all_made(session, refunds)


async def _all_made(session: RefundSession, refunds: int) -> None:
    left = requests(refunds)
    while left:  # a connection that the failover broke fails once
        outcomes = await asyncio.gather(*(session.outcome_of(request) for request in left))
        left = [outcome.request for outcome in outcomes if outcome.error is not None]


def batch(refunds: int, prepare: Callable[[postgres.Server], Callable[[], None]], *, same_process: bool) -> int:
    """Run a batch, lose commits, and run it again; return how many refunds were made twice."""
    gateway = a_gateway()
    with postgres.running() as server:
        asyncio.run(run_batch(server.dsn, gateway, 1))  # the copy needs an existing journal
        lose = prepare(server)
        if same_process:
            asyncio.run(run_batch(server.dsn, gateway, refunds, lose))
        else:
            asyncio.run(run_batch(server.dsn, gateway, refunds))
            lose()
            asyncio.run(run_batch(server.dsn, gateway, refunds))
    return made_twice(gateway, refunds)


def queue(refunds: int) -> int:
    """Let the database of running workers lose commits; return how many refunds were made twice."""
    gateway = a_gateway(delay=0.05)
    with postgres.running() as server, serving(gateway) as base_url:
        asyncio.run(_enqueue(server.dsn, refunds))
        command = [*program("failover"), "--work"]
        variables = os.environ | environment(gateway, base_url) | {postgres.DSN: server.dsn}
        fail_over = loses_the_last_commits(server)
        workers = [subprocess.Popen(command, cwd=ROOT, env=variables) for _ in range(2)]
        try:
            while gateway.requests["apply"] < refunds // 3:
                time.sleep(0.01)
            fail_over()
            while _left(server.dsn):
                for place, worker in enumerate(workers):
                    if worker.poll() is not None:
                        workers[place] = subprocess.Popen(command, cwd=ROOT, env=variables)
                time.sleep(0.2)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    return made_twice(gateway, refunds)


def killed_during_commits(refunds: int) -> int:
    """Kill the server while it commits; return how many refunds it lost, or were made twice."""
    gateway = a_gateway()
    with postgres.running() as server:
        told = asyncio.run(_make_and_kill(server, gateway, refunds))
        lost = asyncio.run(_lost(server.dsn, gateway, told))
    return lost + made_twice(gateway, refunds)


async def _make_and_kill(server: postgres.Server, gateway: SandboxGateway, refunds: int) -> set[str]:
    """Apply for each refund once; return those for which the caller got an outcome."""
    told, begun, left, is_up = set[str](), list[RefundRequest](), iter(requests(refunds)), asyncio.Event()
    is_up.set()

    async def make(session: RefundSession) -> None:
        for request in left:
            await is_up.wait()
            begun.append(request)
            outcome = await session.outcome_of(request)
            if outcome.error is None:
                told.add(request.no_refund)

    async with (
        PostgresJournal(server.dsn) as journal,
        gateway.session(journal=journal, deadline=3.0) as session,  # a call that a kill breaks queries until then
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(4):
            tasks.create_task(make(session))
        for share in range(1, KILLS + 1):
            await until(lambda share=share: len(begun) >= refunds * share // (KILLS + 1))
            is_up.clear()
            await asyncio.to_thread(server.crash)
            is_up.set()
    return told


async def _lost(dsn: str, gateway: SandboxGateway, told: set[str]) -> int:
    """Return how many refunds lack a record of a made refund or of an outcome that a caller got."""
    made = {record.no_refund for record in gateway.refunds}
    async with PostgresJournal(dsn) as journal:
        known = {entry.no_refund: entry.ending async for entry in journal.entries()}
    return len(made - known.keys()) + sum(known.get(number) is None for number in told)


async def _enqueue(dsn: str, refunds: int) -> None:
    async with RefundQueue(dsn) as jobs, PostgresJournal(dsn):
        await jobs.enqueue(requests(refunds))


def _left(dsn: str) -> int:
    with psycopg.connect(dsn) as connection:
        [(count,)] = connection.execute(
            "SELECT count(*) FROM procrastinate_jobs"
            " WHERE task_name = 'lianlian:refunds' AND coalesce(scheduled_at < now(), true)"
        )
    return count


async def work(dsn: str) -> None:
    """Run one worker until the queue is empty or the database is down."""
    logging.disable(logging.CRITICAL)  # the failover makes noise
    async with (
        PostgresJournal(dsn) as journal,
        RefundSession(Merchant.from_env(), journal=journal, deadline=5.0) as session,
        RefundQueue(dsn, rescue_after=fleet.RESCUE_SECONDS) as jobs,
    ):
        await jobs.work(session, wait=False)


SCENARIOS: dict[str, Callable[[int], int]] = {
    "batch, copy takes over, same process": lambda refunds: batch(refunds, loses_the_last_commits, same_process=True),
    "batch, copy takes over, new process": lambda refunds: batch(refunds, loses_the_last_commits, same_process=False),
    "batch, synchronous_commit = off": lambda refunds: batch(refunds, commits_late, same_process=False),
    "batch, killed during commits": killed_during_commits,
    "queue, copy takes over": queue,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refunds", type=int, default=125)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        with suppress(LianLianError, ConnectorException):
            asyncio.run(work(os.environ[postgres.DSN]))
        return 0
    twice = 0
    for name, scenario in SCENARIOS.items():
        count = scenario(options.refunds)
        print(f"{name}: made twice or lost {count} of {options.refunds}", flush=True)
        twice += count
    return 1 if twice else 0


if __name__ == "__main__":
    sys.exit(main())
