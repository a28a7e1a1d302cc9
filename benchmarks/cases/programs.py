"""The cost of one refund, by program, at 64 in flight.

The same refunds are made by programs that one might write instead, and by this library with its four dependencies and
with the extra `fast`. The floor is the sum of the necessary parts alone: a signature and a verification by OpenSSL,
JSON and source strings, and a POST by raw aiohttp. All programs but one verify the answers.

Compare the CPU per refund first: it depends less on other users of the machine than the rate. If the last column
is well below the number of processors, another program used the machine.

The naive program has httpx's default limits (100 connections, 20 of them kept alive); the second one has a pool of
64. Raw aiohttp, httpx with OpenSSL and the naive programs sign on the event loop, which is blocked meanwhile (see
`lag`); requests with threads has no event loop. With `fast`, the library costs more than the floor because of httpx's
client, the signing thread, the library's own code (see `own_cpu`), and the event loop's tasks and cancel scopes.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import peers, svg
from benchmarks.peers import AIOHTTP, CORE, FAST, FLOOR, NAIVE, PLAIN, THREADS, TUNED, UNCHECKED
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench

IN_FLIGHT = 64
REFUNDS = {
    NAIVE: 600,
    TUNED: 600,
    CORE: 1500,
    PLAIN: 2000,
    THREADS: 2000,
    AIOHTTP: 4000,
    UNCHECKED: 4000,
    FAST: 4000,
    FLOOR: 4000,
}


def run(bench: Bench, report: Report) -> None:
    with bench.server(2 * IN_FLIGHT + max(REFUNDS.values())) as server:
        job = Job(url=server.url, keys=server.keys, in_flight=IN_FLIGHT, warm_up=2 * IN_FLIGHT, cpu=bench.client_cpu)
        programs = {
            label: peers.program(label, replace(job, refunds=bench.size(refunds))) for label, refunds in REFUNDS.items()
        }
        rounds = bench.interleave(programs, server)
    report.table(
        [
            "program",
            "refunds/s",
            "CPU per refund, ms",
            "refunds/s ÷ naive's",
            "CPU ÷ naive's",
            "share of the processor",
        ],
        [
            (
                label,
                rounds.of(label, "rate"),
                rounds.of(label, "cpu_ms"),
                rounds.ratio(label, NAIVE, "rate"),
                rounds.ratio(label, NAIVE, "cpu_ms"),
                rounds.of(label, "share"),
            )
            for label in programs
        ],
    )
    parts = ("sign_ms", "verify_ms", "codecs_ms", "post_ms")
    report.table(
        ["part of the floor", *(part.removesuffix("_ms") for part in parts)],
        [("CPU, ms", *(rounds.of(FLOOR, part) for part in parts))],
    )
    rate, cost = (0.65, 0.37) if bench.client_cpu is not None else (0.9, 0.27)
    report.targets(
        [
            (f"{CORE}: refunds/s ÷ naive's", rounds.ratio(CORE, NAIVE, "rate"), "≥", 1.7),
            (f"{CORE}: CPU ÷ naive's", rounds.ratio(CORE, NAIVE, "cpu_ms"), "≤", 0.75),
            (f"{FAST}: refunds/s ÷ naive's", rounds.ratio(FAST, NAIVE, "rate"), "≥", 8),
            (f"{FAST}: CPU ÷ naive's", rounds.ratio(FAST, NAIVE, "cpu_ms"), "≤", cost),
            (f"{FAST}: refunds/s ÷ requests + threads", rounds.ratio(FAST, THREADS, "rate"), "≥", 1.8),
            (f"{FAST}: refunds/s ÷ raw aiohttp inline", rounds.ratio(FAST, AIOHTTP, "rate"), "≥", rate),
            (f"{FAST}: the parts' sum ÷ our CPU", rounds.ratio(FLOOR, FAST, "cpu_ms"), "≥", 0.6),
        ]
    )
    rates = {label: rounds.of(label, "rate") for label in programs if label != FLOOR}
    title = report.titled("Refunds per second")
    report.chart("refunds", title, svg.bars(title, "refunds/s: more is better", rates, peers.OURS))
    costs = {label: rounds.of(label, "cpu_ms") for label in programs}
    title = report.titled("CPU time per refund")
    report.chart("cpu", title, svg.bars(title, "milliseconds: less is better", costs, peers.OURS))
