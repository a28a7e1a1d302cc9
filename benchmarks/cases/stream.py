"""A long stream through `refund_many`.

A generator of requests (a million, or `--requests`) goes through `refund_many` on a transport that answers at once,
with keys that cost nothing. The growth of resident memory is counted from the 1,000th outcome to the last. There is
only one run, because it takes long.
"""

from __future__ import annotations

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program


def run(bench: Bench, report: Report) -> None:
    length = bench.size(bench.requests)
    job = Job(refunds=length - 1000, in_flight=64, warm_up=1000, cpu=bench.client_cpu, option="refund_many")
    rounds = bench.interleave({"stream": Program("memory", job)}, rounds=1)
    report.table(
        ["requests", "refunds/s", "CPU per refund, ms", "growth at the end, MiB", "growth at the peak, MiB"],
        [(f"{length:,}", *(rounds.of("stream", name) for name in ("rate", "cpu_ms", "grown_mib", "most_mib")))],
    )
    report.targets([("growth from the 1,000th to the last, MiB", rounds.of("stream", "grown_mib"), "≤", 20)])
