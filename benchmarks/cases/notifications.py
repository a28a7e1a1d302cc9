"""Notifications per second and process.

`NotificationEndpoint.handle` in memory: signatures of 2048 bits verified, each final refund acted on once, no journal.
The handler by hand verifies with the same RSA library and answers, nothing else: it does not detect duplicate keys,
another merchant's refunds, duplicates, contradictions or a handler that hangs. Both are called from 16 tasks with the
same signed notifications, without a network. Both only compute, so the ratio of their rates is the ratio of their CPU
times. Ours adds, in order of cost: a `Refund` of checked values, a cancel scope for the handler, and strict JSON.

The second table shows the time of an acknowledgement while 64 refunds are in flight in the same process. Notifications
arrive at a constant 300 per second, and each is timed from the moment it was due.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from benchmarks import openssl, workload
from benchmarks.peers import CORE, FAST
from benchmarks.programs.frame import Job
from benchmarks.programs.notifications import FILE
from benchmarks.report import Report
from benchmarks.runner import Bench, Program

NOTIFICATIONS, WARM_UP, WHILE_REFUNDING = 12_000, 500, 3000
BY_HAND = {CORE: "by hand, pycryptodome", FAST: "by hand, OpenSSL"}
BUSY = {CORE: f"{CORE}, refunding", FAST: f"{FAST}, refunding"}


def run(bench: Bench, report: Report) -> None:
    notifications = bench.size(NOTIFICATIONS)
    with bench.server(8192) as server:
        _sign(Path(server.keys), WARM_UP + notifications)
        job = Job(server.url, server.keys, notifications, in_flight=16, warm_up=WARM_UP, cpu=bench.client_cpu)
        busy = replace(job, refunds=bench.size(WHILE_REFUNDING), in_flight=64, warm_up=0, option="busy")
        programs = {}
        for label in (CORE, FAST):
            programs[label] = _program(label, replace(job, option="endpoint"))
            programs[BY_HAND[label]] = _program(label, replace(job, option="by_hand"))
            programs[BUSY[label]] = _program(label, busy)
        rounds = bench.interleave(programs)
    report.table(
        ["program", "notifications/s", "CPU per notification, ms", "share of the processor"],
        [
            (label, rounds.of(label, "rate"), rounds.of(label, "cpu_ms"), rounds.of(label, "share"))
            for label in programs
            if label not in BUSY.values()
        ],
    )
    report.table(
        ["acknowledged after", "median, ms", "p99, ms", "longest, ms", "refunds/s meanwhile"],
        [
            (label, *(rounds.of(label, figure) for figure in ("p50", "p99", "longest", "refunds_rate")))
            for label in BUSY.values()
        ],
    )
    report.targets(
        [
            figure
            for label in (CORE, FAST)
            for figure in (
                (f"{label}: notifications/s", rounds.of(label, "rate"), "≥", 1500),
                (f"{label}: rate ÷ by hand (CPU times)", rounds.ratio(BY_HAND[label], label, "cpu_ms"), "≥", 0.7),
                (f"{BUSY[label]}: p99, ms", rounds.of(BUSY[label], "p99"), "≤", 100),
            )
        ]
    )


def _program(label: str, job: Job) -> Program:
    env = {"LIANLIAN_SIGNING_BACKEND": "pycryptodome" if label == CORE else "openssl"}
    return Program("notifications", job, core=label == CORE, env=env)


def _sign(keys: Path, number: int) -> None:
    """Write ``number`` notifications, one on each line, of refunds with increasing ``dt_refund``."""
    sign = openssl.signer(keys / "gateway.pem")
    moment = datetime(2024, 1, 2, 3, 4, 5)  # noqa: DTZ001 - in China, where the gateway is
    with (keys / FILE).open("w", encoding="utf-8") as file:
        for index in range(number):
            at = moment + timedelta(seconds=index)
            changes = {
                "dt_refund": at.strftime("%Y%m%d%H%M%S"),
                "sta_refund": "2",
                "settle_date": at.strftime("%Y%m%d"),
            }
            fields = {**workload.answer_fields(f"R-{index}"), **changes}
            signed = {**fields, "sign": sign(workload.source(fields))}
            file.write(json.dumps(signed, ensure_ascii=False, separators=(",", ":")) + "\n")
