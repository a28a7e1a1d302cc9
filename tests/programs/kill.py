"""Kills a batch again and again: ``python -m tests.programs.kill --refunds 20000 --kills 20 --seed 1``.

A sandbox on a socket, every fault at 5 % of the requests; a process that works a batch off over an SQLite journal,
killed (SIGKILL) at random moments, and run again each time until nothing is left unknown. In the end every refund
has been made exactly once, or was rejected, and the journal and the gateway's books tell the same. Orders are worth
any number of refunds, so that a second one is never hidden; one of the gateways carries out every request it gets,
and what comes in late does so later than a process takes to start again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import anyio
import attrs

from lianlian_async import (
    BatchStopped,
    Merchant,
    RefundOutcomeUnknown,
    RefundRequest,
    RefundSession,
    RetryBudget,
    RetryPolicy,
    refund_many,
)
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.journal import SqliteJournal, State
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway
from tests.support import ROOT, program
from tests.support.parties import refund_request

EVERY_FAULT = dict.fromkeys(Fault, 0.05)

LATE = 5.0
"""Seconds: longer than a call and a new process take, so that who does not wait for the grace sends twice."""

IMPATIENT = RetryPolicy(initial=0.01, maximum=0.1, not_found_grace=5.5, budget=RetryBudget(capacity=1e9))


def requests(count: int) -> Iterator[RefundRequest]:
    """The batch: one in ten asks for more than its order is worth."""
    for number in range(1, count + 1):
        yield refund_request(number, money_refund=Decimal("10.00" if number % 10 else "10.01"))


def stormy_gateway(refunds: int, *, repeated: Repeated, seed: int) -> SandboxGateway:
    """The sandbox that the batch is sent to: orders are worth any number of refunds, but for one in ten."""
    gateway = SandboxGateway(
        default_order=Decimal("100000000.00"), repeated=repeated, faults=EVERY_FAULT, seed=seed, delay=LATE
    )
    for request in requests(refunds):
        if request.money_refund != 10:
            gateway.add_order(str(request.no_order), Decimal("10.00"))
    return gateway


# ── the process that is killed ───────────────────────────────────────────────────────────────────


async def work(journal_path: Path, count: int) -> None:
    """Run the batch once; print how many of its refunds stayed unknown."""
    unknown = 0
    async with (
        SqliteJournal(journal_path) as journal,
        RefundSession(
            Merchant.from_env(), journal=journal, retry=IMPATIENT, deadline=1.0, max_connections=100
        ) as session,
    ):
        try:
            async for outcome in refund_many(session, requests(count)):
                unknown += isinstance(outcome.error, RefundOutcomeUnknown)
        except BatchStopped:  # in this weather four answers in a row may be forged: run it again
            unknown = count
    print(unknown)


# ── who kills it ─────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Report:
    """What came of it."""

    refunds: int
    kills: int
    runs: int
    requests: dict[str, int]
    states: dict[str, int]
    """How the refunds stand in the journal."""
    contradictions: dict[str, str]
    """Refunds of which the journal and the gateway's books tell differently, or that were made twice."""
    seconds: float


def kill_and_run_again(folder: Path, *, refunds: int, kills: int, seed: int, repeated: Repeated) -> Report:
    """The whole programme, its journal in ``folder``."""
    began = time.monotonic()
    dice = random.Random(seed)
    gateway = stormy_gateway(refunds, repeated=repeated, seed=seed)
    # In this weather a refund takes about ten requests: after four for each the batch is far from through.
    moments = sorted(dice.sample(range(4 * refunds), kills))
    journal_path = folder / "journal.sqlite"
    command = [*program("kill"), "--work", str(journal_path), "--refunds", str(refunds)]
    runs, unknown = 0, refunds
    with serving(gateway) as base_url:
        variables = os.environ | environment(gateway, base_url)
        while moments or unknown:
            if runs > kills:  # one run came through the storm; the rest has to come to an end in fair weather
                gateway.faults = {}
            runs += 1
            with subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as process:
                if moments:
                    _wait_for(gateway, moments.pop(0), process)
                    time.sleep(dice.random() / 20)
                    process.kill()
                answer, _ = process.communicate()
            if not answer and process.returncode != -9:
                raise RuntimeError(f"the batch ended with {process.returncode}")
            unknown = int(answer or refunds)
    gateway.advance(LATE)  # nothing is still on its way
    states, contradictions = anyio.run(_audit, journal_path, gateway, refunds)
    return Report(
        refunds, kills, runs, dict(gateway.requests), states, contradictions, round(time.monotonic() - began, 1)
    )


def _wait_for(gateway: SandboxGateway, requests: int, process: subprocess.Popen[str]) -> None:
    """Until the gateway has had so many requests, or the batch was quicker than that."""
    while gateway.requests.total() <= requests and process.poll() is None:
        time.sleep(0.001)


async def _audit(journal_path: Path, gateway: SandboxGateway, refunds: int) -> tuple[dict[str, int], dict[str, str]]:
    """How the refunds stand, and where the journal contradicts the books."""
    states: Counter[str] = Counter()
    contradictions = {}
    numbers = {request.no_refund for request in requests(refunds)}
    async with SqliteJournal(journal_path) as journal:
        for number in numbers | {record.application.no_refund for record in gateway.refunds}:
            entry = await journal.find(number)
            state = "missing" if entry is None else entry.state
            states[state] += 1
            made = gateway.times_made(number)
            if made != {State.ACCEPTED: 1, State.DONE: 1, State.REJECTED: 0}.get(state):
                contradictions[number] = f"{state}, made {made} times"
    return dict(states), contradictions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refunds", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        anyio.run(work, options.work, options.refunds)
        return 0
    contradictions = 0
    for repeated in Repeated:
        with tempfile.TemporaryDirectory() as folder:
            report = kill_and_run_again(
                Path(folder), refunds=options.refunds, kills=options.kills, seed=options.seed, repeated=repeated
            )
        print(
            json.dumps({"repeated": repeated.value, "seed": options.seed, **attrs.asdict(report)}, indent=2), flush=True
        )
        contradictions += len(report.contradictions)
    return 1 if contradictions else 0


if __name__ == "__main__":
    sys.exit(main())
