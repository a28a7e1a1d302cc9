"""A fleet: procrastinate workers, each a process of its own, on one queue and one journal in one PostgreSQL.

The option is the number of workers; or ``refund_many`` for one process that makes the same refunds without a queue;
``sqlite`` for the same on an ``SqliteJournal``; ``enqueue`` to fill the queue only; or ``first`` to fill it, and to
measure the time from the start of a worker to its first refund. Workers start, open all that they need, and then begin
together; the clock runs until the last of them finds the queue empty. The environment's ``LIANLIAN_JOURNAL`` names the
server; each run has a database of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable
from contextlib import aclosing, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import psycopg
from psycopg.conninfo import make_conninfo

from benchmarks import workload
from lianlian_async import RefundSession, refund_many
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal import SqliteJournal, State
from lianlian_async.journal.postgres import PostgresJournal

from . import frame

WORKER = "worker"
REFUND_MANY = "refund_many"
SQLITE = "sqlite"
ENQUEUE = "enqueue"
FIRST = "first"


def program(job: frame.Job) -> dict[str, float] | Awaitable[dict[str, float]]:
    server = os.environ["LIANLIAN_JOURNAL"]
    if job.option.startswith(WORKER):
        return _work(job, server)
    if job.option == SQLITE:
        return _on_sqlite(job)
    dsn = _new_database(server)
    if job.option == ENQUEUE:
        return _fill(job, dsn)
    if job.option == FIRST:
        return _first(job, dsn)
    many = job.option == REFUND_MANY
    asyncio.run(_fill(replace(job, refunds=0) if many else job, dsn))
    option = f"{WORKER} {REFUND_MANY}" if many else WORKER
    workers = [_start(replace(job, option=option), dsn) for _ in range(1 if many else int(job.option))]
    for worker in workers:
        worker.stdout.readline()
    began, database_began, written_before = frame.clocks(), _database_seconds(dsn), _written_bytes(dsn)
    for worker in workers:
        print(file=worker.stdin, flush=True)
    told = [json.loads(worker.stdout.readline()) for worker in workers]
    result = frame.timed(job.refunds, began)
    database = 1000 * (_database_seconds(dsn) - database_began) / job.refunds
    written = (_written_bytes(dsn) - written_before) / job.refunds
    for worker in workers:
        worker.communicate()
    asyncio.run(_check(job, dsn))
    cpu = sum(each["cpu_ms"] for each in told)
    return result | {"cpu_ms": cpu, "database_cpu_ms": database, "wal_bytes": written}


def _start(job: frame.Job, dsn: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(job))]
    environment = {**os.environ, "LIANLIAN_JOURNAL": dsn}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _first(job: frame.Job, dsn: str) -> dict[str, float]:
    """Return the seconds from the start of a worker until its first refund is made."""
    asyncio.run(_fill(job, dsn))
    began = frame.clocks()
    with _start(replace(job, option=f"{WORKER} {FIRST}"), dsn) as worker:
        print(file=worker.stdin, flush=True)
        for line in worker.stdout:
            if line.strip() == FIRST:
                result = frame.timed(1, began)
                worker.kill()
        return result


def _written_bytes(dsn: str) -> int:
    """Return how many bytes the server has written to its write-ahead log since it was created."""
    with psycopg.connect(dsn) as connection:
        [(written,)] = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")
    return int(written)


def _database_seconds(dsn: str) -> float:
    """Return the CPU seconds of the server's processes, also of those that have ended (Linux)."""
    with psycopg.connect(dsn) as connection:
        [(postmaster,)] = connection.execute("SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)")
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it may end meanwhile
                _, parent, *numbers = stat.read_text().rpartition(")")[2].split()
                if stat.parent.name == postmaster:
                    ticks += sum(map(int, numbers[9:13]))
                elif parent == postmaster:
                    ticks += sum(map(int, numbers[9:11]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _new_database(dsn: str) -> str:
    name = f"fleet_{uuid4().hex}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return make_conninfo(dsn, dbname=name)


async def _fill(job: frame.Job, dsn: str) -> dict[str, float]:
    requests = [workload.refund_request(index) for index in range(job.refunds)]
    async with RefundQueue(dsn) as queue, PostgresJournal(dsn):
        began = frame.clocks()
        await queue.enqueue(requests)
        return frame.timed(max(1, job.refunds), began)


async def _check(job: frame.Job, dsn: str) -> None:
    async with PostgresJournal(dsn) as journal:
        if (counts := await journal.counts())[State.ACCEPTED] != job.refunds:
            raise RuntimeError(f"not all refunds were made: {counts}")


async def _work(job: frame.Job, dsn: str) -> dict[str, float]:
    merchant = workload.merchant(job.keys, job.url)
    async with (
        PostgresJournal(dsn) as journal,
        RefundSession(merchant, max_connections=job.in_flight, journal=journal) as session,
        RefundQueue(dsn) as queue,
    ):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began = frame.clocks()
        if job.option.endswith(REFUND_MANY):
            await _refund_many(job, session)
        elif job.option.endswith(FIRST):
            await queue.work(session, concurrency=job.in_flight, on_outcome=lambda _: print(FIRST, flush=True))
        else:
            await queue.work(session, concurrency=job.in_flight, wait=False)
        return frame.timed(job.refunds, began)


async def _on_sqlite(job: frame.Job) -> dict[str, float]:
    merchant = workload.merchant(job.keys, job.url)
    with TemporaryDirectory() as folder:
        async with (
            SqliteJournal(Path(folder, "journal")) as journal,
            RefundSession(merchant, max_connections=job.in_flight, journal=journal) as session,
        ):
            began = frame.clocks()
            await _refund_many(job, session)
            return frame.timed(job.refunds, began) | {"database_cpu_ms": 0.0, "wal_bytes": 0.0}


async def _refund_many(job: frame.Job, session: RefundSession) -> None:
    async with aclosing(refund_many(session, map(workload.refund_request, range(job.refunds)))) as outcomes:
        async for _ in outcomes:
            pass


if __name__ == "__main__":
    frame.main(program)
