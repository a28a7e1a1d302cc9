"""``lianlian demo``: make refunds at a faulty gateway, and compare the outcomes with the gateway's books."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from time import perf_counter
from typing import Final

import anyio
import attrs
import click

from lianlian_async.cli.exit_codes import INTERRUPTED, ExitOutcome, exit_outcome_of, exit_outcome_of_refund
from lianlian_async.cli.output import Output, json_option, pass_output, table
from lianlian_async.errors import LianLianError
from lianlian_async.merchant import Merchant
from lianlian_async.models import RefundRequest
from lianlian_async.retry import RetryPolicy
from lianlian_async.sandbox import Fault, Repeated
from lianlian_async.session import RefundSession

from .audit import Audit
from .process import Books, RemoteGateway, gateway_process

_DELAY: Final = 0.5
"""Maximum delay of the sandbox in seconds: no request is carried out later."""
# This short grace is safe with the sandbox only. LianLian's gateway needs the default of 15 minutes.
_POLICY: Final = RetryPolicy(not_found_grace=3 * _DELAY)
_DEADLINE: Final = 8.0
_ORDER: Final = Decimal("100.00")
"""Amount of each order in yuan. Every 25th refund is larger, so that it is rejected."""


@click.command
@click.option("--refunds", type=click.IntRange(1, 100_000), default=300, help="Number of refunds.")
@click.option("--seed", type=int, default=0, help="Seed of the random faults.")
@click.option("--faults", type=click.FloatRange(0, 1), default=0.3, help="Probability of a fault for each request.")
@click.option("--concurrency", type=click.IntRange(1, 1000), default=50, help="Number of connections.")
@click.option("--bits", type=click.Choice(["1024", "2048", "4096"]), default="2048", help="Size of all keys.")
@json_option
@pass_output
def demo(output: Output, /, *, refunds: int, seed: int, faults: float, concurrency: int, bits: str) -> None:
    """Make refunds at a faulty gateway, and audit its books.

    The gateway is a fake in another process: it loses, delays and forges responses, and makes a refund twice if the
    client sends it twice. Exit code 0 if its books agree with every outcome, else 1.
    """
    options = {
        "bits": int(bits),
        "repeated": Repeated.AGAIN,
        "settle_after": 0.0,
        "default_order": _ORDER,
        "faults": dict.fromkeys(Fault, faults / len(Fault)),
        "seed": seed,
        "delay": _DELAY,
    }
    run = _Demo(_requests(refunds, Random(seed)))  # noqa: S311 - not for security
    with (
        gateway_process(options) as gateway,
        _audited(output, run, gateway),
        output.progress(refunds, lambda: "refunds") as advance,
    ):
        anyio.run(run.refund_all, Merchant.from_env(gateway.environment), concurrency, advance)


@contextmanager
def _audited(output: Output, run: _Demo, gateway: RemoteGateway) -> Iterator[None]:
    """Audit the run when the block ends or is interrupted; exit with code 1 if the books disagree."""
    try:
        yield
    finally:
        exit_code = _show(output, run, gateway.close_books())
    click.get_current_context().exit(exit_code)


def _show(output: Output, run: _Demo, books: Books) -> int:
    """Print the audit; return 0 if the books agree, else 1."""
    audit = Audit(run.requests, run.outcomes, books)
    counts, unknown, disagreements = audit.counts(), audit.unknown(), audit.disagreements()
    facts = {
        "made_twice": audit.made_twice(),
        "attempts": books.requests.get("apply", 0),
        "queries": books.requests.get("query", 0),
        "worst_stall_ms": round(run.worst_stall * 1000, 1),
        "seconds": round(run.seconds, 1),
    }
    verdict = "the books disagree" if disagreements else "the books agree"
    document = {
        "outcome": verdict,
        "refunds": len(run.requests),
        "outcomes": {count.word: count.refunds for count in counts},
        **facts,
        "unknown": unknown,
        "disagreements": disagreements,
    }
    shown = [table("refunds", ("outcome", "refunds", "made, by the gateway's books"), counts)]
    columns = ("no_refund", "made, by the gateway's books")
    shown += [table("unknown refunds", columns, unknown.items())] if unknown else []
    measures = ((name.replace("_", " "), fact) for name, fact in facts.items())
    output.show(document, *shown, table("run", ("measure", "value"), measures), ": ".join((verdict, *disagreements)))
    return 1 if disagreements else 0


def _requests(count: int, random: Random) -> list[RefundRequest]:
    now = datetime.now(UTC)
    return [
        RefundRequest(
            no_refund=f"DEMO-{number:06}",
            dt_refund=now,
            money_refund=_ORDER + 1 if number % 25 == 0 else Decimal(random.randint(1, 10_000)) / 100,
            no_order=f"ORDER-{number:06}",
        )
        for number in range(1, count + 1)
    ]


@attrs.define
class _Demo:
    """The refunds, and the library's outcome for each."""

    requests: Sequence[RefundRequest]
    outcomes: dict[str, ExitOutcome] = attrs.field(factory=dict)
    seconds: float = 0.0
    worst_stall: float = 0.0
    """The longest delay of the event loop in seconds."""

    async def refund_all(self, merchant: Merchant, concurrency: int, advance: Callable[[], object]) -> None:
        """Make all refunds concurrently."""
        async with RefundSession(merchant, retry=_POLICY, deadline=_DEADLINE, max_connections=concurrency) as session:
            watch, began = asyncio.create_task(self._watch()), perf_counter()
            try:
                await asyncio.gather(*(self._refund(session, request, advance) for request in self.requests))
            finally:
                self.seconds = perf_counter() - began
                watch.cancel()

    async def _refund(self, session: RefundSession, request: RefundRequest, advance: Callable[[], object]) -> None:
        self.outcomes[request.no_refund] = INTERRUPTED
        try:
            outcome = exit_outcome_of_refund(await session.apply_refund(request))
        except LianLianError as error:
            outcome = exit_outcome_of(error)
        self.outcomes[request.no_refund] = outcome
        advance()

    async def _watch(self) -> None:
        pause = 0.005
        while True:
            began = perf_counter()
            await asyncio.sleep(pause)
            self.worst_stall = max(self.worst_stall, perf_counter() - began - pause)
