"""A fleet: procrastinate workers, each a process of its own, on one queue and one journal in one PostgreSQL.

The option is how many. They start, open all that they need, and then begin together; the clock runs until the last of
them finds the queue empty. The environment's ``LIANLIAN_DSN`` names the server; each run has a database of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable
from dataclasses import asdict, replace
from uuid import uuid4

import psycopg
from psycopg.conninfo import make_conninfo

from benchmarks import workload
from lianlian_async import RefundSession
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal import State
from lianlian_async.journal.postgres import PostgresJournal

from . import frame

WORKER = "worker"


def program(job: frame.Job) -> dict[str, float] | Awaitable[dict[str, float]]:
    server = os.environ["LIANLIAN_DSN"]
    if job.option == WORKER:
        return _work(job, server)
    dsn = _new_database(server)
    asyncio.run(_fill(job, dsn))
    command = [sys.executable, "-m", __spec__.name, json.dumps(asdict(replace(job, option=WORKER)))]
    environment = {**os.environ, "LIANLIAN_DSN": dsn}
    workers = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(int(job.option))
    ]
    for worker in workers:
        worker.stdout.readline()
    began = frame.clocks()
    for worker in workers:
        print(file=worker.stdin, flush=True)
    told = [json.loads(worker.stdout.readline()) for worker in workers]
    result = frame.timed(job.refunds, began)
    for worker in workers:
        worker.communicate()
    asyncio.run(_check(job, dsn))
    return result | {"cpu_ms": sum(each["cpu_ms"] for each in told)}


def _new_database(dsn: str) -> str:
    name = f"fleet_{uuid4().hex}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return make_conninfo(dsn, dbname=name)


async def _fill(job: frame.Job, dsn: str) -> None:
    async with RefundQueue(dsn) as queue, PostgresJournal(dsn):
        await queue.enqueue(map(workload.refund_request, range(job.refunds)))


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
        await queue.work(session, concurrency=job.in_flight, wait=False)
        return frame.timed(job.refunds, began)


if __name__ == "__main__":
    frame.main(program)
