"""Every fault × when it strikes × what a repeated number meets: never made twice, and the books agree."""

from __future__ import annotations

import itertools
from collections import Counter
from decimal import Decimal
from random import Random

import anyio
import httpx
import pytest

from lianlian_async import RefundNotSent, RefundOutcomeUnknown, RefundRejected, RefundSession, RetryPolicy
from lianlian_async.sandbox import Fault, Repeated, When
from tests.support.parties import boot_clock, refund_request, sandbox, wall_clock

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

DEFAULT = RetryPolicy()
DEDUPLICATES = RetryPolicy(not_found_grace=0.0)
"""What one may say to a gateway that is known to take a number only once."""

every_fault = pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name)
every_switch = pytest.mark.parametrize("repeated", list(Repeated), ids=lambda repeated: repeated.name)
CASES = list(itertools.product((2.0, 15.0), ("apply", "query", "both"), When))
"""Delay in seconds, calls with the fault, and whether it occurs before or after the request is carried out."""


@pytest.fixture
def cases(anyio_backend_name):
    """Half of the cases, in a chessboard pattern: asyncio runs one half, trio the other."""
    return [case for number, case in enumerate(CASES) if (number + number // 6) % 2 == (anyio_backend_name == "trio")]


def struck(fault, repeated, delay, call, when):
    """A gateway that is struck by ``fault`` once in each of the named calls; queries are provoked by a 500."""
    gateway = sandbox(repeated=repeated, delay=delay)
    if call != "query":
        gateway.script(fault, call="apply", when=when)
    else:
        gateway.script(Fault.HTTP_500, call="apply", when=when)
    if call != "apply":
        gateway.script(fault, call="query")
    return gateway


def assert_agrees(gateway, outcome):
    """Check that the outcome agrees with the gateway's books, which contain no refund twice."""
    number = outcome.request.no_refund
    times = gateway.times_made(number)
    assert times <= 1
    assert gateway.money_moved(number) == times * outcome.request.money_refund
    if outcome.refund is not None:
        assert times == 1
        assert outcome.refund.no_refund == number
    elif isinstance(outcome.error, RefundRejected | RefundNotSent):
        assert times == 0
    else:
        assert isinstance(outcome.error, RefundOutcomeUnknown)


async def resolved(session, outcome):
    """Return ``outcome``; if it is unknown, the outcome of a query at its ``ask_again_at``."""
    for _ in range(20):
        if not isinstance(outcome.error, RefundOutcomeUnknown):
            break
        await anyio.sleep(max(0.0, (outcome.error.ask_again_at - wall_clock()).total_seconds()))
        outcome = await session.outcome_of(outcome.request, earlier=outcome.error)
    return outcome


@every_switch
@every_fault
async def test_under_default_settings_nothing_is_made_twice(fault, repeated, cases):
    """With every fault a refund is made at most once, its outcome is true, and resolving it ends with a made refund."""
    for case in cases:
        gateway = struck(fault, repeated, *case)
        async with gateway.session(retry=DEFAULT, clock=boot_clock) as session:
            began = anyio.current_time()
            first = await session.outcome_of(refund_request())
            assert anyio.current_time() <= began + 30, case
            assert_agrees(gateway, first)
            last = await resolved(session, first)
            assert_agrees(gateway, last)
        assert last.refund is not None, case
        assert gateway.money_moved("R-1") == 10, case


@pytest.mark.parametrize("repeated", [Repeated.REJECT, Repeated.REPLAY], ids=lambda repeated: repeated.name)
@every_fault
async def test_on_a_gateway_that_deduplicates_everything_ends_made(fault, repeated, cases):
    """Without a grace, on a gateway that takes each number once, one call is enough: the refund is made, once."""
    for case in cases:
        gateway = struck(fault, repeated, *case)
        async with gateway.session(retry=DEDUPLICATES, clock=boot_clock) as session:
            outcome = await session.outcome_of(refund_request())
            assert_agrees(gateway, outcome)
            last = await resolved(session, outcome)
            assert_agrees(gateway, last)
            if case[0] < 10 or fault is not Fault.TOO_MANY:
                assert outcome.refund is not None, case
        await anyio.sleep(100)  # what is late arrives
        assert last.refund is not None, case
        assert gateway.times_made("R-1") == 1, case


class Road(httpx.AsyncBaseTransport):
    """A bad road to the sandbox: one connection in ten is refused."""

    def __init__(self, gateway, seed):
        self.inner = httpx.ASGITransport(app=gateway)
        self.random = Random(seed)

    async def handle_async_request(self, request):
        if self.random.random() < 0.1:
            raise httpx.ConnectError("refused")
        return await self.inner.handle_async_request(request)


STORM = dict.fromkeys(Fault, 0.8 / len(Fault))


@pytest.mark.parametrize(
    ("policy", "switches"),
    [(DEFAULT, list(Repeated)), (DEDUPLICATES, [Repeated.REJECT, Repeated.REPLAY])],
    ids=["default", "deduplicates"],
)
@pytest.mark.parametrize("seed", range(3))
async def test_in_a_storm_of_all_faults_the_books_agree(seed, policy, switches):
    """Refunds side by side, four requests in five struck by something: each ends as the books say, none twice."""
    for repeated in switches:
        gateway = sandbox(repeated=repeated, seed=seed, faults=STORM, delay=5.0)
        outcomes, first, last = [], Counter(), Counter()

        async def one(number, session, gateway=gateway, outcomes=outcomes):
            request = refund_request(f"{number}")
            if number % 5 == 0:
                gateway.add_order(request.no_order, Decimal("5.00"))  # too poor: 5003
            outcomes.append(await session.outcome_of(request))

        road = Road(gateway, seed)
        async with RefundSession(gateway.merchant(), transport=road, retry=policy, clock=boot_clock) as session:
            async with anyio.create_task_group() as tasks:
                for number in range(20):
                    tasks.start_soon(one, number, session)
            gateway.faults = {}
            for outcome in outcomes:
                assert_agrees(gateway, outcome)
                first[type(outcome.error).__name__] += 1
            for outcome in outcomes:
                end = await resolved(session, outcome)
                assert_agrees(gateway, end)
                last[type(end.error).__name__] += 1
        assert first.total() == last.total() == 20
        assert first["NoneType"] > 3
        assert last["RefundRejected"] == 4
        assert last["RefundOutcomeUnknown"] == 0
        assert all(
            gateway.times_made(outcome.request.no_refund) == (int(outcome.request.no_refund[2:]) % 5 != 0)
            for outcome in outcomes
            if not isinstance(outcome.error, RefundNotSent)
        )
