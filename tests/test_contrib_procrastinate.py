"""Refunds as procrastinate jobs on a real PostgreSQL (asyncio only, as procrastinate and psycopg are)."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import textwrap
import traceback
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from types import SimpleNamespace

import anyio
import attrs
import psycopg
import pytest
from django.db.utils import ConnectionHandler
from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import ConnectorException
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from lianlian_async import (
    BatchStopped,
    ConfigurationError,
    Endpoints,
    LianLianError,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRequest,
    RefundSession,
    RetryPolicy,
)
from lianlian_async.cli.sandbox.server import environment, serving
from lianlian_async.clock import system_clock
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.contrib.slices import SliceFetcher, follow_up
from lianlian_async.journal import Ending, State
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.recording import decision
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway, When
from lianlian_async.transport import asgi_transport
from tests.support import ROOT, postgres
from tests.support.readme import RECIPES, set_up_django

pytestmark = pytest.mark.anyio

SQLALCHEMY, DJANGO = RECIPES["queue"].split("\n\n")


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def dsn(database):
    return database


@pytest.fixture
async def journal(dsn):
    async with PostgresJournal(dsn) as journal:
        yield journal


def requests(count):
    for number in range(count):
        yield RefundRequest(
            no_refund=f"R-{number}",
            dt_refund="20261122101500",
            money_refund="1.00",
            no_order="O-1",
            notify_url="https://shop.example/lianlian/refund",
        )


async def jobs_of(queue):
    jobs = await queue.app.job_manager.list_jobs_async(task="lianlian:refunds")
    return sorted(jobs, key=lambda job: job.id)


class Gate:
    """A middleware that blocks all refunds until it is opened."""

    def __init__(self):
        self.begun = 0
        self.opened = asyncio.Event()

    async def __call__(self, exchange, call_next):
        self.begun += 1
        await self.opened.wait()
        return await call_next(exchange)


async def until(holds):
    """Let other tasks run until they wait."""
    with anyio.fail_after(60):
        while not holds():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


async def until_counted(queue, **numbers):
    """Wait until the queue's counts have these values."""
    with anyio.fail_after(60):
        while not numbers.items() <= dict(await queue.counts()).items():  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


def deaf(gateway):
    """The merchant, with a query address without a server."""
    merchant = gateway.merchant()
    return attrs.evolve(merchant, endpoints=attrs.evolve(merchant.endpoints, query="https://sandbox.invalid/lost"))


async def hurry(queue):
    """Make all scheduled jobs due now."""
    await queue.app.connector.execute_query_async("UPDATE procrastinate_jobs SET scheduled_at = NULL")


async def test_a_fleet_makes_every_refund_once(dsn, journal):
    """Two workers empty one queue: each refund is made once and recorded in the shared journal."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), settle_after=3600)
    async with RefundQueue(dsn) as queue, RefundQueue(dsn) as other:
        assert await queue.enqueue(requests(30)) == 30
        async with gateway.session(journal=journal) as session, gateway.session(journal=journal) as another:
            await asyncio.gather(queue.work(session, wait=False), other.work(another, wait=False))
        assert await jobs_of(queue) == []
    assert [gateway.times_made(f"R-{number}") for number in range(30)] == [1] * 30
    assert (await journal.counts())[State.ACCEPTED] == 30


async def test_a_fleet_may_have_a_stricter_isolation_level(dsn, journal):
    """Workers whose database has another default isolation level share jobs without serialization errors."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute(
            f"ALTER DATABASE {connection.info.dbname} SET default_transaction_isolation = serializable"
        )
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn, slice_size=1) as queue, RefundQueue(dsn) as other, RefundQueue(dsn) as third:
        await queue.enqueue(requests(60))
        async with gateway.session(journal=journal) as session:
            await asyncio.gather(*(each.work(session, wait=False) for each in (queue, other, third)))
        assert await jobs_of(queue) == []


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
async def test_a_queue_works_through_pgbouncer(dsn):
    """In transaction mode, each transaction may run on another of two connections: nothing is prepared there."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    with postgres.pooler(dsn) as pooled:
        async with PostgresJournal(pooled) as journal, RefundQueue(pooled, slice_size=2) as queue:
            await queue.enqueue(requests(60))
            async with gateway.session(journal=journal) as session:
                await asyncio.gather(queue.work(session, wait=False), *(queue.activity() for _ in range(50)))
            assert await jobs_of(queue) == []
            assert (await journal.counts())[State.ACCEPTED] == 60


async def test_workers_open_a_new_database_together(dsn):
    """One of them creates the tables, the others wait for it."""

    async def open_and_count():
        async with RefundQueue(dsn) as queue:
            return (await queue.counts())["waiting"]

    assert await asyncio.gather(*[open_and_count() for _ in range(4)]) == [0] * 4


async def test_enqueue_is_idempotent(dsn, journal):
    """Slices that repeat or overlap make each refund once: the journal has the refunds."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), repeated=Repeated.AGAIN)
    async with RefundQueue(dsn, slice_size=7) as queue, gateway.session(journal=journal) as session:
        assert await queue.enqueue(requests(10)) == 10
        assert await queue.enqueue(requests(15)) == 15
        assert (await queue.counts())["waiting"] == 25
        await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert [gateway.times_made(f"R-{number}") for number in range(15)] == [1] * 15


async def test_a_job_contains_a_slice(dsn):
    """Refunds of an async iterable are split into slices, and counted one by one."""

    async def stream():
        for request in requests(25):
            yield request

    async with RefundQueue(dsn, slice_size=2) as queue:
        assert await queue.enqueue(stream()) == 25
        slices = [[row["no_refund"] for row in job.task_kwargs["refunds"]] for job in await jobs_of(queue)]
        assert (await queue.counts())["waiting"] == 25
    assert slices == [[f"R-{number}" for number in range(25)[start : start + 2]] for start in range(0, 25, 2)]


async def test_a_worker_fetches_no_more_slices_than_it_needs(dsn, journal):
    """While its refunds wait for the gateway, other workers find the other slices in the queue."""
    gateway, gate = SandboxGateway(default_order=Decimal("1000.00")), Gate()
    async with (
        RefundQueue(dsn, slice_size=2) as queue,
        gateway.session(journal=journal, middleware=[gate]) as session,
        asyncio.TaskGroup() as group,
    ):
        await queue.enqueue(requests(20))
        work = group.create_task(queue.work(session, concurrency=3, wait=False))
        await until(lambda: gate.begun == 3)
        async with RefundQueue(dsn) as other:
            await until_counted(other, at_work=6, waiting=14)
        gate.opened.set()
        await work
        assert not await jobs_of(queue)
    assert len(gateway.refunds) == 20


