"""Memory: `gather` against `refund_many`.

The same refunds are made once in one `asyncio.gather` over `apply_refund`, and once through `refund_many` with a
generator of requests. There is no network and no RSA, so these use no memory. The growth is counted from
the first 1,000 refunds on. The memory of gather grows with the number of refunds, because it returns all results at
once.
"""

from __future__ import annotations

from benchmarks import svg
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

WAYS = ("gather", "refund_many")


def run(bench: Bench, report: Report) -> None:
    lengths = [bench.size(length) for length in (1_000, 4_000, 16_000, 64_000)]
    programs = {
        (way, length): Program(
            "memory", Job(refunds=length, in_flight=64, warm_up=1000, cpu=bench.client_cpu, option=way)
        )
        for length in lengths
        for way in WAYS
    }
    rounds = bench.interleave(programs, rounds=min(bench.rounds, 3))
    report.table(
        ["refunds", *(f"{way}: {what}" for way in WAYS for what in ("peak growth, MiB", "CPU per refund, ms"))],
        [
            (f"{length:,}", *(rounds.of((way, length), figure) for way in WAYS for figure in ("most_mib", "cpu_ms")))
            for length in lengths
        ],
    )
    title = "Memory for a batch, beyond what the session has"
    lines = {way: {length: rounds.of((way, length), "most_mib").median for length in lengths} for way in WAYS}
    report.chart("memory", title, svg.lines(title, "refunds", "MiB at the peak", lines))
