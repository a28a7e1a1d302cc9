"""``lianlian demo``: make refunds at a faulty gateway, and compare the outcomes with the gateway's ledger."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from time import perf_counter
from typing import Final

import anyio
import attrs

from lianlian_async.background import BackgroundTask
from lianlian_async.cli.batch.results import exit_outcome
from lianlian_async.cli.exit_codes import INTERRUPTED, MADE, NOT_SENT, REJECTED, UNKNOWN, ExitOutcome
from lianlian_async.cli.output import Output, table, tables
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.retry import RetryPolicy
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway
from lianlian_async.session import RefundSession
from lianlian_async.worker_pool import run_workers

from .server import serving

_DELAY: Final = 0.5
"""Seconds of each delay in the sandbox."""
# The sandbox carries out no request later than _DELAY. LianLian's gateway needs the default grace of 15 minutes.
_POLICY: Final = RetryPolicy(not_found_grace=3 * _DELAY)
_DEADLINE: Final = 8.0
_TICK: Final = 0.01
"""Seconds between two measurements of the event loop's stall: how late it wakes a task."""
_ORDER: Final = Decimal("100.00")
"""Amount of each order in yuan. Every 25th refund is larger, so the gateway rejects it."""
_TIMES_MADE: Final[Mapping[ExitOutcome | None, tuple[int, ...]]] = {MADE: (1,), UNKNOWN: (0, 1), INTERRUPTED: (0, 1)}
"""How many times the gateway may have made a refund, by outcome; with any other outcome, never."""


def demo(output: Output, /, *, refunds: int, seed: int, faults: float, concurrency: int, bits: str) -> int:
    gateway = SandboxGateway(
        bits=int(bits),
        repeated=Repeated.AGAIN,
        settle_after=0.0,
        default_order=_ORDER,
        faults=dict.fromkeys(Fault, faults / len(Fault)),
        seed=seed,
        delay=_DELAY,
    )
    run = _Run(_requests(refunds, Random(seed)))  # noqa: S311 - not for security
    run.work(output, gateway, concurrency)
    return _show(output, gateway, run)


def _show(output: Output, gateway: SandboxGateway, run: "_Run") -> int:
    """Print the audit; return the exit code."""
    gateway.advance(86_400.0)  # carries out late requests
    made = Counter(record.no_refund for record in gateway.refunds)
    rows, disagreements = audit([request.no_refund for request in run.requests], run.outcomes, made)
    facts = {
        "refunds": len(run.requests),
        "made_twice": sum(times > 1 for times in made.values()),
        "attempts": gateway.requests["apply"],
        "queries": gateway.requests["query"],
        "seconds": round(perf_counter() - run.began, 1),
        "worst_stall_ms": round(1000 * run.stall, 1),
    }
    verdict = f"the gateway's ledger {'contradicts' if disagreements else 'confirms'} the outcomes"
    counts = {word: number for word, number, _ in rows}
    document = {"outcome": verdict, **facts, "outcomes": counts, "disagreements": disagreements}
    by_outcome = table("refunds", ("outcome", "refunds", "made, by the gateway's ledger"), rows)
    output.show(document, by_outcome, *tables({"run": facts}), verdict, *disagreements)
    if run.is_interrupted:
        output.note(INTERRUPTED.word)
    return INTERRUPTED.exit_code if run.is_interrupted else int(bool(disagreements))


def _requests(count: int, random: Random) -> list[RefundRequest]:
    return [
        RefundRequest(
            no_refund=f"DEMO-{number:06}",
            dt_refund=datetime.now(UTC),
            money_refund=_ORDER + 1 if number % 25 == 0 else Decimal(random.randint(1, 10_000)) / 100,
            no_order=f"ORDER-{number:06}",
        )
        for number in range(1, count + 1)
    ]


@attrs.define
class _Run:
    """The refunds of a demo."""

    requests: Sequence[RefundRequest]
    outcomes: dict[str, ExitOutcome] = attrs.field(factory=dict, init=False)
    """The outcome of each refund that was started, by ``no_refund``."""
    stall: float = attrs.field(default=0.0, init=False)
    """The event loop's worst stall in seconds. The gateway's thread, which shares the GIL, adds to it."""

    is_interrupted: bool = attrs.field(default=False, init=False)
    began: float = attrs.field(factory=perf_counter, init=False)

    def work(self, output: Output, gateway: SandboxGateway, concurrency: int) -> None:
        """Make all refunds."""
        try:
            with serving(gateway) as url, output.progress(len(self.requests), lambda: "refunds") as advance:
                anyio.run(self._make_all, gateway.merchant(url), concurrency, advance)
        except KeyboardInterrupt:
            self.is_interrupted = True

    async def _make_all(self, merchant: Merchant, concurrency: int, advance: Callable[[], object]) -> None:
        async with (
            aclosing(BackgroundTask(self._measure)),
            RefundSession(merchant, retry=_POLICY, deadline=_DEADLINE, max_connections=concurrency) as session,
        ):

            async def make(request: RefundRequest) -> None:
                self.outcomes[request.no_refund] = INTERRUPTED
                self.outcomes[request.no_refund] = exit_outcome(await session.outcome_of(request))
                advance()

            await run_workers(self.requests, make, workers=concurrency, intake=anyio.CancelScope())

    async def _measure(self) -> None:
        while True:
            began = perf_counter()
            await anyio.sleep(_TICK)
            self.stall = max(self.stall, perf_counter() - began - _TICK)


def audit(
    numbers: Iterable[str], outcomes: Mapping[str, ExitOutcome], made: Counter[str]
) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Compare the outcomes with ``made``: how many times the gateway made each refund.

    Return rows (word of an outcome, its refunds, how often the gateway made them), and the refunds of ``numbers`` whose
    outcome contradicts ``made``. A refund that was not started has no outcome.
    """
    refunds, times_made = Counter(dict.fromkeys((MADE, REJECTED, NOT_SENT, UNKNOWN), 0)), Counter[ExitOutcome]()
    for number, outcome in outcomes.items():
        refunds[outcome] += 1
        times_made[outcome] += made[number]
    rows = [(outcome.word, number, times_made[outcome]) for outcome, number in refunds.items()]
    return rows, [number for number in numbers if made[number] not in _TIMES_MADE.get(outcomes.get(number), (0,))]