async def test_the_finished_refunds_of_a_running_slice_are_not_at_work(dsn, journal):
    """A worker that counts its queue does not count them as refunds to do."""
    gateway, gate = SandboxGateway(default_order=Decimal("1000.00")), Gate()

    async def hold(exchange, call_next):
        return await (call_next if exchange.asked["no_refund"] == "R-0" else partial(gate, call_next=call_next))(
            exchange
        )

    async with (
        RefundQueue(dsn) as queue,
        gateway.session(journal=journal, middleware=[hold]) as session,
        asyncio.TaskGroup() as group,
    ):
        await queue.enqueue(requests(3))
        work = group.create_task(queue.work(session, concurrency=1, wait=False))
        await until(lambda: gate.begun)
        assert (await queue.counts())["at_work"] == 2
        gate.opened.set()
        await work
        assert (await queue.counts())["at_work"] == 0


async def test_at_most_four_refunds_run_until_an_answer_has_verified(dsn, journal):
    """The limit applies to all slices of a worker together, until it trusts the gateway's key."""
    gateway, gate = SandboxGateway(default_order=Decimal("1000.00")), Gate()
    async with (
        RefundQueue(dsn, slice_size=1) as queue,
        gateway.session(journal=journal, middleware=[gate]) as session,
        asyncio.TaskGroup() as group,
    ):
        await queue.enqueue(requests(10))
        work = group.create_task(queue.work(session, concurrency=10, wait=False))
        await until_counted(queue, at_work=10)
        await until(lambda: gate.begun == 4)
        assert gate.begun == 4
        gate.opened.set()
        await work
    assert len(gateway.refunds) == 10


async def test_an_unknown_refund_does_not_delay_its_slice(dsn, journal):
    """The others are made and not repeated; the unknown one gets its own job, which runs before new refunds."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE, no_refund="R-3")
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, deadline=2.0) as session:
        await queue.enqueue(requests(20))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
        assert await queue.counts() == {"waiting": 0, "later": 1, "at_work": 0, "failed": 0, "workers": 0}
    assert [row["no_refund"] for row in job.task_kwargs["refunds"]] == ["R-3"]
    assert (job.priority, job.task_kwargs["tries"]) == (1, 1)
    assert len(gateway.refunds) == gateway.requests["apply"] - 1 == 19


DIES_BEFORE_ITS_SLICE_ENDS = """
import asyncio, os, signal
from procrastinate.manager import JobManager
from lianlian_async import Merchant, RefundSession
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal.postgres import PostgresJournal

finish_job = JobManager.finish_job

async def die(self, job, **how):
    if job.task_name == "lianlian:refunds":
        os.kill(os.getpid(), signal.SIGKILL)
    await finish_job(self, job, **how)

async def work(dsn):
    JobManager.finish_job = die
    async with (
        PostgresJournal(dsn) as journal,
        RefundSession(Merchant.from_env(), journal=journal, deadline=4.0) as session,
        RefundQueue(dsn, rescue_after=1.0) as queue,
    ):
        await queue.work(session, wait=False)

asyncio.run(work(os.environ["TESTS_DSN"]))
"""


async def test_a_process_that_dies_between_the_follow_up_job_and_the_end_of_its_slice_loses_nothing(dsn, journal):
    """Both jobs exist then: the next worker runs them, and every refund is made once."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), settle_after=3600, repeated=Repeated.AGAIN)
    gateway.script(Fault.RESET, call="apply", when=When.AFTER, no_refund="R-3")
    with serving(gateway) as url:
        async with RefundQueue(dsn, rescue_after=1.0) as queue:
            await queue.enqueue(requests(6))
            env = os.environ | environment(gateway, url) | {"LIANLIAN_QUERY_URL": "http://127.0.0.1:9/nobody"}
            env |= {postgres.DSN: dsn}
            command = [sys.executable, "-c", DIES_BEFORE_ITS_SLICE_ENDS]
            died = await anyio.run_process(command, env=env, cwd=ROOT, check=False, stderr=None)
            assert died.returncode == -signal.SIGKILL
            whole, *unknown = await jobs_of(queue)
            assert (whole.status, len(whole.task_kwargs["refunds"])) == ("doing", 6)
            assert "R-3" in {row["no_refund"] for job in unknown for row in job.task_kwargs["refunds"]}
            await hurry(queue)
            await forget_workers(queue)
            async with RefundSession(gateway.merchant(url), journal=journal) as session:
                await queue.work(session, wait=False)
            assert not await jobs_of(queue)
    assert [gateway.times_made(f"R-{number}") for number in range(6)] == [1] * 6
    assert (await journal.counts())[State.ACCEPTED] == 6


async def test_queued_refunds_are_durable(dsn):
    """A crash of the database loses no refund that was queued, even if ``synchronous_commit`` is off there."""
    async with RefundQueue(dsn) as queue, await psycopg.AsyncConnection.connect(dsn) as connection:
        await connection.execute("SET synchronous_commit = off")
        async with connection.transaction():
            await queue.enqueue(requests(1), connection=connection)
            assert await (await connection.execute("SHOW synchronous_commit")).fetchone() == ("on",)


@pytest.mark.parametrize("commits", [True, False])
async def test_enqueue_takes_part_in_the_callers_transaction(dsn, commits):
    """The order is updated and its refund is queued, or neither, with any factories and time zone of the connection."""
    connection = await psycopg.AsyncConnection.connect(
        dsn, row_factory=dict_row, cursor_factory=psycopg.AsyncRawCursor, options="-c timezone=Asia/Shanghai"
    )
    async with RefundQueue(dsn, slice_size=2) as queue, connection:
        await connection.execute("CREATE TABLE orders (state text)")
        await connection.commit()
        assert await queue.enqueue(requests(3), connection=connection) == 3  # its first statement
        await connection.execute("INSERT INTO orders VALUES ('refunding')")
        assert (await queue.counts())["waiting"] == 0
        await (connection.commit() if commits else connection.rollback())
        marked = await (await connection.execute("SELECT * FROM orders")).fetchall()
        assert (len(marked), (await queue.counts())["waiting"]) == ((1, 3) if commits else (0, 0))


