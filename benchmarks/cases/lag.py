"""The event loop's lag while 256 refunds are in flight.

A timer is due every millisecond, first on the idle loop, then in the same process while refunds run. The lag is its
lateness; every missed tick counts. A ratio of 1 (busy ÷ idle) means that other users of the loop notice nothing. As
in a service, the programs may use both processors.
"""

from __future__ import annotations

from benchmarks import svg
from benchmarks.peers import NAIVE, OURS, program
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench

IN_FLIGHT = 256


def run(bench: Bench, report: Report) -> None:
    refunds = bench.size(2560)
    labels = (NAIVE, *OURS)
    with bench.server(IN_FLIGHT + refunds) as server:
        job = Job(url=server.url, keys=server.keys, refunds=refunds, in_flight=IN_FLIGHT, warm_up=IN_FLIGHT, idle=2.0)
        rounds = bench.interleave({label: program(label, job) for label in labels}, server)
    report.table(
        ["program", "idle p99, ms", "busy p99, ms", "busy max, ms", "busy ÷ idle p99"],
        [
            (
                label,
                rounds.of(label, "idle_p99"),
                rounds.of(label, "busy_p99"),
                rounds.of(label, "busy_max"),
                rounds.ratio(label, label, "busy_p99", "idle_p99"),
            )
            for label in labels
        ],
    )
    report.targets(
        [
            (f"{label}: {what}", spread, "≤", bound)
            for label in OURS
            for what, spread, bound in (
                ("p99 lag ÷ idle", rounds.ratio(label, label, "busy_p99", "idle_p99"), 3),
                ("p99 lag ÷ naive's", rounds.ratio(label, NAIVE, "busy_p99"), 0.05),
            )
        ]
    )
    rows = {"idle loop": rounds.of(OURS[0], "idle_p99")} | {label: rounds.of(label, "busy_p99") for label in labels}
    title = f"Event loop lag with {IN_FLIGHT} refunds in flight (p99)"
    report.chart("lag", title, svg.bars(title, "milliseconds: less is better", rows, OURS))
