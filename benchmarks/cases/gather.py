"""5,000 calls in one `asyncio.gather`.

`apply_refund` on one session with its default settings. All calls must succeed (a `PoolTimeout` ends the run), and the
last thousand should be as fast as the first. The other rows measure the transport alone: the same 5,000 calls as bare
POSTs on one `AsyncClient`, over this library's transport and over httpx's own pool. httpx's pool scans all waiting
requests whenever one ends. Its `timeout` is off, because most of its calls end in `PoolTimeout` with the default.
"""

from __future__ import annotations

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

SESSION, POOL, STOCK = "`apply_refund` in gather", "bare POST, our transport", "bare POST, httpx's own pool"


def run(bench: Bench, report: Report) -> None:
    calls = bench.size(5000)
    with bench.server(calls + 10) as server:

        def job(option: str) -> Job:
            return Job(url=server.url, keys=server.keys, refunds=calls, cpu=bench.client_cpu, option=option)

        programs = {
            SESSION: Program("gather", job("session")),
            POOL: Program("gather", job("pool")),
            STOCK: Program("gather", job("stock")),
        }
        rounds = bench.interleave(programs, server)
    report.table(
        ["program", "calls/s", "CPU per call, ms", "peak memory, MiB", "last fifth ÷ first fifth, time"],
        [
            (
                label,
                rounds.of(label, "rate"),
                rounds.of(label, "cpu_ms"),
                rounds.of(label, "peak_mib"),
                rounds.ratio(label, label, "last", "first"),
            )
            for label in programs
        ],
    )
    report.targets(
        [
            ("time of the last thousand ÷ the first", rounds.ratio(SESSION, SESSION, "last", "first"), "≤", 1.3),
            ("CPU ÷ httpx's own pool (bare POSTs)", rounds.ratio(POOL, STOCK, "cpu_ms"), "≤", 0.3),
        ]
    )