async def test_an_error_in_enqueue_rolls_back_to_its_savepoint(dsn):
    """No refund is queued, and the caller's transaction continues."""

    def broken():
        yield from requests(45)
        raise ZeroDivisionError

    async with (
        RefundQueue(dsn, slice_size=2) as queue,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection,
    ):
        async with connection.transaction():
            await connection.execute("CREATE TABLE orders (state text)")
            with pytest.raises(ZeroDivisionError):
                await queue.enqueue(broken(), connection=connection)
        assert (await connection.execute("SELECT * FROM orders")).rowcount == 0
        assert await jobs_of(queue) == []


async def test_an_unsuitable_connection_is_refused(dsn, postgres_dsn):
    """It leads to another database or schema, has no open transaction, or is not asynchronous."""
    (request,) = requests(1)
    async with (
        RefundQueue(dsn) as queue,
        await psycopg.AsyncConnection.connect(postgres_dsn) as elsewhere,
        await psycopg.AsyncConnection.connect(dsn, options="-c search_path=other") as other_schema,
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as idle,
    ):
        for connection in (elsewhere, other_schema):
            with pytest.raises(ConfigurationError, match="leads to another database or schema than the queue"):
                await queue.enqueue([request], connection=connection)
        with pytest.raises(ConfigurationError, match="has no open transaction"):
            await queue.enqueue([request], connection=idle)
        with psycopg.connect(dsn) as synchronous, pytest.raises(ConfigurationError, match="must be of type Async"):
            await queue.enqueue([request], connection=synchronous)
        assert await jobs_of(queue) == []


@pytest.mark.parametrize("commits", [True, False])
async def test_the_sqlalchemy_recipe_takes_part_in_the_session(dsn, commits):
    """The transaction of the AsyncSession decides about the order and its refund."""
    engine = create_async_engine("postgresql+psycopg://", connect_args=conninfo_to_dict(dsn))
    recipe = f"async def enqueue(session, queue, request):\n{textwrap.indent(SQLALCHEMY, '    ')}"
    exec(recipe, names := {})
    async with RefundQueue(dsn) as queue, AsyncSession(engine) as session:
        await session.execute(text("CREATE TABLE orders (state text)"))
        await session.commit()
        await session.execute(text("INSERT INTO orders VALUES ('refunding')"))
        await names["enqueue"](session, queue, *requests(1))
        assert (await queue.counts())["waiting"] == 0
        await (session.commit() if commits else session.rollback())
        marked = await session.scalar(text("SELECT count(*) FROM orders"))
        assert (marked, (await queue.counts())["waiting"]) == ((1, 1) if commits else (0, 0))
    await engine.dispose()


@pytest.mark.parametrize("commits", [True, False])
async def test_the_django_recipe_takes_part_in_the_transaction(dsn, commits):
    """The cursor of Django's synchronous connection executes the statement; its transaction decides."""
    set_up_django()
    options = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": options.pop("dbname"), "OPTIONS": options}
    databases = ConnectionHandler({"default": database})

    def enqueue(queue, connection, request):
        connection.set_autocommit(False)
        exec(DJANGO, {"connection": connection, "queue": queue, "request": request})
        (connection.commit if commits else connection.rollback)()
        connection.close()

    async with RefundQueue(dsn) as queue:
        await asyncio.to_thread(lambda: enqueue(queue, databases["default"], *requests(1)))
        assert (await queue.counts())["waiting"] == (1 if commits else 0)


async def test_an_unknown_refund_is_scheduled_for_its_ask_again_at(dsn, journal):
    """It stays unresolved until then."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    before = datetime.now(UTC)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, deadline=2.0) as session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert job.status == "todo"
    assert before + timedelta(seconds=900) <= job.scheduled_at <= datetime.now(UTC) + timedelta(seconds=900)
    assert (await journal.find("R-0")).state is State.UNRESOLVED


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta(hours=-2)])
async def test_jobs_are_scheduled_by_the_databases_clock(dsn, journal, step):
    """A worker with a wrong wall clock schedules a job like the others: it is due after the same seconds."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)

    def clock():
        now = system_clock()
        return attrs.evolve(now, wall=now.wall + step)

    before = datetime.now(UTC)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, deadline=2.0, clock=clock) as session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert before + timedelta(seconds=899) <= job.scheduled_at <= datetime.now(UTC) + timedelta(seconds=901)


@pytest.mark.parametrize("begun", ["attempts = 1", """args = args || '{"tries": 1}'"""])
async def test_the_refunds_of_a_repeated_job_are_queried_first(dsn, journal, begun):
    """Even if the journal has lost them: otherwise this gateway would make them again."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), repeated=Repeated.AGAIN)
    async with RefundQueue(dsn, rescue_after=5.0) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(1))
        async with gateway.session() as dead:
            await dead.apply_refund(*requests(1))
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as administrator:
            await administrator.execute(f"UPDATE procrastinate_jobs SET {begun}")
        await queue.work(session, wait=False)
    assert (gateway.requests["query"], gateway.times_made("R-0")) == (1, 1)


async def test_the_rest_of_a_rescued_slice_is_queried_first_after_another_stop(dsn, journal):
    """A worker made the refunds and died, and the journal lost them; the next worker stops early, too."""
    gateway, gate = SandboxGateway(default_order=Decimal("1000.00"), repeated=Repeated.AGAIN), Gate()
    async with RefundQueue(dsn) as queue:
        async with gateway.session() as dead:
            for request in requests(10):
                await dead.apply_refund(request)
        await leave_jobs(queue, 10)
        async with gateway.session(journal=journal, middleware=[gate]) as session:
            async with anyio.create_task_group() as group:
                group.start_soon(partial(queue.work, session, concurrency=3))
                await until(lambda: gate.begun == 3)
                group.cancel_scope.cancel()
                gate.opened.set()
            assert (await queue.counts())["waiting"] == 7
            await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert [gateway.times_made(f"R-{number}") for number in range(10)] == [1] * 10


async def test_an_unknown_refund_is_found_by_the_next_worker(dsn, journal):
    """A worker that fetches the job again queries first, and finds the refund of the first attempt."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), settle_after=3600)
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    policy = RetryPolicy(initial=0.01, maximum=0.01, not_found_grace=0)
    async with RefundQueue(dsn) as queue:
        await queue.enqueue(requests(1))
        unanswered = RefundSession(
            deaf(gateway), transport=asgi_transport(gateway), journal=journal, deadline=2.0, retry=policy
        )
        async with unanswered:
            await queue.work(unanswered, wait=False)
        assert (await journal.find("R-0")).state is State.UNRESOLVED
        await anyio.sleep(0.1)  # until its ask_again_at
        async with gateway.session(journal=journal) as session:
            await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert (await journal.find("R-0")).state is State.ACCEPTED
    assert (gateway.requests["apply"], gateway.times_made("R-0")) == (1, 1)


