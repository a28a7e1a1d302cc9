"""A fleet of workers on one PostgreSQL.

Each worker takes its refunds from a queue. The gateway answers after 50 ms. The table compares one, two and three
workers, and one process that makes the same refunds with `refund_many` on a `PostgresJournal` and on a
`SqliteJournal`. To the journal's transactions, the queue adds five for each slice of 200 refunds. With 8 refunds
in flight a worker mostly waits for the gateway, so two workers make nearly twice as many. Processors limit a fleet:
here the workers, PostgreSQL and the gateway share two.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.programs.fleet import ENQUEUE, FIRST, REFUND_MANY, SQLITE
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program
from tests.support import postgres

DELAY = 0.05
FEW, MANY = 8, 64
REFUNDS = {FEW: 2_400, MANY: 4_000}
RUNS = {
    (FEW, "1"): "one worker",
    (FEW, "2"): "two workers",
    (FEW, "3"): "three workers",
    (MANY, "1"): "one worker",
    (MANY, REFUND_MANY): REFUND_MANY,
    (MANY, SQLITE): "refund_many on an SqliteJournal",
}


def run(bench: Bench, report: Report) -> None:
    with bench.server(bench.size(REFUNDS[MANY]), delay=DELAY) as server, postgres.server() as dsn:
        env = {"LIANLIAN_JOURNAL": dsn}
        job = Job(url=server.url, keys=server.keys)
        programs = {
            (in_flight, option): Program(
                "fleet",
                replace(job, refunds=bench.size(REFUNDS[in_flight]), in_flight=in_flight, option=option),
                env=env,
            )
            for in_flight, option in RUNS
        }
        runs = bench.interleave(programs, server)
        enqueued = replace(job, refunds=bench.size(200_000), option=ENQUEUE)
        queue = bench.interleave({ENQUEUE: Program("fleet", enqueued, env=env)})
        waiting = replace(job, refunds=bench.size(bench.requests), option=FIRST)
        first = bench.interleave({FIRST: Program("fleet", waiting, env=env)}, rounds=1)
    columns = {
        "rate": "refunds/s",
        "cpu_ms": "CPU of the workers per refund, ms",
        "database_cpu_ms": "CPU of PostgreSQL per refund, ms",
        "wal_bytes": "bytes of write-ahead log per refund",
    }
    report.table(
        ["", "in flight in each", *columns.values()],
        [(label, run[0], *(runs.of(run, figure) for figure in columns)) for run, label in RUNS.items()],
    )
    report.table(
        ["three workers ÷ one, refunds/s", "measured"],
        [("8 in flight in each", runs.ratio((FEW, "3"), (FEW, "1"), "rate"))],
    )
    report.targets(
        [
            (
                "one worker ÷ refund_many, refunds/s, 64 in flight",
                runs.ratio((MANY, "1"), (MANY, REFUND_MANY), "rate"),
                "≥",
                0.8,
            ),
            (
                "refund_many, PostgresJournal ÷ SqliteJournal, refunds/s",
                runs.ratio((MANY, REFUND_MANY), (MANY, SQLITE), "rate"),
                "≥",
                0.9,
            ),
            (
                "refund_many, PostgresJournal ÷ SqliteJournal, CPU of the worker per refund",
                runs.ratio((MANY, REFUND_MANY), (MANY, SQLITE), "cpu_ms"),
                "≤",
                1.25,
            ),
            ("two workers ÷ one, refunds/s, 8 in flight in each", runs.ratio((FEW, "2"), (FEW, "1"), "rate"), "≥", 1.8),
            ("refunds enqueued in a second", queue.of(ENQUEUE, "rate"), "≥", 20_000),
            (f"seconds to a worker's first refund, {waiting.refunds:,} enqueued", first.of(FIRST, "seconds"), "≤", 5),
        ]
    )
