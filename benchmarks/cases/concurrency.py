"""Throughput against the number of refunds in flight, 1 to 1,024.

The table shows refunds per second. The server answers after 20 ms, like a fast gateway. With one refund in flight
this delay is the limit, with many the CPU is. See where each line flattens, and whether it falls again.
"""

from __future__ import annotations

from benchmarks import peers, svg
from benchmarks.peers import AIOHTTP, CORE, FAST, PLAIN, THREADS, TUNED
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench

DELAY = 0.02
IN_FLIGHT = (1, 4, 16, 64, 256, 1024)
LABELS = (FAST, AIOHTTP, CORE, PLAIN, THREADS, TUNED)
_PER_SECOND = {TUNED: 120, PLAIN: 150, CORE: 300}  # about what each reaches: a run takes some three seconds


def run(bench: Bench, report: Report) -> None:
    seconds = 0.5 if bench.quick else 3.0
    most = 1024 * 3 + round(1000 * seconds)
    with bench.server(most, delay=DELAY) as server:
        programs = {}
        for in_flight in IN_FLIGHT:
            for label in LABELS:
                reachable = min(in_flight / DELAY, _PER_SECOND.get(label, 1000))
                job = Job(
                    url=server.url,
                    keys=server.keys,
                    refunds=max(in_flight if label in _PER_SECOND else 2 * in_flight, round(reachable * seconds)),
                    in_flight=in_flight,
                    warm_up=in_flight,
                    cpu=bench.client_cpu,
                )
                programs[label, in_flight] = peers.program(label, job)
        rounds = bench.interleave(programs, server, rounds=min(bench.rounds, 3))
    report.table(
        ["in flight", *LABELS],
        [(n, *(rounds.of((label, n), "rate") for label in LABELS)) for n in IN_FLIGHT],
    )
    lines = {label: {n: rounds.of((label, n), "rate").median for n in IN_FLIGHT} for label in LABELS}
    title = f"Refunds per second, the gateway answering after {DELAY * 1000:.0f} ms"
    report.chart("concurrency", title, svg.lines(title, "refunds in flight", "refunds/s", lines, log_y=True))