async def test_a_refund_that_was_not_sent_is_sent_later(dsn, journal, merchant):
    """While no server listens at the gateway's address, the job waits for another try."""
    nowhere = Endpoints("http://127.0.0.1:9/apply", "http://127.0.0.1:9/query")
    session = RefundSession(attrs.evolve(merchant, endpoints=nowhere), journal=journal, retry=RetryPolicy(attempts=1))
    before = datetime.now(UTC)
    async with RefundQueue(dsn) as queue, session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert (job.status, job.task_kwargs["tries"]) == ("todo", 1)
    assert before + timedelta(seconds=1) <= job.scheduled_at <= datetime.now(UTC) + timedelta(seconds=1)


async def test_an_outcome_that_its_callback_cannot_store_is_not_lost(dsn, journal, merchant):
    """``on_outcome`` raises: the worker ends with that error, and the queue still has every refund."""
    nowhere = Endpoints("http://127.0.0.1:9/apply", "http://127.0.0.1:9/query")
    session = RefundSession(attrs.evolve(merchant, endpoints=nowhere), journal=journal, retry=RetryPolicy(attempts=1))

    def store(outcome):
        raise OSError("the service's database is down")

    async with RefundQueue(dsn) as queue, session:
        await queue.enqueue(requests(3))
        with pytest.raises(OSError, match="database is down"):
            await queue.work(session, concurrency=1, wait=False, on_outcome=store)
        queued = [row["no_refund"] for job in await jobs_of(queue) for row in job.task_kwargs["refunds"]]
    assert sorted(queued) == ["R-0", "R-1", "R-2"]


async def test_an_async_on_outcome_is_refused(dsn, journal, merchant):
    """Nobody would await it, and the outcomes would be lost."""

    async def store(outcome):
        raise AssertionError(outcome)

    async with RefundQueue(dsn) as queue, RefundSession(merchant, journal=journal) as session:
        with pytest.raises(ConfigurationError, match="on_outcome: must be a function, and not async"):
            await queue.work(session, wait=False, on_outcome=store)


async def test_a_refund_that_runs_while_its_worker_fails_is_queued_again(dsn, journal):
    """``on_outcome`` raises for one refund while another one is being sent: that one may have been made."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gate = Gate()

    async def block_second(exchange, call_next):
        if exchange.asked["no_refund"] == "R-1":
            return await gate(exchange, call_next)
        await until(lambda: gate.begun)
        return await call_next(exchange)

    def store(outcome):
        raise OSError("the service's database is down")

    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, middleware=[block_second]) as session:
        await queue.enqueue(requests(2))
        with pytest.raises(OSError, match="database is down"):
            await queue.work(session, concurrency=2, wait=False, on_outcome=store)
        [job] = await jobs_of(queue)
        assert [row["no_refund"] for row in job.task_kwargs["refunds"]] == ["R-1"]
        assert job.task_kwargs["cause"] == "interrupted"
    assert gateway.times_made("R-0") == 1


async def test_a_rejection_by_configuration_stops_the_worker(dsn, journal):
    """An unknown merchant number raises ``BatchStopped``; refunds that were not sent go back into the queue."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE, times=1000)
    async with RefundQueue(dsn, slice_size=30) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(100))
        with pytest.raises(BatchStopped, match="3001"):
            await queue.work(session, concurrency=2)
        begun = gateway.requests["apply"]
        assert await queue.counts() == {
            "waiting": 100 - begun,
            "later": begun,
            "at_work": 0,
            "failed": 0,
            "workers": 0,
        }
        assert begun <= 4
        assert {job.task_kwargs.get("tries") for job in await jobs_of(queue) if job.scheduled_at is None} <= {None}


async def test_waiting_slices_end_when_the_worker_stops(dsn, journal, stranger_keys):
    """No answer verifies, so 4 of 20 slices may run: each of the others gives its place to the next one."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    wrong = gateway.merchant(gateway_public_keys=stranger_keys.public)
    session = RefundSession(wrong, transport=asgi_transport(gateway), journal=journal, deadline=1.0)
    async with RefundQueue(dsn, slice_size=1) as queue, session:
        await queue.enqueue(requests(20))
        with pytest.raises(BatchStopped, match="LIANLIAN_GATEWAY_PUBLIC_KEYS"):
            await queue.work(session, concurrency=20)
        assert {job.status for job in await jobs_of(queue)} == {"todo"}


async def test_a_missing_notify_url_delays_only_its_refund(dsn, journal, caplog):
    """The others are made at once, and the refund as soon as the merchant has the URL."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    incomplete = attrs.evolve(gateway.merchant(), notify_url=None)
    first, *others = requests(30)
    async with RefundQueue(dsn, slice_size=10) as queue:
        await queue.enqueue([attrs.evolve(first, notify_url=None), *others])
        async with RefundSession(incomplete, transport=asgi_transport(gateway), journal=journal) as session:
            await queue.work(session, wait=False)
        assert {"waiting": 0, "later": 1, "failed": 0}.items() <= dict(await queue.counts()).items()
        [(cause, number)] = (await queue.activity())["queued_again"].items()
        assert (cause.startswith("notify_url: is required, in the request or in the Merchant"), number) == (True, 1)
        assert f"refund R-0: {cause}" in caplog.messages
        assert len(gateway.refunds) == 29
        await hurry(queue)
        async with gateway.session(journal=journal) as session:
            await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert len(gateway.refunds) == 30


