"""The transport against httpx's own pool, with 16 to 1,024 requests in flight.

Bare POSTs go through one `AsyncClient`, so that only the transport differs: this library's pool of single-connection
transports; its transport over aiohttp (extra `fast`); httpx's own pool, which scans every connection for each
request; and httpx-aiohttp's. The CPU time of one request should not grow with the number in flight. It grows because
Python's garbage collector traverses all live objects; so ours also runs with the collector off.
"""

from __future__ import annotations

from benchmarks import svg
from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

LABELS = {"pool": "ours", "fast": "ours, with `fast`", "stock": "httpx's own pool", "aiohttp": "httpx-aiohttp"}
UNCOLLECTED = ("pool uncollected", "fast uncollected")
IN_FLIGHT = (16, 64, 256, 1024)


def run(bench: Bench, report: Report) -> None:
    with bench.server() as server:
        programs = {}
        ends = (IN_FLIGHT[0], IN_FLIGHT[-1])
        for in_flight in IN_FLIGHT:
            for option in (*LABELS, *(UNCOLLECTED if in_flight in ends else ())):
                job = Job(
                    url=server.url,
                    keys=server.keys,
                    refunds=max(bench.size(1500 if option == "stock" else 6000), 2 * in_flight),
                    in_flight=in_flight,
                    warm_up=2 * in_flight,
                    cpu=bench.client_cpu,
                    option=option,
                )
                programs[option, in_flight] = Program("posts", job)
        rounds = bench.interleave(programs, server)
    report.table(
        ["in flight", *(f"{label}: {figure}" for label in LABELS.values() for figure in ("requests/s", "CPU, ms"))],
        [
            (n, *(rounds.of((option, n), figure) for option in LABELS for figure in ("rate", "cpu_ms")))
            for n in IN_FLIGHT
        ],
    )
    report.targets(
        [
            *(
                (f"requests/s ÷ httpx's own, {n} in flight", rounds.ratio(("pool", n), ("stock", n), "rate"), "≥", 2.5)
                for n in IN_FLIGHT[1:]
            ),
            *(
                (f"{name}: CPU at 1,024 ÷ at 16", rounds.ratio((option, 1024), (option, 16), "cpu_ms"), "≤", 1.3)
                for option, name in (
                    ("pool", "ours"),
                    ("pool uncollected", "ours, no garbage collector"),
                    ("fast", "ours, with `fast`"),
                    ("fast uncollected", "ours, with `fast`, no garbage collector"),
                )
            ),
        ]
    )
    lines = {label: {n: rounds.of((option, n), "cpu_ms").median for n in IN_FLIGHT} for option, label in LABELS.items()}
    title = "CPU time of one request"
    report.chart("transport", title, svg.lines(title, "requests in flight", "ms", lines, log_y=True))
