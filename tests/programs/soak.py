"""Run refunds and notifications through faults for a long time: ``python -m tests.programs.soak --minutes 60``.

Another process serves the sandbox, which carries out every request, behind the proxy of ``tests.programs.proxy``. Some
of the requests meet a fault of the gateway, some connections are disturbed, some notifications meet faults. This
process runs batches on httpx and on aiohttp and a notification endpoint, which share an ``SqliteJournal``. In the end
every refund must have been made and handled once, and memory, threads and file descriptors must not have grown. They
are measured at rest, because a busy machine has more connections: after each tenth of the run the batches pause, and
idle connections are closed. Free memory that glibc keeps for reuse does not count. After the last tenth they are at
most 5 % above those after the second one.

Then a hostile server answers: compression bombs, endless headers, a million keys, deep JSON, slow bodies. Every outcome
must be unknown, at the deadline at the latest, and no answer may take more than 8 MiB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from decimal import Decimal
from pathlib import Path

import anyio
import attrs
import httpx

from lianlian_async import (
    BatchStopped,
    LianLianError,
    Merchant,
    NotificationEndpoint,
    Refund,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRequest,
    RefundSession,
    RetryBudget,
    RetryPolicy,
    refund_many,
)
from lianlian_async.cli.sandbox.server import environment
from lianlian_async.cli.sandbox.server import serving as serving_gateway
from lianlian_async.journal import SqliteJournal, State
from lianlian_async.middleware import RateLimit
from lianlian_async.sandbox import Fault, NotificationFault, Notifier, Repeated, SandboxGateway
from tests.programs.proxy import shop
from tests.support import ROOT, program
from tests.support.bad_network import FAIR, Cut, Disturbance, Form, Proxy, proxies, to_port
from tests.support.hostile import ATTACKS, attack, prepare
from tests.support.parties import refund_request, sandbox, serving

FAULTS = dict.fromkeys(Fault, 0.005)
DISTURBED = 0.05
"""Share of the exchanges that the proxy disturbs."""
LATE = 0.5
"""Seconds: the delay of late requests."""
POLICY = RetryPolicy(initial=0.05, maximum=0.4, not_found_grace=0.8, budget=RetryBudget(capacity=1e9))
DEADLINE = 0.6
ONCE = RetryPolicy(attempts=1)
STACKS = ("httpx", "aiohttp")

TENTHS = 10
REST = 8.0
"""Seconds of each pause, more than ``KEEPALIVE_SECONDS``; shorter in a short run."""
TOLERANCE = 0.05
SETTLES = 3.0
"""Minutes: in a shorter run, memory has not settled, and growth is only reported."""
MOST_MEMORY = 8.0
"""MiB that an answer may take."""


# ── the other process ────────────────────────────────────────────────────────────────────────────


def disturbance(dice: random.Random) -> Disturbance:
    """Return the disturbance of one exchange, mostly none."""
    if dice.random() >= DISTURBED:
        return FAIR
    if dice.random() < 0.2:
        return Disturbance(dice.choice(list(Form)))
    return Disturbance(cut=dice.choice(list(Cut)), side=dice.choice(["request", "answer"]), at=dice.randrange(1000))


async def serve(seed: int) -> None:
    """Serve the sandbox behind the proxy. The first line of stdin ends all faults, the next one the process."""
    dice = random.Random(seed)
    gateway = SandboxGateway(
        repeated=Repeated.AGAIN, default_order=Decimal("100000000.00"), settle_after=0.3, faults=FAULTS, delay=LATE
    )
    notifier = Notifier(gateway, every=2.0, faults=dict.fromkeys(NotificationFault, 0.02), seed=seed)
    with serving_gateway(notifier) as url:
        proxy = Proxy(to_port(httpx.URL(url).port), next_disturbance=lambda: disturbance(dice))
        async with proxies(proxy):
            print(json.dumps(environment(gateway, proxy.url)), flush=True)
            await anyio.to_thread.run_sync(sys.stdin.readline)
            gateway.faults, proxy.next_disturbance = {}, None
            await anyio.to_thread.run_sync(sys.stdin.readline)
    made = Counter(record.no_refund for record in gateway.refunds)
    twice = [number for number, times in made.items() if times > 1]
    print(json.dumps({"made": len(made), "made_twice": twice}), flush=True)


async def serve_attacks() -> None:
    """Serve hostile answers until the process is killed."""
    prepare()
    async with serving(attack) as server:
        print(json.dumps(server.port), flush=True)
        await anyio.sleep_forever()


@contextlib.contextmanager
def other_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], object]]:
    """Run this program with ``arguments``, and yield the process and the first line that it prints, read as JSON."""
    command = [*program("soak"), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


# ── what this process uses ───────────────────────────────────────────────────────────────────────


@attrs.frozen
class Usage:
    """The resources of this process."""

    memory: float
    """Private memory in MiB."""
    threads: float
    descriptors: float


def status(name: str) -> int:
    """Return an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> None:
    """Make VmHWM, the peak of the memory, equal to VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def usage() -> Usage:
    gc.collect()
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    memory = round(status("RssAnon") / 1024, 1)
    return Usage(memory, status("Threads"), len(list(Path("/proc/self/fd").iterdir())))


# ── the soak ─────────────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Soaked:
    """The result of the soak."""

    minutes: float
    refunds: int
    outcomes: dict[str, int]
    handled: int
    audit: dict[str, object]
    settled: Usage
    """After the second tenth."""
    end: Usage
    """After the last tenth."""
    problems: list[str]


@attrs.define
class Soak:
    """A running soak."""

    journal: SqliteJournal
    merchant: Merchant
    rate: float
    notify_url: str
    sessions: list[RefundSession] = attrs.field(factory=list)
    begun: int = 0
    handled: int = 0
    outcomes: Counter[str] = attrs.field(factory=Counter)
    is_over: bool = False
    rests: bool = False
    """Whether the batches and the sweeps pause."""

    async def on_refund(self, _refund: Refund) -> None:
        self.handled += 1

    def requests(self, pulled: dict[str, RefundRequest], again: list[RefundRequest]) -> Iterator[RefundRequest]:
        """Yield the refunds of ``again``, and new ones until the next rest; ``pulled`` have no outcome yet."""
        while again or not self.rests:
            if again:
                request = again.pop()
            else:
                self.begun += 1
                request = refund_request(self.begun, notify_url=self.notify_url)
            pulled[request.no_refund] = request
            yield request

    async def batches(self, stack: str) -> None:
        """Make refunds on one HTTP stack, with rests, until the time is over."""
        pulled: dict[str, RefundRequest] = {}
        again: list[RefundRequest] = []
        async with RefundSession(
            self.merchant,
            journal=self.journal,
            http_backend=stack,
            retry=POLICY,
            deadline=DEADLINE,
            limiter=RateLimit(self.rate / len(STACKS)),
        ) as session:
            self.sessions.append(session)
            while again or not self.is_over:
                if self.rests and not again:
                    await anyio.sleep(0.1)
                    continue
                with contextlib.suppress(BatchStopped):  # four forged answers in a row: run another batch
                    async with aclosing(refund_many(session, self.requests(pulled, again), concurrency=8)) as outcomes:
                        async for outcome in outcomes:
                            self.outcomes["made" if outcome.error is None else type(outcome.error).__name__] += 1
                            request = pulled.pop(outcome.request.no_refund)
                            if isinstance(outcome.error, RefundNotSent):
                                again.append(request)
                again += pulled.values()
                pulled.clear()

    async def close_idle(self) -> None:
        """Query on each session: its pool closes the connections that have been idle for long after an answer."""
        for session in self.sessions:
            for _ in range(10):  # some queries meet a fault
                with contextlib.suppress(LianLianError):
                    await session.query_refund(refund_request(1).query())
                    break

    async def sweep(self, endpoint: NotificationEndpoint, *, seconds: float) -> None:
        """Resolve open refunds repeatedly."""
        while not self.is_over:
            await anyio.sleep(seconds)
            if not self.rests:
                await endpoint.sweep()


async def soak(minutes: float, *, rate: float, seed: int, folder: Path) -> Soaked:
    """Run the soak with the journal in ``folder``; ``rate``: exchanges per second."""
    samples: list[Usage] = []
    with other_process("--serve", "--seed", str(seed)) as (process, variables):
        merchant = Merchant.from_env(variables)
        async with (
            SqliteJournal(folder / "journal.sqlite") as journal,
            RefundSession(merchant, journal=journal, retry=POLICY, deadline=DEADLINE) as session,
        ):
            running = Soak(journal, merchant, rate, "", [session])
            endpoint = NotificationEndpoint(merchant, running.on_refund, journal=journal, session=session)
            async with shop("aiohttp server", endpoint, keepalive=REST / 2) as port, endpoint:
                running.notify_url = f"http://127.0.0.1:{port}/"
                async with anyio.create_task_group() as tasks:
                    for stack in STACKS:
                        tasks.start_soon(running.batches, stack)
                    tasks.start_soon(lambda: running.sweep(endpoint, seconds=min(10.0, minutes * 6)))
                    for _ in range(TENTHS):
                        running.rests = False
                        await anyio.sleep(minutes * 60 / TENTHS)
                        running.rests = True
                        await anyio.sleep(min(REST, minutes * 6))
                        await running.close_idle()
                        samples.append(usage())
                    running.is_over = True
                print(file=process.stdin, flush=True)  # the faults end
                for _ in range(20):
                    await anyio.sleep(POLICY.not_found_grace)
                    await endpoint.sweep()
                    counts = await journal.counts()
                    if counts[State.DONE] == running.begun:
                        break
            print(file=process.stdin, flush=True)
            audit = json.loads(await anyio.to_thread.run_sync(process.stdout.readline))
    settled, end = samples[1], samples[-1]
    problems = []
    if (audit["made"], audit["made_twice"], running.handled) != (running.begun, [], running.begun):
        problems.append(f"{running.begun} refunds: made {audit}, handled {running.handled}")
    if counts[State.DONE] != running.begun:
        problems.append(f"states in the journal: {dict(counts)}")
    for name, before, after in zip(attrs.fields_dict(Usage), attrs.astuple(settled), attrs.astuple(end), strict=True):
        if minutes >= SETTLES and after > (1 + TOLERANCE) * before:
            problems.append(f"{name}: {before} settled, {after} in the end")
    return Soaked(minutes, running.begun, dict(running.outcomes), running.handled, audit, settled, end, problems)


# ── hostile answers ──────────────────────────────────────────────────────────────────────────────


@attrs.frozen
class Attacked:
    """The result of one hostile answer."""

    stack: str
    attack: str
    outcome: str
    memory: float
    """MiB above the memory before the first attack."""
    seconds: float


async def attacks(stack: str, port: int, deadline: float) -> list[Attacked]:
    """Apply for one refund under each attack."""
    results, before = [], 0
    gateway = sandbox()
    for number, name in [(0, "warm-up"), *enumerate(ATTACKS)]:
        merchant = gateway.merchant(f"http://127.0.0.1:{port}/{number}")
        async with RefundSession(merchant, http_backend=stack, retry=ONCE, deadline=deadline) as session:
            gc.collect()
            before = before or status("VmRSS")
            reset_peak()
            outcome = await session.outcome_of(refund_request(number))
            peak = round((status("VmHWM") - before) / 1024, 1)
        if name == "warm-up":
            before = 0
        else:
            results.append(Attacked(stack, name, type(outcome.error).__name__, peak, round(outcome.seconds, 2)))
    return results


def attack_all(deadline: float) -> list[Attacked]:
    """Run every attack on every HTTP stack."""
    results = []
    gc.freeze()  # the collections between the attacks need not visit the objects of the whole test run
    try:
        with other_process("--attack") as (_, port):
            for stack in STACKS:
                results += anyio.run(attacks, stack, port, deadline)
    finally:
        gc.unfreeze()
    return results


def problems(results: list[Attacked]) -> list[str]:
    """Return the violations, without those of time."""
    return [str(each) for each in results if each.outcome != RefundOutcomeUnknown.__name__ or each.memory > MOST_MEMORY]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=100.0, help="exchanges per second")
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds for each refund under attack")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attack", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve or options.attack:
        anyio.run(*((serve, options.seed) if options.serve else (serve_attacks,)))
        return 0
    attacked = attack_all(options.deadline)
    logging.disable(logging.WARNING)  # the faults log much
    print(json.dumps({"deadline": options.deadline, "attacks": [attrs.asdict(each) for each in attacked]}, indent=2))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soaked = anyio.run(lambda: soak(options.minutes, rate=options.rate, seed=options.seed, folder=Path(folder)))
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"seed": options.seed, "seconds": seconds, **attrs.asdict(soaked)}, indent=2))
    late = [str(each) for each in attacked if each.seconds > 1.1 * options.deadline]
    found = [*soaked.problems, *problems(attacked), *late]
    print(json.dumps({"problems": found}, indent=2))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