async def test_an_unexpected_error_stops_the_worker(dsn, journal):
    """The error is raised, and no refund is lost."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue:
        await queue.enqueue(requests(10))
        async with gateway.session(journal=journal) as closed:
            pass
        with pytest.raises(RuntimeError, match="closed"):
            await queue.work(closed)
        assert (await queue.counts())["waiting"] == 10
        async with gateway.session(journal=journal) as session:
            await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert [gateway.times_made(f"R-{number}") for number in range(10)] == [1] * 10


async def test_a_refund_that_the_journal_cannot_record_is_tried_again_later(dsn):
    """Another transaction has locked its row: its slice is queued again, and the worker continues."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with (
        PostgresJournal(dsn, timeout=1.0) as journal,
        RefundQueue(dsn, slice_size=5) as queue,
        gateway.session(journal=journal) as session,
        await psycopg.AsyncConnection.connect(dsn) as other,
    ):
        await other.execute(
            "INSERT INTO lianlian.refunds (no_refund, fields, body, state, history) VALUES ('R-0', '{}', '', '', '[]')"
        )
        await queue.enqueue(requests(10))
        await queue.work(session, concurrency=1, wait=False)
        counts = await queue.counts()
        assert 1 <= counts["waiting"] + counts["later"] <= 5
        assert len(gateway.refunds) >= 5
        await other.rollback()
        await hurry(queue)
        await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert len(gateway.refunds) == 10


async def test_a_slice_whose_rest_cannot_be_queued_again_stops_the_worker(dsn, journal):
    """The database's error is raised, and the whole slice runs again."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.BUSY, ret_code="1014", when=When.BEFORE)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(3))
        await queue.app.connector.execute_query_async("ALTER TABLE procrastinate_jobs ADD CHECK (priority <> 1)")
        with pytest.raises(ConnectorException):
            await queue.work(session)
        (job,) = await jobs_of(queue)
    assert (job.status, job.attempts, len(job.task_kwargs["refunds"])) == ("todo", 1, 3)


@pytest.mark.parametrize(
    ("row", "number", "cause"),
    [
        ({"no_refund": "R-X", "dt_refund": "20261122101500", "no_order": "O-1"}, "R-X", "money_refund: is required"),
        ({"no_refund": "R-X", "money_refund": 1}, "R-X", "must be objects of strings"),
        (["R-X"], None, "must be objects of strings"),
    ],
)
async def test_an_unreadable_row_fails_alone(dsn, journal, row, number, cause):
    """The others of its slice are made; its cause is stored, also only once if the job runs again."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        slice_ = [request.to_dict() for request in requests(5)]
        await queue._put([follow_up([*slice_[:2], row, *slice_[2:]], tries=0)])
        await queue.work(session, wait=False)
        (failure,) = await queue.failures()
        assert failure["no_refund"] == number
        assert cause in failure["cause"]
        assert (await queue.counts())["failed"] == 1
        (job,) = await jobs_of(queue)
        await queue.app.job_manager.retry_job(job)
        await queue.work(session, wait=False)
        assert await queue.failures() == [failure]
    assert len(gateway.refunds) == 5


async def test_unreadable_rows_release_their_places(dsn, journal):
    """More of them than ``concurrency`` do not hold up the refund after them."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue._put([follow_up([*["R-X"] * 5, *(request.to_dict() for request in requests(1))], tries=0)])
        await queue.work(session, concurrency=2, wait=False)
        assert len(await queue.failures()) == 5
    assert len(gateway.refunds) == 1


@pytest.mark.parametrize("arguments", ["[1, 2]", "null", '"R-0"'])
async def test_a_job_whose_arguments_are_not_an_object_fails(dsn, journal, arguments):
    """It fails alone, and the worker goes on."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue._put([follow_up([], tries=0)])
        await queue.app.connector.execute_query_async(
            "UPDATE procrastinate_jobs SET args = %(arguments)s::jsonb", arguments=arguments
        )
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        assert [failure["no_refund"] for failure in await queue.failures()] == [None]
        assert [job.status for job in await jobs_of(queue)] == ["failed"]
    assert len(gateway.refunds) == 1


async def test_a_job_without_refunds_fails(dsn, journal):
    """A job that another program inserted into the queue does not stop the worker."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.app.configure_task("lianlian:refunds", queue="lianlian").defer_async(refund="R-0", tries="many")
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        assert [failure["no_refund"] for failure in await queue.failures()] == [None]
    assert len(gateway.refunds) == 1


@pytest.mark.parametrize(("ret_code", "stops"), [("5006", True), ("1014", False)])
async def test_a_refund_whose_rejection_may_pass_is_queued_again(dsn, journal, ret_code, stops):
    """An empty balance stops the worker, a limit does not; in both cases the refund is queued for another try."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.BUSY, ret_code=ret_code, when=When.BEFORE)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(1))
        with pytest.raises(BatchStopped, match=ret_code) if stops else nullcontext():
            await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert job.status == "todo"


async def test_a_wrong_gateway_key_stops_the_worker(dsn, journal, stranger_keys):
    """Four refunds are made before ``BatchStopped`` names the key; all go back into the queue, and are found later."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    wrong = gateway.merchant(gateway_public_keys=stranger_keys.public)
    async with RefundQueue(dsn) as queue:
        await queue.enqueue(requests(30))
        async with RefundSession(wrong, transport=asgi_transport(gateway), journal=journal, deadline=1.0) as session:
            with pytest.raises(BatchStopped, match="LIANLIAN_GATEWAY_PUBLIC_KEYS"):
                await queue.work(session)
        assert gateway.requests["apply"] == 4
        assert {job.status for job in await jobs_of(queue)} == {"todo"}
        await hurry(queue)
        async with gateway.session(journal=journal) as session:
            await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert all(gateway.times_made(f"R-{number}") == 1 for number in range(30))


async def test_a_permanently_rejected_refund_is_finished(dsn, journal):
    """The journal has the rejection, and the job is deleted."""
    async with RefundQueue(dsn) as queue, SandboxGateway().session(journal=journal) as session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert (await journal.find("R-0")).state is State.REJECTED


async def test_a_conflict_becomes_a_failed_job(dsn, journal):
    """A number with other recorded content fails its job, and nothing is sent."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        request = next(requests(1))
        await session.apply_refund(request)
        await queue.enqueue([RefundRequest.from_dict(request.to_dict() | {"money_refund": "2.00"})])
        for _ in range(2):  # the recorded refund is finished, but it is not the one in the job
            await queue.work(session, wait=False)
            (job,) = await jobs_of(queue)
            assert job.status == "failed"
    assert gateway.money_moved("R-0") == Decimal("1.00")


