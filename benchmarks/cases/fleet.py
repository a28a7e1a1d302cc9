"""Two workers on one PostgreSQL.

Two procrastinate workers, ÷ one: the same refunds from a queue that is filled beforehand, against a gateway that
answers after 50 ms, with a fixed number in flight in each worker. With few in flight a worker mostly waits for the
gateway, and two make nearly twice as many. What limits a fleet is processors: beside the refund itself, a job is
fetched, looked up, intended, resolved and finished in PostgreSQL, which costs the worker three times as much as the
refund, and PostgreSQL half of that again. With more in flight, workers and PostgreSQL, which share two processors
here, come nearer to that limit.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program
from tests.support import postgres

DELAY = 0.05
FEW, MORE = 2, 8
WORKERS = {1: "one worker", 2: "two workers"}


def run(bench: Bench, report: Report) -> None:
    runs = {}
    with bench.server(bench.size(150) * MORE, delay=DELAY) as server, postgres.server() as dsn:
        for in_flight in (FEW, MORE):
            job = Job(url=server.url, keys=server.keys, refunds=bench.size(150) * in_flight, in_flight=in_flight)
            fleets = {
                (label, in_flight): Program("fleet", replace(job, option=str(workers)), env={"LIANLIAN_DSN": dsn})
                for workers, label in WORKERS.items()
            }
            runs[in_flight] = bench.interleave(fleets, server)
    one, two = WORKERS.values()
    ratios = {number: rounds.ratio((two, number), (one, number), "rate") for number, rounds in runs.items()}
    report.table(
        ["", "in flight in each", "refunds/s", "CPU of the workers per refund, ms"],
        [
            (label, in_flight, rounds.of((label, in_flight), "rate"), rounds.of((label, in_flight), "cpu_ms"))
            for in_flight, rounds in runs.items()
            for label in WORKERS.values()
        ],
    )
    report.table(["two workers ÷ one, refunds/s", "measured"], [(f"{MORE} in flight in each", ratios[MORE])])
    report.targets([(f"two workers ÷ one, refunds/s, {FEW} in flight in each", ratios[FEW], "≥", 1.6)])
