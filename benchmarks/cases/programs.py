"""One refund's cost, by program, at 64 in flight.

The same refunds through the programs that one might write instead, through this library with its four dependencies
and with the extra `fast`, and, as the floor, its parts alone: a signature and a verification by OpenSSL, JSON and
source strings, and a POST by raw aiohttp. All but `raw aiohttp` verify the answers. Read CPU per refund first: it is
what a service pays, and it does not depend on who else uses the machine. Rates do: where the last column is well below
1, somebody else did.

Between the parts' sum and ours, with `fast`, lie httpx's client and its values above the transport, the way to the
signing thread and back, this library's own code (see `own_cpu`), and the event loop's tasks and scopes. Raw aiohttp
signs on the event loop, which stands still meanwhile, and verifies nothing; requests with threads has no event loop.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import peers, svg
from benchmarks.peers import AIOHTTP, CORE, FAST, FLOOR, NAIVE, THREADS
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench

IN_FLIGHT = 64
REFUNDS = {NAIVE: 600, CORE: 1500, peers.PLAIN: 2000, THREADS: 2000, AIOHTTP: 4000, FAST: 4000, FLOOR: 4000}


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
    report.targets(
        [
            (f"{CORE}: refunds/s ÷ naive's", rounds.ratio(CORE, NAIVE, "rate"), "≥", 1.7),
            (f"{CORE}: CPU ÷ naive's", rounds.ratio(CORE, NAIVE, "cpu_ms"), "≤", 0.7),
            (f"{FAST}: refunds/s ÷ naive's", rounds.ratio(FAST, NAIVE, "rate"), "≥", 8),
            (f"{FAST}: refunds/s ÷ requests + threads", rounds.ratio(FAST, THREADS, "rate"), "≥", 1.8),
            (f"{FAST}: refunds/s ÷ raw aiohttp, no checks", rounds.ratio(FAST, AIOHTTP, "rate"), "≥", 0.9),
            (f"{FAST}: the parts' sum ÷ our CPU", rounds.ratio(FLOOR, FAST, "cpu_ms"), "≥", 0.6),
        ]
    )
    rates = {label: rounds.of(label, "rate") for label in programs if label != FLOOR}
    title = "Refunds per second on one processor"
    report.chart("refunds", title, svg.bars(title, "refunds/s: more is better", rates, peers.OURS))
    costs = {label: rounds.of(label, "cpu_ms") for label in programs}
    title = "CPU time per refund"
    report.chart("cpu", title, svg.bars(title, "milliseconds: less is better", costs, peers.OURS))