async def test_a_failed_job_is_deleted_after_a_person_has_decided(dsn, journal):
    """Until then it is listed; the refund is not sent."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    (request,) = requests(1)
    async with gateway.session() as another_program:
        await another_program.apply_refund(attrs.evolve(request, money_refund=Decimal("9.00")))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, query_first=True) as session:
        await queue.enqueue([request])
        for _ in range(2):
            await queue.work(session, wait=False)
            assert [failure["no_refund"] for failure in await queue.failures()] == ["R-0"]
        now = system_clock()
        await journal.decide("R-0", decision(False, "bank statement", "clerk", now), now)
        await queue.work(session, wait=False)
        assert (await queue.failures(), (await queue.counts())["failed"]) == ([], 0)
    assert gateway.money_moved("R-0") == Decimal("9.00")


async def test_cancellation_ends_an_idle_worker(dsn, journal):
    """A worker that waits for jobs ends when it is cancelled."""
    async with RefundQueue(dsn) as queue, SandboxGateway().session(journal=journal) as session:
        with anyio.move_on_after(0.5) as scope:
            await queue.work(session)
        assert scope.cancelled_caught


async def test_a_worker_leaves_the_signals_to_its_program(dsn, journal):
    """While it runs, SIGINT and SIGTERM have the handlers that they had before."""

    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before, seen = handlers(), []
    async with (
        RefundQueue(dsn) as queue,
        SandboxGateway().session(journal=journal) as session,
        anyio.create_task_group() as group,
    ):
        await queue.enqueue(requests(1))
        group.start_soon(partial(queue.work, session, on_outcome=lambda _: seen.append(handlers())))
        await until(lambda: seen)
        group.cancel_scope.cancel()
    assert seen == [before]


async def test_a_cancelled_worker_finishes_its_running_refunds(dsn, journal):
    """The running refunds are made, and the others are queued again as new refunds."""
    gateway, gate = SandboxGateway(default_order=Decimal("1000.00")), Gate()
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, middleware=[gate]) as session:
        await queue.enqueue(requests(20))
        async with anyio.create_task_group() as group:
            group.start_soon(partial(queue.work, session, concurrency=3))
            await until(lambda: gate.begun == 3)
            group.cancel_scope.cancel()
            gate.opened.set()
        assert await queue.counts() == {"waiting": 17, "later": 0, "at_work": 0, "failed": 0, "workers": 0}
        (job,) = await jobs_of(queue)
    assert [row["no_refund"] for row in job.task_kwargs["refunds"]] == [f"R-{number}" for number in range(3, 20)]
    assert (len(gateway.refunds), job.task_kwargs["tries"]) == (3, 0)


async def test_a_second_cancellation_ends_the_worker_at_once(dsn, journal):
    """The running refunds are cancelled; the slice goes back as begun, so that the next worker queries them first."""
    gateway, gate = SandboxGateway(default_order=Decimal("1000.00")), Gate()
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, middleware=[gate]) as session:
        await queue.enqueue(requests(20))
        work = asyncio.create_task(queue.work(session, concurrency=3))
        await until(lambda: gate.begun == 3)
        work.cancel()
        await until(lambda: queue._worker.is_stopping)
        work.cancel()
        with anyio.fail_after(60), pytest.raises(asyncio.CancelledError):
            await work
        (job,) = await jobs_of(queue)
    assert (job.status, job.attempts, len(job.task_kwargs["refunds"])) == ("todo", 1, 20)
    assert len(gateway.refunds) == 0


async def leave_jobs(queue, count):
    """Let a worker fetch all jobs of ``count`` refunds, and send no heartbeat for two minutes."""
    await queue.enqueue(requests(count))
    dead = await queue.app.job_manager.register_worker()
    while await queue.app.job_manager.fetch_job(queues=["lianlian"], worker_id=dead) is not None:
        pass
    await forget_workers(queue)


async def test_activity_tells_of_a_dead_worker_and_of_what_waits(dsn):
    """A worker without heartbeat is listed with its slices; refunds that are due later do not count as waiting."""
    async with RefundQueue(dsn, slice_size=1) as queue:
        await leave_jobs(queue, 2)
        await queue._put([follow_up([{}, {}], tries=1, seconds=900.0, cause="unknown: timeout")])
        activity = await queue.activity()
        assert (activity["oldest_waiting_seconds"], activity["queued_again"]) == (None, {"unknown: timeout": 2})
        [worker] = activity["workers"]
        assert (worker["slices"], 120 <= worker["heartbeat_seconds"] < 180) == (2, True)
        await hurry(queue)
        assert (await queue.activity())["oldest_waiting_seconds"] >= 0


async def forget_workers(queue):
    """Set every worker's last heartbeat to two minutes ago."""
    silence = "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '2 minutes'"
    await queue.app.connector.execute_query_async(silence)


async def test_another_worker_runs_the_jobs_of_a_dead_worker(dsn, journal):
    """A job that a worker fetched and never finished is queued again, and its refunds are queried first."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), repeated=Repeated.AGAIN)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        async with gateway.session() as dead:
            await dead.apply_refund(*requests(1))
        await leave_jobs(queue, 1)
        await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert gateway.times_made("R-0") == 1


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE procrastinate_workers SET last_heartbeat = now() + interval '1 hour'",
        "UPDATE procrastinate_jobs SET status = 'todo', scheduled_at = now() + interval '1 year'",
    ],
)
async def test_no_job_waits_because_the_databases_clock_was_ahead(dsn, journal, change):
    """The clock was set back after a worker's last heartbeat, or after a job was scheduled."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await leave_jobs(queue, 1)
        await queue.app.connector.execute_query_async(change)
        await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert gateway.times_made("R-0") == 1


