"""Two workers on one PostgreSQL.

Two procrastinate workers, ÷ one: the same refunds from a queue that is filled beforehand, with a fixed number in
flight in each worker, against a gateway that answers after 50 ms. So one worker mostly waits for the gateway.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program
from tests import postgres

DELAY = 0.05
IN_FLIGHT = 4
ONE, TWO = "one worker", "two workers"


def run(bench: Bench, report: Report) -> None:
    refunds = bench.size(600)
    with bench.server(refunds, delay=DELAY) as server, postgres.server() as dsn:
        job = Job(url=server.url, keys=server.keys, refunds=refunds, in_flight=IN_FLIGHT)
        fleets = {
            label: Program("fleet", replace(job, option=workers), env={"LIANLIAN_DSN": dsn})
            for label, workers in ((ONE, "1"), (TWO, "2"))
        }
        rounds = bench.interleave(fleets, server)
    report.table(
        ["", "refunds/s", "CPU of the workers per refund, ms"],
        [(label, rounds.of(label, "rate"), rounds.of(label, "cpu_ms")) for label in fleets],
    )
    report.targets([("two workers ÷ one, refunds/s", rounds.ratio(TWO, ONE, "rate"), "≥", 1.6)])
