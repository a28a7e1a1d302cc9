"""The library's own CPU time for one refund.

This case validates a request, canonicalizes and encodes it; decodes, matches and models the answer; and runs the
decision table. It uses keys that cost nothing, and no event loop. The yardstick is one 1024-bit signature by OpenSSL
and one `AsyncClient.post` on a `MockTransport`: a program on httpx needs both.
"""

from __future__ import annotations

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

OWN, YARDSTICK = "own", "yardstick"
STEPS = {
    "validate_ms": "validate",
    "seal_ms": "canonicalize, encode",
    "read_ms": "decode, match, model",
    "resolve_ms": "decide",
}


def run(bench: Bench, report: Report) -> None:
    with bench.server(bits=1024) as server:
        programs = {
            option: Program("own", Job(keys=server.keys, refunds=bench.size(5000), cpu=bench.client_cpu, option=option))
            for option in (OWN, YARDSTICK)
        }
        rounds = bench.interleave(programs)
    report.table(
        ["CPU per refund, ms", *STEPS.values(), "sum"],
        [("ours", *(rounds.of(OWN, step) for step in STEPS), rounds.of(OWN, "cpu_ms"))],
    )
    report.table(
        ["CPU, ms", "1024-bit signature", "`post` on a MockTransport", "sum"],
        [("yardstick", *(rounds.of(YARDSTICK, figure) for figure in ("sign_ms", "post_ms", "cpu_ms")))],
    )
    report.targets([("own CPU ÷ yardstick", rounds.ratio(OWN, YARDSTICK, "cpu_ms"), "≤", 0.25)])