async def test_jobs_that_a_worker_of_another_program_fails_are_run(dsn, journal):
    """By default, procrastinate's workers fetch the jobs of all queues, and fail those whose task they lack."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(3))
        async with App(connector=PsycopgConnector(conninfo=dsn)).open_async() as other:
            await other.run_worker_async(wait=False, install_signal_handlers=False)
        assert (await queue.counts())["failed"] == 3
        await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert [gateway.times_made(f"R-{number}") for number in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("attempts", [0, 1])
async def test_of_an_aborted_job_only_the_begun_refunds_are_resolved(dsn, journal, attempts):
    """For example, an operator stops a batch that was queued by mistake."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.AFTER, times=2)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(6))
        await queue.app.connector.execute_query_async(f"UPDATE procrastinate_jobs SET attempts = {attempts}")
        working = asyncio.create_task(queue.work(session, concurrency=2))
        await until(lambda: gateway.requests["apply"] == 2)
        [job] = await jobs_of(queue)
        await queue.app.job_manager.cancel_job_by_id_async(job.id, abort=True)
        await until_counted(queue, failed=6)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await queue.work(session, wait=False)
        assert (await queue.counts())["failed"] == 6
    assert [gateway.times_made(f"R-{number}") for number in range(6)] == [1, 1, 0, 0, 0, 0]
    assert [entry.state async for entry in journal.entries()] == [State.ACCEPTED] * 2


async def test_a_worker_that_others_removed_goes_on(dsn, journal):
    """It is registered again, as after a suspension, and makes the refunds that are queued later."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with (
        RefundQueue(dsn) as queue,
        gateway.session(journal=journal) as session,
        anyio.create_task_group() as group,
    ):
        queue.app.periodic_registry.periodic_tasks.clear()  # its job must not run when the worker is removed
        group.start_soon(queue.work, session)
        await until_counted(queue, workers=1)
        assert len(await queue.app.job_manager.prune_stalled_workers(-1)) == 1
        await queue.enqueue(requests(3))
        await until(lambda: len(gateway.refunds) == 3)
        await until_counted(queue, workers=1, at_work=0)
        group.cancel_scope.cancel()


@pytest.mark.parametrize("statuses", [("doing", "doing"), ("doing", "todo")])
async def test_periodic_jobs_of_dead_workers_do_not_stop_a_worker(dsn, journal, statuses):
    """Their queueing lock allows only one waiting job, so the dead ones are not queued again."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        dead = []
        for status in statuses:
            job = await queue.app.configure_task(
                "lianlian:requeue-lost", queue="lianlian", queueing_lock="lianlian:requeue-lost lianlian"
            ).defer_async(timestamp=1)
            dead.append(job)
            await queue.app.connector.execute_query_async(
                f"UPDATE procrastinate_jobs SET status = '{status}' WHERE id = {job}"
            )
        await queue.enqueue(requests(3))
        await queue.work(session, wait=False)
        periodic = await queue.app.job_manager.list_jobs_async(task="lianlian:requeue-lost")
        # The worker may add a job of its own when a minute ends meanwhile.
        assert {job.status for job in periodic if job.id in dead} == {"failed"}
    assert len(gateway.refunds) == 3


async def test_two_workers_rescue_each_job_once(dsn, journal):
    """Of two workers that find the same abandoned jobs, one rescues each job, and neither fails."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with (
        RefundQueue(dsn, slice_size=1) as queue,
        RefundQueue(dsn) as other,
        gateway.session(journal=journal) as session,
    ):
        await leave_jobs(queue, 30)
        await asyncio.gather(queue.work(session, wait=False), other.work(session, wait=False))
        assert not await jobs_of(queue)
    assert [gateway.times_made(f"R-{number}") for number in range(30)] == [1] * 30


@pytest.mark.parametrize("is_lost", [True, False])
async def test_a_database_error_during_a_rescue_or_a_fetch_is_raised(dsn, journal, is_lost):
    """The worker ends with the error of the database."""
    async with RefundQueue(dsn) as queue, SandboxGateway().session(journal=journal) as session:
        await (leave_jobs(queue, 1) if is_lost else queue.enqueue(requests(1)))
        await queue.app.connector.execute_query_async("DROP TABLE procrastinate_events CASCADE")
        with pytest.raises(ConnectorException):
            await queue.work(session)


async def test_a_worker_that_procrastinate_stops_does_not_end_silently(dsn, journal):
    """For example, the database is restarted: the heartbeat or the listener fails, and then the worker can stop."""
    async with RefundQueue(dsn, rescue_after=1) as queue, SandboxGateway().session(journal=journal) as session:
        connector = queue.app.connector
        await connector.execute_query_async("CREATE RULE no_heartbeat AS ON UPDATE TO procrastinate_workers DO NOTHING")
        with pytest.raises(LianLianError, match="procrastinate has stopped this worker"):
            await queue.work(session)


async def leave_unknown(gateway, journal, request):
    """Make a refund whose answer is lost, with an empty queue."""
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    async with RefundSession(
        deaf(gateway), transport=asgi_transport(gateway), journal=journal, deadline=2.0
    ) as session:
        with pytest.raises(RefundOutcomeUnknown):
            await session.apply_refund(request)


@pytest.mark.lianlian_allow_network  # to a host that no DNS server knows
async def test_an_open_refund_without_a_job_is_queued_again(dsn, journal):
    """A worker that starts reads the journal, and queries the refunds that other workers left open."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), settle_after=3600, repeated=Repeated.AGAIN)
    lost, never_sent = requests(2)
    await leave_unknown(gateway, journal, lost)
    nowhere = RefundSession(gateway.merchant(), journal=journal, retry=RetryPolicy(attempts=1), deadline=1.0)
    async with nowhere:
        with pytest.raises(RefundNotSent):
            await nowhere.apply_refund(never_sent)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert [entry.state async for entry in journal.entries()] == [State.ACCEPTED, State.UNRESOLVED]
    assert (gateway.times_made("R-0"), gateway.times_made("R-1")) == (1, 0)


