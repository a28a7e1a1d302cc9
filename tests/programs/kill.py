"""Kill a batch repeatedly: ``python -m tests.programs.kill --refunds 20000 --kills 20 --seed 1``.

The sandbox on a socket injects every fault into 5 % of the requests. A process runs a batch with an SQLite journal; it
is killed (SIGKILL) at random moments and run again until no refund is unknown. In the end every refund must have been
made exactly once or rejected, and the journal must agree with the gateway's books. Orders are large enough for any
number of refunds, so a second refund is never hidden. One of the gateways carries out every request, and late
requests arrive after a new process has started.
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
"""Seconds: longer than a call and the start of a process, so a client that ignores the grace sends twice."""

IMPATIENT = RetryPolicy(initial=0.01, maximum=0.1, not_found_grace=5.5, budget=RetryBudget(capacity=1e9))


def requests(count: int) -> Iterator[RefundRequest]:
    """Yield the batch; every tenth refund is greater than its order."""
    for number in range(1, count + 1):
        yield refund_request(number, money_refund=Decimal("10.00" if number % 10 else "10.01"))


def stormy_gateway(refunds: int, *, repeated: Repeated, seed: int) -> SandboxGateway:
    """Return the sandbox for the batch: every tenth order has 10.00 yuan, the others have the default amount."""
    gateway = SandboxGateway(
        default_order=Decimal("100000000.00"), repeated=repeated, faults=EVERY_FAULT, seed=seed, delay=LATE
    )
    for request in requests(refunds):
        if request.money_refund != 10:
            gateway.add_order(str(request.no_order), Decimal("10.00"))
    return gateway


# ── the process that is killed ───────────────────────────────────────────────────────────────────


async def work(journal_path: Path, count: int) -> None:
    """Run the batch once; print how many of its refunds are unknown."""
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
        except BatchStopped:  # four forged answers in a row stop the batch: run it again
            unknown = count
    print(unknown)


# ── the process that kills it ────────────────────────────────────────────────────────────────────


@attrs.frozen
class Report:
    """The result of all runs."""

    refunds: int
    kills: int
    runs: int
    requests: dict[str, int]
    states: dict[str, int]
    """The number of refunds in each state of the journal."""
    contradictions: dict[str, str]
    """Refunds for which the journal disagrees with the gateway's books, or that were made twice."""
    seconds: float


def kill_and_run_again(folder: Path, *, refunds: int, kills: int, seed: int, repeated: Repeated) -> Report:
    """Run everything with the journal in ``folder``."""
    began = time.monotonic()
    dice = random.Random(seed)
    gateway = stormy_gateway(refunds, repeated=repeated, seed=seed)
    # With these faults a refund takes about ten requests, so all kills happen in the first half of the batch.
    moments = sorted(dice.sample(range(4 * refunds), kills))
    journal_path = folder / "journal.sqlite"
    command = [*program("kill"), "--work", str(journal_path), "--refunds", str(refunds)]
    runs, unknown = 0, refunds
    with serving(gateway) as base_url:
        variables = os.environ | environment(gateway, base_url)
        while moments or unknown:
            if runs > kills:  # one run had faults but no kill; without faults, and after the grace, the rest can finish
                gateway.faults = {}
                time.sleep(IMPATIENT.not_found_grace)
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
    gateway.advance(LATE)  # delayed requests arrive
    states, contradictions = anyio.run(_audit, journal_path, gateway, refunds)
    return Report(
        refunds, kills, runs, dict(gateway.requests), states, contradictions, round(time.monotonic() - began, 1)
    )


def _wait_for(gateway: SandboxGateway, requests: int, process: subprocess.Popen[str]) -> None:
    """Wait until the gateway has received ``requests`` requests, or the process has ended."""
    while gateway.requests.total() <= requests and process.poll() is None:
        time.sleep(0.001)


async def _audit(journal_path: Path, gateway: SandboxGateway, refunds: int) -> tuple[dict[str, int], dict[str, str]]:
    """Return the number of refunds in each state, and the refunds for which the journal contradicts the books."""
    states: Counter[str] = Counter()
    contradictions = {}
    numbers = {request.no_refund for request in requests(refunds)}
    async with SqliteJournal(journal_path) as journal:
        for number in numbers | {record.no_refund for record in gateway.refunds}:
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
