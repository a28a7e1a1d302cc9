"""Refunds as procrastinate jobs on a real PostgreSQL (asyncio only, as procrastinate and psycopg are)."""

import asyncio
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import anyio
import attrs
import psycopg
import pytest
from procrastinate.exceptions import ConnectorException

from lianlian_async import BatchStopped, ConfigurationError, Endpoints, RefundRequest, RefundSession, RetryPolicy
from lianlian_async.clock import system_clock
from lianlian_async.contrib.procrastinate import RefundQueue
from lianlian_async.journal import State
from lianlian_async.journal.postgres import PostgresJournal
from lianlian_async.sandbox import Fault, Repeated, SandboxGateway, When
from lianlian_async.transport import asgi_transport

pytestmark = pytest.mark.anyio

WAITS_FOR_ANOTHER = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"


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
    jobs = await queue.app.job_manager.list_jobs_async(task="lianlian:refund")
    return sorted(jobs, key=lambda job: job.id)


async def hurry(queue):
    """Let all jobs that wait for a later moment be run now."""
    await queue.app.connector.execute_query_async("UPDATE procrastinate_jobs SET scheduled_at = NULL")


async def test_a_fleet_makes_every_refund_once(dsn, journal):
    """Two workers empty one queue: each refund is made once and stands in the shared journal."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, RefundQueue(dsn) as other:
        assert await queue.enqueue(requests(30)) == 30
        async with gateway.session(journal=journal) as session, gateway.session(journal=journal) as another:
            await asyncio.gather(queue.work(session, wait=False), other.work(another, wait=False))
        assert await jobs_of(queue) == []
    assert [gateway.times_made(f"R-{number}") for number in range(30)] == [1] * 30
    assert (await journal.counts())[State.ACCEPTED] == 30


async def test_what_waits_in_the_queue_waits_there_once(dsn):
    """Enqueuing the same refunds again, also by two producers at once, adds only what is new."""
    async with RefundQueue(dsn) as queue, RefundQueue(dsn) as other:
        assert await queue.enqueue(requests(3)) == 3
        added = await asyncio.gather(queue.enqueue(requests(700)), other.enqueue(requests(700)))
        assert sum(added) == 697
        assert len(await jobs_of(queue)) == 700


async def test_a_producer_that_comes_in_between_is_noticed(dsn):
    """A refund that another producer enqueues between our look and our insertion is enqueued once."""
    async with RefundQueue(dsn) as queue, await psycopg.AsyncConnection.connect(dsn) as other:
        (request,) = requests(1)
        number = f"lianlian {request.no_refund}"
        job = queue._task.configure(lock=number, queueing_lock=number).make_new_job(fields=request.to_dict())
        await queue.app.job_manager.defer_job_async(job, connection=other)  # not committed yet: nobody sees it
        async with asyncio.TaskGroup() as group:
            added = group.create_task(queue.enqueue(requests(2)))
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as watcher:
                while not await (await watcher.execute(WAITS_FOR_ANOTHER)).fetchone():  # noqa: ASYNC110 - no event tells
                    await asyncio.sleep(0.01)
            await other.commit()
        assert added.result() == 1
        assert len(await jobs_of(queue)) == 2


async def test_an_unknown_refund_comes_again_when_asking_can_decide(dsn, journal):
    """A refund that is left unknown is scheduled for its ask_again_at, and stays unresolved until then."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)
    before = datetime.now(UTC)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, deadline=0.3) as session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert job.status == "todo"
    assert before + timedelta(seconds=900) <= job.scheduled_at <= datetime.now(UTC) + timedelta(seconds=900)
    assert (await journal.find("R-0")).state is State.UNRESOLVED


