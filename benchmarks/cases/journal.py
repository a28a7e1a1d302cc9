"""The price of a journal.

First `SqliteJournal` alone: begin and finish, 1,000 refunds at a time, each commit synced to the disk of the `--cache`
folder. Then a batch through `refund_many` with and without the journal, 64 in flight. Last, a journal of a million rows
(or `--requests`) with 1,000 unresolved ones: the time from opening it to the first query.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.programs.frame import Job
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

VERBS, WITH, WITHOUT, REOPEN = "begin + finish", "with journal", "without", "reopen"


def run(bench: Bench, report: Report) -> None:
    refunds = bench.size(4000)
    with bench.server(refunds + 128) as server:
        job = Job(url=server.url, keys=server.keys, refunds=refunds, in_flight=64, warm_up=128)
        batches = {
            WITH: Program("batch", replace(job, option="journal")),
            WITHOUT: Program("batch", replace(job, option="plain")),
        }
        batch = bench.interleave(batches, server)
        alone = Job(keys=server.keys, refunds=bench.size(30_000), in_flight=1000, warm_up=1000, option="verbs")
        verbs = bench.interleave({VERBS: Program("journal", alone)})
        rows = bench.size(bench.requests)
        fill = Job(keys=server.keys, refunds=rows, in_flight=1000, option="fill")
        bench.interleave({f"fill {rows:,}": Program("journal", fill)}, rounds=1)
        reopened = bench.interleave({REOPEN: Program("journal", Job(keys=server.keys, option="reopen"))})
    report.table(
        ["", "refunds/s", "CPU per refund, ms", "bytes per refund"],
        [
            (VERBS, verbs.of(VERBS, "rate"), verbs.of(VERBS, "cpu_ms"), verbs.of(VERBS, "bytes")),
            *((f"`refund_many` {label}", batch.of(label, "rate"), batch.of(label, "cpu_ms"), "") for label in batches),
        ],
    )
    report.targets(
        [
            ("`SqliteJournal` alone, refunds/s", verbs.of(VERBS, "rate"), "≥", 5000),
            ("`SqliteJournal` alone, CPU per refund, ms", verbs.of(VERBS, "cpu_ms"), "≤", 0.15),
            ("bytes per refund", verbs.of(VERBS, "bytes"), "≤", 1024),
            ("batch with journal ÷ without, refunds/s", batch.ratio(WITH, WITHOUT, "rate"), "≥", 0.85),
            (f"{rows:,} rows: first query after, s", reopened.of(REOPEN, "seconds"), "≤", 2),
        ]
    )
