"""Kill the workers of a fleet: ``python -m tests.programs.fleet --refunds 2000 --kills 20 --workers 3 --seed 1``.

The sandbox on a socket injects every fault into 5 % of the requests. One real PostgreSQL holds a procrastinate queue
and a journal. At random moments a random worker process is killed (SIGKILL) and replaced, or suspended (SIGSTOP) until
its leases have expired and others have taken its refunds. The database is killed at even distances and restarted. In
the end every refund must have been made exactly once or rejected, and the journal must agree with the gateway's books.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from procrastinate.exceptions import ConnectorException

from lianlian_async import BatchStopped, JournalError, Merchant, RefundSession
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal import State
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Repeated, SandboxGateway
from tests.programs.kill import IMPATIENT, LATE, requests, stormy_gateway
from tests.support import ROOT, postgres, program

CONCURRENCY = "LIANLIAN_FLEET_CONCURRENCY"
"""Variable of a worker process: how many refunds it has in flight."""
RESCUE_SECONDS = 2.0
SUSPENDED_SECONDS = 6.0
"""Longer than a lease (twice the deadline of 1 s) and the grace."""


async def work(dsn: str) -> None:
    """Run one worker until a signal ends it."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # both finish the refunds in flight
    logging.disable(logging.WARNING)  # every rejection and every rescued job would be logged
    while True:
        async with (
            PostgresJournal(dsn) as journal,
            RefundSession(Merchant.from_env(), journal=journal, retry=IMPATIENT, deadline=1.0) as session,
            RefundQueue(dsn, rescue_after=RESCUE_SECONDS) as queue,
        ):
            # Four invalid signatures in a row stop the worker: begin again.
            with suppress(BatchStopped):
                await queue.work(session, concurrency=int(os.environ[CONCURRENCY]), wait=False)
        await asyncio.sleep(0.2)


def kill_workers(
    dsn: str,
    *,
    refunds: int,
    kills: int,
    workers: int,
    seed: int,
    repeated: Repeated,
    concurrency: int = 4,
    database_kills: int = 0,
    kill_database: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Run everything; return the refunds for which the journal disagrees with the books, or that were made twice."""
    dice = random.Random(seed)
    # A worker is killed when these numbers of refunds are left: spread over the whole run.
    moments = sorted(dice.sample(range(refunds // 10, refunds + 1), kills))
    gateway = stormy_gateway(refunds, repeated=repeated, seed=seed)
    asyncio.run(_enqueue(dsn, refunds))
    database_moments = [refunds * (number + 1) // (database_kills + 1) for number in range(database_kills)]
    with serving(gateway) as base_url:
        command = [*program("fleet"), "--work"]
        variables = os.environ | environment(gateway, base_url) | {postgres.DSN: dsn, CONCURRENCY: str(concurrency)}
        fleet = [subprocess.Popen(command, cwd=ROOT, env=variables) for _ in range(workers)]
        suspended: dict[subprocess.Popen[bytes], float] = {}
        resumed: list[subprocess.Popen[bytes]] = []
        try:
            while left := asyncio.run(_open(dsn)):
                time.sleep(dice.random() / 5)
                if database_moments and left <= database_moments[-1]:
                    database_moments.pop()
                    kill_database()
                if not moments:  # without faults the rest can finish
                    gateway.faults = {}
                elif left <= moments[-1]:
                    moments.pop()
                    place = dice.randrange(workers)
                    if len(moments) % 2:
                        fleet[place].kill()
                    else:
                        fleet[place].send_signal(signal.SIGSTOP)
                        suspended[fleet[place]] = time.monotonic() + SUSPENDED_SECONDS
                        fleet[place] = subprocess.Popen(command, cwd=ROOT, env=variables)
                for worker in [worker for worker, until in suspended.items() if time.monotonic() > until]:
                    del suspended[worker]
                    resumed.append(worker)
                    worker.send_signal(signal.SIGCONT)
                    worker.terminate()  # it completes what it has in flight: another worker has taken its place
                for place, worker in enumerate(fleet):
                    if worker.poll() is not None:
                        fleet[place] = subprocess.Popen(command, cwd=ROOT, env=variables)
            for worker, until in suspended.items():
                time.sleep(max(0.0, until - time.monotonic()))
                worker.send_signal(signal.SIGCONT)
                worker.terminate()
            for worker in (*suspended, *resumed):
                worker.wait(60)
        finally:
            for worker in (*fleet, *suspended, *resumed):
                worker.kill()
                worker.wait()
    gateway.advance(LATE)  # delayed requests arrive
    return asyncio.run(_audit(dsn, gateway, refunds))


async def _enqueue(dsn: str, refunds: int) -> None:
    async with RefundQueue(dsn, slice_size=max(2, refunds // 40)) as queue, PostgresJournal(dsn):
        await queue.enqueue(requests(refunds))


async def _open(dsn: str) -> int:
    """Return how many refunds are left in the queue; a refund in two slices counts twice."""
    async with RefundQueue(dsn) as queue:
        counts, failures = await queue.counts(), await queue.failures()
    if failures:
        raise RuntimeError(f"refunds failed: {failures}")
    return counts["waiting"] + counts["later"] + counts["at_work"]


async def _audit(dsn: str, gateway: SandboxGateway, refunds: int) -> dict[str, str]:
    contradictions = {}
    async with PostgresJournal(dsn) as journal:
        for request in requests(refunds):
            entry, made = await journal.find(request.no_refund), gateway.times_made(request.no_refund)
            state = None if entry is None else entry.state
            if made != {State.ACCEPTED: 1, State.DONE: 1, State.REJECTED: 0}.get(state):
                contradictions[request.no_refund] = f"{state}, made {made} times"
    return contradictions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refunds", type=int, default=2_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=4, help="of a worker; a slow machine needs a low one")
    parser.add_argument("--database-kills", type=int, default=2)
    parser.add_argument("--repeated", choices=["reject", "again"], help="one kind of gateway; default: both in turn")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        # A suspension, or the database, may break its connections.
        with suppress(JournalError, ConnectorException, KeyboardInterrupt):
            asyncio.run(work(os.environ[postgres.DSN]))
        return 0
    wrong = 0
    kinds = [Repeated(options.repeated)] if options.repeated else [Repeated.REJECT, Repeated.AGAIN]
    for repeated in kinds:
        began = time.monotonic()
        with postgres.running() as server:
            contradictions = kill_workers(
                server.dsn,
                refunds=options.refunds,
                kills=options.kills,
                workers=options.workers,
                seed=options.seed,
                repeated=repeated,
                concurrency=options.concurrency,
                database_kills=options.database_kills,
                kill_database=server.crash,
            )
        verdict = contradictions or "journal and books agree"
        print(f"{repeated.value}, seed {options.seed}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)
        wrong += len(contradictions)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
