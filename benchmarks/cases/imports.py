"""The time of `from lianlian_async import *`.

This imports all public names: the package imports each one when it is first used. The yardstick imports the parts of
the four dependencies that the library uses: httpx, attrs, anyio's tasks, locks and threads, and pycryptodome's RSA,
PKCS #1 v1.5 (MD5, SHA-256). Both run in an environment with the four dependencies only, with compiled code and warm
file caches, as the first import of a process. Compare the CPU times.
"""

from __future__ import annotations

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

LIBRARY, DEPENDENCIES = "`from lianlian_async import *`", "its four dependencies"


def run(bench: Bench, report: Report) -> None:
    programs = {
        LIBRARY: Program("imports", Job(option="library", cpu=bench.client_cpu), core=True),
        DEPENDENCIES: Program("imports", Job(option="dependencies", cpu=bench.client_cpu), core=True),
    }
    bench.interleave(programs, rounds=1)  # warms the file caches
    rounds = bench.interleave(programs, rounds=3 * bench.rounds)
    report.table(
        ["import", "CPU, ms", "peak memory, MiB"],
        [(label, rounds.of(label, "cpu_ms"), rounds.of(label, "peak_mib")) for label in programs],
    )
    report.targets([("CPU ÷ that of the dependencies", rounds.ratio(LIBRARY, DEPENDENCIES, "cpu_ms"), "≤", 1.15)])
