"""``lianlian demo``: make refunds at a faulty gateway, and compare the outcomes with the gateway's ledger."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from random import Random
from time import perf_counter
from typing import Final, NamedTuple

import anyio
import click

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
_TIMES_MADE: Final = {MADE: (1,), UNKNOWN: (0, 1), INTERRUPTED: (0, 1)}
"""How many times the gateway may have made a refund, by outcome; for all other outcomes: never."""


def demo(output: Output, /, *, refunds: int, seed: int, faults: float, concurrency: int, bits: str) -> None:
    gateway = SandboxGateway(
        bits=int(bits),
        repeated=Repeated.AGAIN,
        settle_after=0.0,
        default_order=_ORDER,
        faults=dict.fromkeys(Fault, faults / len(Fault)),
        seed=seed,
        delay=_DELAY,
    )
    requests = _requests(refunds, Random(seed))  # noqa: S311 - not for security
    outcomes, stalls = dict[str, ExitOutcome](), [0.0]
    with (
        _audited(output, gateway, requests, outcomes, stalls),
        serving(gateway) as url,
        output.progress(refunds, lambda: "refunds") as advance,
    ):
        work = partial(_refund_all, stalls=stalls)
        anyio.run(work, gateway.merchant(url), requests, outcomes, concurrency, advance)


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


async def _refund_all(
    merchant: Merchant,
    requests: Sequence[RefundRequest],
    outcomes: dict[str, ExitOutcome],
    concurrency: int,
    advance: Callable[[], object],
    *,
    stalls: list[float],
) -> None:
    """Make all refunds, and store the outcome of each one that was started."""
    async with (
        aclosing(BackgroundTask(partial(_measure, stalls))),
        RefundSession(merchant, retry=_POLICY, deadline=_DEADLINE, max_connections=concurrency) as session,
    ):

        async def make(request: RefundRequest) -> None:
            outcomes[request.no_refund] = INTERRUPTED
            outcomes[request.no_refund] = exit_outcome(await session.outcome_of(request))
            advance()

        await run_workers(requests, make, workers=concurrency, intake=anyio.CancelScope())


async def _measure(stalls: list[float]) -> None:
    """Store the event loop's worst stall in seconds. The gateway's thread, which shares the GIL, adds to it."""
    while True:
        began = perf_counter()
        await anyio.sleep(_TICK)
        stalls[0] = max(stalls[0], perf_counter() - began - _TICK)


class Audit(NamedTuple):
    """The comparison of all outcomes with the gateway's ledger."""

    outcomes: list[tuple[str, int, int]]
    """By outcome: its word, the number of refunds, and how often the gateway made them in total."""
    made_twice: int
    """Refunds that were made more than once."""
    unknown: dict[str, int]
    """How many times each unknown refund was made."""
    disagreements: list[str]
    """Refunds whose outcome or amount contradicts the ledger."""


def audit(
    requests: Sequence[RefundRequest], outcomes: Mapping[str, ExitOutcome], ledger: Iterable[tuple[str, Decimal]]
) -> Audit:
    """Compare each refund's outcome with ``ledger``: ``no_refund`` and amount of every refund that was made."""
    refunds, times_made = Counter(dict.fromkeys((MADE, REJECTED, NOT_SENT, UNKNOWN), 0)), Counter[ExitOutcome]()
    unknown, disagreements = dict[str, int](), list[str]()
    amounts = defaultdict[str, list[Decimal]](list)
    for no_refund, yuan in ledger:
        amounts[no_refund].append(yuan)
    for request in requests:
        paid = amounts[request.no_refund]
        outcome = outcomes.get(request.no_refund)
        if outcome is not None:
            refunds[outcome] += 1
            times_made[outcome] += len(paid)
        if outcome == UNKNOWN:
            unknown[request.no_refund] = len(paid)
        allowed = (0,) if outcome is None else _TIMES_MADE.get(outcome, (0,))
        if len(paid) not in allowed or any(amount != request.money_refund for amount in paid):
            disagreements.append(request.no_refund)
    counts = [(outcome.word, number, times_made[outcome]) for outcome, number in refunds.items()]
    return Audit(counts, sum(len(paid) > 1 for paid in amounts.values()), unknown, disagreements)


@contextmanager
def _audited(
    output: Output,
    gateway: SandboxGateway,
    requests: Sequence[RefundRequest],
    outcomes: Mapping[str, ExitOutcome],
    stalls: Sequence[float],
) -> Iterator[None]:
    """Print the audit, however the block ends. Exit with 130 if interrupted, else 1 for disagreements, else 0."""
    began, exit_code = perf_counter(), 0
    try:
        yield
    except KeyboardInterrupt:
        exit_code = INTERRUPTED.exit_code
    finally:
        gateway.advance(86_400.0)  # carries out late requests
        found = audit(requests, outcomes, ((record.no_refund, record.money_refund) for record in gateway.refunds))
        facts = {
            "refunds": len(requests),
            "made_twice": found.made_twice,
            "attempts": gateway.requests["apply"],
            "queries": gateway.requests["query"],
            "seconds": round(perf_counter() - began, 1),
            "worst_stall_ms": round(1000 * stalls[0], 1),
        }
        verdict = f"the gateway's ledger {'contradicts' if found.disagreements else 'confirms'} the outcomes"
        document = {
            "outcome": verdict,
            **facts,
            "outcomes": {word: number for word, number, _ in found.outcomes},
            "unknown": found.unknown,
            "disagreements": found.disagreements,
        }
        made = "made, by the gateway's ledger"
        by_outcome = table("refunds", ("outcome", "refunds", made), found.outcomes)
        others = tables({f"unknown refunds: {made}": found.unknown, "run": facts})
        output.show(document, by_outcome, *others, verdict, *found.disagreements)
    if exit_code:
        output.note(INTERRUPTED.word)
    click.get_current_context().exit(exit_code or int(bool(found.disagreements)))