async def test_a_refund_that_ends_while_the_journal_is_read_is_not_queued_again(dsn, journal):
    """The journal and the jobs were read at the same time; the refund and its job have ended since then."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    await leave_unknown(gateway, journal, next(requests(1)))

    class Ends(PostgresJournal):
        async def find(self, no_refund):
            entry = await super().find(no_refund)
            return await self.finish(entry, Ending(state=State.CONFLICT, record={}))

    before = dict(gateway.requests)
    async with RefundQueue(dsn) as queue, Ends(dsn) as read, gateway.session(journal=read) as session:
        await queue.work(session, wait=False)
        assert not await jobs_of(queue)
    assert gateway.requests == before


async def test_an_open_refund_with_a_job_is_not_queued_again(dsn, journal):
    """A refund that waits for its ask_again_at is in one job only; so is a refund that needs a person."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    for request in requests(2):
        await leave_unknown(gateway, journal, request)
    async with RefundQueue(dsn, slice_size=1) as queue, gateway.session(journal=journal) as session:
        waits, failed = (request.to_dict() for request in requests(2))
        await queue._put(
            [follow_up([waits], tries=1, seconds=900.0), follow_up([failed], tries=1, cause="a person", failed=True)]
        )
        before = dict(gateway.requests)
        await queue.work(session, wait=False)
        assert [job.status for job in await jobs_of(queue)] == ["todo", "failed"]
    assert gateway.requests == before


@pytest.mark.parametrize("seconds", [0, 0.5, -1, float("nan"), float("inf"), "60"])
def test_a_rescue_after_below_a_second_or_infinite_is_refused(seconds):
    """Otherwise a live worker would count as dead between two heartbeats, or PostgreSQL would raise an error."""
    with pytest.raises(ConfigurationError, match=r"rescue_after: must be a number of seconds of at least 1 .* is "):
        RefundQueue("dbname=refunds", rescue_after=seconds)


async def test_refund_jobs_need_the_session_of_work(dsn, caplog):
    """In another worker program the job raises an error with the cure, and stays in the queue."""
    caplog.set_level("INFO", "procrastinate")
    async with RefundQueue(dsn) as queue:
        await queue.enqueue(requests(1))
        await queue.app.run_worker_async(wait=False)
        (job,) = await jobs_of(queue)
    assert (job.status, job.attempts) == ("todo", 1)
    assert "no session for this refund job: start the worker with RefundQueue.work" in caplog.text


async def test_work_refuses_a_session_without_the_journal_of_its_queue(dsn, postgres_dsn):
    """The journal of another merchant, one in another database, or none: every refund stays in the queue."""
    gateway, schema = SandboxGateway(default_order=Decimal("1000.00")), 'shop "A"'
    elsewhere = postgres.new_database(postgres_dsn)
    async with (
        RefundQueue(dsn, schema=schema) as queue,
        PostgresJournal(dsn, schema="shop_b") as of_another,
        PostgresJournal(elsewhere, schema=schema) as misplaced,
        gateway.session() as without,
        gateway.session(journal=of_another) as other,
        gateway.session(journal=misplaced) as foreign,
    ):
        await queue.enqueue(requests(3))

        async def all_are_refused():
            for session in (without, other, foreign):
                with pytest.raises(ConfigurationError, match=r"needs a PostgresJournal with .* schema='shop \"A\"'"):
                    await queue.work(session, wait=False)

        await all_are_refused()
        async with PostgresJournal(dsn, schema=schema) as journal, gateway.session(journal=journal) as session:
            await all_are_refused()
            assert ((await queue.counts())["waiting"], gateway.requests["apply"]) == (3, 0)
            await queue.work(session, wait=False)
    assert len(gateway.refunds) == 3


async def test_two_merchants_share_a_database(dsn):
    """Each has a queue with the name of its journal's schema: no worker takes or counts the refunds of the other."""
    async with RefundQueue(dsn, schema="shop_a") as ours, RefundQueue(dsn, schema="shop_b") as theirs:
        assert await ours.enqueue(requests(2)) == 2
        gateway = SandboxGateway(default_order=Decimal("1000.00"))
        async with PostgresJournal(dsn, schema="shop_b") as journal, gateway.session(journal=journal) as session:
            await theirs.work(session, wait=False)
        assert ((await ours.counts())["waiting"], (await theirs.counts())["waiting"]) == (2, 0)
    assert gateway.requests["apply"] == 0


async def test_work_raises_an_error_of_the_database(dsn, journal):
    """The first statement, which compares the journals, raises like every later one."""
    async with RefundQueue(dsn) as queue, SandboxGateway().session(journal=journal) as session:
        await queue.app.connector.execute_query_async("ALTER TABLE lianlian.version RENAME COLUMN id TO hidden")
        with pytest.raises(ConnectorException):
            await queue.work(session)


async def test_an_idle_queue_has_one_connection(dsn):
    """The database accepts 100 connections by default, for all workers together."""
    async with RefundQueue(dsn), await psycopg.AsyncConnection.connect(dsn) as connection:
        cursor = await connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert await cursor.fetchone() <= (2,)  # two while it opens


async def test_a_worker_that_hangs_in_a_transaction_does_not_block_the_queue(dsn):
    """The database ends a transaction of the queue that is idle for 10 seconds, which unlocks its rows."""
    async with RefundQueue(dsn) as queue, queue.app.connector.pool.connection() as connection:
        cursor = await connection.execute("SHOW idle_in_transaction_session_timeout")
        assert await cursor.fetchone() == ("10s",)


async def test_an_invalid_dsn_of_a_queue_is_not_shown():
    """An invalid connection string raises ``ConfigurationError``, which shows no part of it."""
    with pytest.raises(ConfigurationError, match="dsn: must be a PostgreSQL connection string") as caught:
        RefundQueue("password=s3cret books")
    assert "s3cret" not in str(caught.value)


async def test_the_error_of_a_lost_listener_has_no_password(dsn, postgres_dsn):
    """The error is logged with its traceback, and error trackers add the local variables of each frame."""
    name = conninfo_to_dict(dsn)["dbname"]
    async with (
        RefundQueue(psycopg.conninfo.make_conninfo(dsn, password="hidden")) as queue,
        await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as connection,
    ):
        fetcher = SliceFetcher(SimpleNamespace(app=queue.app))
        await connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            with pytest.raises(ConnectorException) as caught:
                await fetcher.listen_for_jobs(on_notification=print, queues=["lianlian"])
        finally:
            await connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "hidden" not in "".join(shown.format())


async def test_cancelled_opening_leaves_no_task():
    """The pool is closed, so its tasks end with their connections: else they keep the event loop from ending."""
    before = asyncio.all_tasks()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        dsn = f"postgresql://u@127.0.0.1:{listener.getsockname()[1]}/d"
        opening = asyncio.create_task(RefundQueue(dsn).__aenter__())
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        with connection:  # that never answers
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
    _, running = await asyncio.wait(asyncio.all_tasks() - before, timeout=30)
    assert running == set()
