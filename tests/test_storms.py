"""Any weather, any cancellation, any number of runs over one journal: no refund is made twice, none is lost."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from decimal import Decimal
from pathlib import Path

import anyio
import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lianlian_async import BatchStopped, RefundRejected, RetryPolicy, refund_many
from lianlian_async.journal import MemoryJournal, SqliteJournal, State
from lianlian_async.sandbox import Fault, Repeated
from tests.support.parties import boot_clock, refund_request, sandbox

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

LONGEST_DELAY = 600.0
"""Seconds: less than the default ``not_found_grace``, as LianLian's advice to ask after 15 minutes promises."""


@attrs.frozen(kw_only=True)
class Run:
    """One process: its work, how it is interrupted, and the pause after it."""

    resumes: bool
    outcomes: int
    """After so many the loop is left."""
    seconds: float
    """After so long it is cancelled."""
    concurrency: int
    rest: float


@attrs.frozen(kw_only=True)
class Storm:
    """The faults of the gateway, and the runs of the batch."""

    refunds: int
    faults: dict[Fault, float]
    delay: float
    seed: int
    runs: list[Run]


runs = st.builds(
    Run,
    resumes=st.booleans(),
    outcomes=st.integers(0, 8),
    seconds=st.floats(0.0, 60.0),
    concurrency=st.integers(1, 4),
    rest=st.sampled_from([0.0, 1.0, 100.0, 1000.0]),
)
storms = st.builds(
    Storm,
    refunds=st.integers(1, 6),
    faults=st.sets(st.sampled_from(Fault), max_size=8).flatmap(
        lambda faults: st.floats(0.1, 0.9).map(lambda share: {fault: share / len(faults) for fault in faults})
    ),
    delay=st.floats(0.0, LONGEST_DELAY),
    seed=st.integers(0, 10**6),
    runs=st.lists(runs, max_size=4),
)


def requests(count):
    """One in three asks for more than its order is worth; of the others' orders there is enough for many times."""
    for number in range(1, count + 1):
        yield refund_request(number, money_refund=Decimal("1.00" if number % 3 else "10.01"))


async def live(run, session, count):
    """Do the work of ``run`` until it ends or is interrupted."""
    told = 0
    with anyio.move_on_after(run.seconds):
        if run.resumes:
            await session.resume()
        with contextlib.suppress(BatchStopped):  # four answers in a row without a valid signature: run it again
            async for _ in refund_many(session, requests(count), concurrency=run.concurrency):
                told += 1
                if told >= run.outcomes:
                    break


async def weather(storm, journal, repeated, policy):
    """Every run of ``storm``, then fair weather and a last run: its outcomes, the gateway, the entries."""
    gateway = sandbox(repeated=repeated, faults=storm.faults, delay=storm.delay, seed=storm.seed)
    async with journal:
        for run in storm.runs:
            async with gateway.session(journal=journal, retry=policy, clock=boot_clock) as session:
                await live(run, session, storm.refunds)
            await anyio.sleep(run.rest)
        gateway.faults = {}
        await anyio.sleep(1000)
        async with gateway.session(journal=journal, retry=policy, clock=boot_clock) as session:
            await session.resume()
            outcomes = [outcome async for outcome in refund_many(session, requests(storm.refunds))]
            await anyio.sleep(10)
            await session.resume()
        entries = {request.no_refund: await journal.find(request.no_refund) for request in requests(storm.refunds)}
    return outcomes, gateway, entries


def check(storm, outcomes, gateway, entries):
    """Each refund once or rejected; outcomes, journal and books tell the same."""
    assert len(outcomes) == storm.refunds
    for outcome in outcomes:
        number = outcome.request.no_refund
        made, state = gateway.times_made(number), entries[number].state
        if int(number[2:]) % 3:
            assert (made, state, outcome.error) == (1, State.DONE, None)
        else:
            assert (made, state, type(outcome.error)) == (0, State.REJECTED, RefundRejected)
    assert {record.no_refund for record in gateway.refunds} <= set(entries)


@pytest.fixture(autouse=True)
def _quietly(caplog):
    caplog.set_level(logging.CRITICAL, "lianlian_async")


@given(storm=storms, repeated=st.sampled_from(Repeated))
@settings(max_examples=60)
async def test_by_default_nothing_is_made_twice_by_any_gateway(storm, repeated):
    """With the default settings even a gateway that carries out whatever it is sent makes each refund once."""
    check(storm, *await weather(storm, MemoryJournal(), repeated, RetryPolicy()))


@given(
    storm=storms,
    repeated=st.sampled_from([Repeated.REJECT, Repeated.REPLAY]),
    grace=st.floats(0.0, 60.0),
)
@settings(max_examples=60)
async def test_a_short_grace_makes_nothing_twice_where_the_gateway_deduplicates(storm, repeated, grace):
    """Who sends again early, to a gateway that knows each number, has each refund made once."""
    policy = RetryPolicy(not_found_grace=grace)
    check(storm, *await weather(storm, MemoryJournal(), repeated, policy))


@given(storm=storms, repeated=st.sampled_from(Repeated))
@settings(max_examples=10)
async def test_a_journal_in_a_file_is_as_good(storm, repeated):
    """The same with the SQLite journal, whose writes run in a thread."""
    with tempfile.TemporaryDirectory() as folder:
        journal = SqliteJournal(Path(folder) / "journal.sqlite")
        check(storm, *await weather(storm, journal, repeated, RetryPolicy()))