@pytest.mark.parametrize("step", [timedelta(days=1), timedelta(hours=-2)])
async def test_jobs_come_again_by_the_databases_clock(dsn, journal, step):
    """A worker whose wall clock is wrong schedules a job as any other does: due when its seconds have passed."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.NO_ANSWER, call="apply", when=When.BEFORE)

    def clock():
        now = system_clock()
        return attrs.evolve(now, wall=now.wall + step)

    before = datetime.now(UTC)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal, deadline=0.3, clock=clock) as session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert before + timedelta(seconds=899) <= job.scheduled_at <= datetime.now(UTC) + timedelta(seconds=901)


async def test_a_job_that_was_begun_before_is_asked_about_first(dsn, journal):
    """Also where the journal has lost it: the gateway would carry it out again."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"), repeated=Repeated.AGAIN)
    async with RefundQueue(dsn, rescue_after=5.0) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(1))
        async with gateway.session() as dead:
            await dead.apply_refund(*requests(1))
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as administrator:
            await administrator.execute("UPDATE procrastinate_jobs SET attempts = 1")
        await queue.work(session, wait=False)
    assert (gateway.requests["query"], gateway.times_made("R-0")) == (1, 1)


async def test_an_unknown_refund_is_found_by_the_next_worker(dsn, journal):
    """A worker that takes the job again asks first, and finds what the first attempt did."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.RESET, call="apply", when=When.AFTER)
    merchant = gateway.merchant()
    deaf = attrs.evolve(merchant, endpoints=attrs.evolve(merchant.endpoints, query="https://sandbox.invalid/lost"))
    policy = RetryPolicy(initial=0.01, maximum=0.01, not_found_grace=0)
    async with RefundQueue(dsn) as queue:
        await queue.enqueue(requests(1))
        unanswered = RefundSession(deaf, transport=asgi_transport(gateway), journal=journal, deadline=0.2, retry=policy)
        async with unanswered:
            await queue.work(unanswered, wait=False)
        assert (await journal.find("R-0")).state is State.UNRESOLVED
        await anyio.sleep(0.1)  # until its ask_again_at
        async with gateway.session(journal=journal) as session:
            await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert (await journal.find("R-0")).state is State.ACCEPTED
    assert (gateway.requests["apply"], gateway.times_made("R-0")) == (1, 1)


async def test_what_was_not_sent_is_sent_later(dsn, journal, merchant):
    """While nothing listens at the gateway's address, the job waits for another try."""
    nowhere = Endpoints("http://127.0.0.1:9/apply", "http://127.0.0.1:9/query")
    session = RefundSession(attrs.evolve(merchant, endpoints=nowhere), journal=journal, retry=RetryPolicy(attempts=1))
    async with RefundQueue(dsn) as queue, session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert (job.status, job.attempts) == ("todo", 1)


async def test_a_rejection_of_ours_to_mend_stops_the_worker(dsn, journal):
    """An unknown merchant number ends the work with BatchStopped, and the refund goes back into the queue."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.BUSY, ret_code="3001", when=When.BEFORE)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(1))
        with pytest.raises(BatchStopped, match="3001"):
            await queue.work(session)
        (job,) = await jobs_of(queue)
    assert job.status == "todo"


@pytest.mark.parametrize(("ret_code", "stops"), [("5006", True), ("1014", False)])
async def test_a_refund_that_may_be_made_later_goes_back_into_the_queue(dsn, journal, ret_code, stops):
    """An empty balance ends the work, a limit does not; either way the refund is kept for another try."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    gateway.script(Fault.BUSY, ret_code=ret_code, when=When.BEFORE)
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await queue.enqueue(requests(1))
        with pytest.raises(BatchStopped, match=ret_code) if stops else nullcontext():
            await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert job.status == "todo"


async def test_a_wrong_gateway_key_stops_the_worker(dsn, journal, stranger_keys):
    """Four refunds are made before BatchStopped names the key; all go back into the queue, and are found with it."""
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


async def test_a_refund_that_is_refused_for_good_is_done(dsn, journal):
    """A rejection is an ending: it stands in the journal, and the job is gone."""
    async with RefundQueue(dsn) as queue, SandboxGateway().session(journal=journal) as session:
        await queue.enqueue(requests(1))
        await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert (await journal.find("R-0")).state is State.REJECTED


async def test_a_conflict_is_left_for_a_person(dsn, journal):
    """A number that stands for other content fails its job for good, and nothing is sent."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        request = next(requests(1))
        await session.apply_refund(request)
        await queue.enqueue([RefundRequest.from_dict(request.to_dict() | {"money_refund": "2.00"})])
        await queue.work(session, wait=False)
        (job,) = await jobs_of(queue)
    assert job.status == "failed"
    assert gateway.money_moved("R-0") == Decimal("1.00")


async def test_cancelling_the_work_ends_it(dsn, journal):
    """A worker that waits for jobs ends when it is cancelled."""
    async with RefundQueue(dsn) as queue, SandboxGateway().session(journal=journal) as session:
        with anyio.move_on_after(0.5) as scope:
            await queue.work(session)
        assert scope.cancelled_caught


async def leave_jobs(queue, count):
    """Have a worker take so many jobs, and give no sign of life for two minutes."""
    await queue.enqueue(requests(count))
    dead = await queue.app.job_manager.register_worker()
    for _ in range(count):
        assert await queue.app.job_manager.fetch_job(queues=["lianlian"], worker_id=dead) is not None
    silence = "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '2 minutes'"
    await queue.app.connector.execute_query_async(silence)


async def test_the_jobs_of_a_dead_worker_are_run_by_another(dsn, journal):
    """A job that a worker took and never finished goes back into the queue, and is made once."""
    gateway = SandboxGateway(default_order=Decimal("1000.00"))
    async with RefundQueue(dsn) as queue, gateway.session(journal=journal) as session:
        await leave_jobs(queue, 1)
        await queue.work(session, wait=False)
        assert await jobs_of(queue) == []
    assert gateway.times_made("R-0") == 1


async def test_workers_that_rescue_the_same_jobs_do_not_disturb_each_other(dsn):
    """Of two workers that find the same jobs left behind, each job is rescued by one, and neither fails."""
    async with RefundQueue(dsn) as queue, RefundQueue(dsn) as other:
        await leave_jobs(queue, 30)
        await asyncio.gather(queue._rescue(0), other._rescue(0))
        assert [job.status for job in await jobs_of(queue)] == ["todo"] * 30


async def test_a_database_that_fails_during_a_rescue_is_heard_of(dsn):
    """Any other error of the database is raised."""
    async with RefundQueue(dsn) as queue:
        await leave_jobs(queue, 1)
        await queue.app.connector.execute_query_async("DROP TABLE procrastinate_events CASCADE")
        with pytest.raises(ConnectorException):
            await queue._rescue(0)


@pytest.mark.parametrize("seconds", [0, 0.5, -1, float("nan"), "60"])
def test_a_worker_is_not_taken_for_dead_between_two_signs_of_life(seconds):
    """A time that is too short is refused: each worker would take itself for dead."""
    with pytest.raises(ConfigurationError, match="rescue_after: must be at least 1 second"):
        RefundQueue("dbname=refunds", rescue_after=seconds)


async def test_jobs_need_the_session_of_work(dsn):
    """A refund job that another worker program runs says where the session comes from."""
    async with RefundQueue(dsn) as queue:
        with pytest.raises(RuntimeError, match=r"RefundQueue\.work"):
            await queue._refund(None, {})


async def test_a_worker_that_hangs_in_a_transaction_does_not_keep_the_queue(dsn):
    """The database ends a transaction of the queue that is idle for 10 seconds, and so lets go of its rows."""
    async with RefundQueue(dsn) as queue, queue.app.connector.pool.connection() as connection:
        cursor = await connection.execute("SHOW idle_in_transaction_session_timeout")
        assert await cursor.fetchone() == ("10s",)


async def test_a_queue_does_not_repeat_a_dsn_that_is_none():
    """A connection string that cannot be read raises ``ConfigurationError``, in which none of it is shown."""
    with pytest.raises(ConfigurationError, match="dsn: not a PostgreSQL connection string") as caught:
        RefundQueue("password=s3cret books")
    assert "s3cret" not in str(caught.value)
