"""The PostgreSQL journal: concurrent workers, dead workers, failovers, and an unreachable database."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

import anyio
import anyio.lowlevel
import attrs
import psycopg
import pytest

from lianlian_async import ConfigurationError
from lianlian_async.clock import Moment, elapsed
from lianlian_async.errors import JournalError
from lianlian_async.journal import Standing, State
from lianlian_async.journal import postgres_rows as sql
from lianlian_async.journal.postgres import PostgresJournal, connection_string
from tests.support import dials, journals, postgres
from tests.support.journals import MADE, REJECTED, intent, now
from tests.support.parties import EPOCH

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param


@pytest.fixture
def schema():
    return f"Merchant's {uuid4().hex}"


@pytest.fixture
def make(postgres_dsn, schema):
    """Creates journals, one for each worker, on the same tables."""
    return lambda **options: PostgresJournal(postgres_dsn, schema=schema, **options)


@pytest.fixture
def administer(postgres_dsn, schema):
    """Executes a statement on the database on a separate connection."""

    async def execute(statement):
        async with await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as connection:
            await connection.execute(psycopg.sql.SQL(statement).format(schema=psycopg.sql.Identifier(schema)))

    return execute


@attrs.frozen
class Workers:
    """Creates journals, one for each worker, on a real server or on the simulation's model of it."""

    make: Callable[..., PostgresJournal]
    fail_over: Callable[[], Awaitable[None]]
    """Simulates a failover to another incarnation of the database."""


@pytest.fixture(params=["postgres", "model"])
def workers(request, schema):
    if request.param == "postgres":
        administer = request.getfixturevalue("administer")
        return Workers(request.getfixturevalue("make"), partial(administer, FAIL_OVER))
    database = journals.model(request)

    async def fail_over():
        database.restart()

    return Workers(partial(PostgresJournal, "postgresql://model", schema=schema), fail_over)


# ── many workers ─────────────────────────────────────────────────────────────────────────────────


async def test_two_workers_never_lease_the_same_refund(workers):
    """Two workers begin the same refunds in opposite order: for each refund one gets NEW, the other LEASED."""
    found = {}

    async def one(journal, number):
        found.setdefault(number, []).append((await journal.begin(intent(f"R-{number}"), now()))[0])

    async with workers.make() as first, workers.make() as second, anyio.create_task_group() as group:
        for number in range(300):
            group.start_soon(one, first, number)
            group.start_soon(one, second, 299 - number)
    assert {number: sorted(standings) for number, standings in found.items()} == {
        number: [Standing.LEASED, Standing.NEW] for number in range(300)
    }


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
async def test_two_workers_share_refunds_through_pgbouncer(postgres_dsn, schema):
    """Every method works in transaction mode, where each transaction may run on another of two connections."""
    found = []

    async def one(journal, number):
        standing, entry = await journal.begin(intent(f"R-{number}"), now())
        found.append(standing)
        if standing is Standing.NEW:
            await journal.finish(entry, MADE)
        assert await journal.find(f"R-{number}") is not None

    with postgres.pooler(postgres_dsn) as dsn:
        workers = [PostgresJournal(dsn, schema=schema) for _ in range(2)]
        async with workers[0], workers[1]:
            await workers[0].begin_acting()
            async with anyio.create_task_group() as group:
                for number in range(500):
                    group.start_soon(one, workers[0], number)
                    group.start_soon(one, workers[1], 499 - number)
            assert found.count(Standing.NEW) == 500
            assert (await workers[1].counts())[State.FINAL] == 500
            assert len([entry async for entry in workers[1].pending()]) == 500


async def test_acting_continues_after_a_failover_lost_its_begin(make, administer):
    """The process that acts still records final refunds as FINAL, and its next sweep calls ``begin_acting`` again."""
    async with make() as journal:
        await journal.begin_acting()
        await administer("UPDATE {schema}.version SET is_acting = false")
        for number in ("R-1", "R-2"):
            _, entry = await journal.begin(intent(number), now())
            assert (await journal.finish(entry, MADE)).state is State.FINAL
        await journal.begin_acting()
        async with make() as other:
            _, entry = await other.begin(intent("R-3"), now())
            assert (await other.finish(entry, MADE)).state is State.FINAL


async def test_a_dead_worker_loses_its_lease(workers):
    """The refund of a dead worker is LEASED until the end of its lease, then UNRESOLVED for another worker."""
    async with workers.make() as dead:
        await dead.begin(intent("R-1", lease=0.2), now())
        await dead.begin(intent("R-2"), now())
    async with workers.make() as heir:
        standings = []
        while Standing.UNRESOLVED not in standings:
            standing, entry = await heir.begin(intent("R-1"), now())
            standings.append(standing)
        assert set(standings) <= {Standing.LEASED, Standing.UNRESOLVED}
        assert entry.sent_at.boot <= now().boot
        assert (await heir.begin(intent("R-2"), now()))[0] is Standing.LEASED


async def test_after_its_lease_a_worker_can_only_finish(workers):
    """A release after the lease does not end the next worker's lease; an ending is recorded if it is the first."""
    async with workers.make() as late, workers.make() as heir:
        _, lost = await late.begin(intent(lease=0), now())
        _, held = await heir.begin(intent(), now())
        await late.release(lost, None)
        assert (await late.begin(intent(), now()))[0] is Standing.LEASED
        await late.finish(lost, MADE)
        assert (await heir.finish(held, REJECTED)).ending == MADE
        await heir.release(held, None)
        assert (await late.begin(intent(), now()))[0] is Standing.FINISHED


async def test_many_workers_may_create_the_tables_concurrently(make, postgres_dsn):
    """Ten workers open a journal without tables, and all can use it; another schema is another journal."""
    async with AsyncExitStack() as stack:
        workers = [make() for _ in range(10)]
        async with anyio.create_task_group() as group:
            for worker in workers:
                group.start_soon(stack.enter_async_context, worker)
        await workers[0].begin(intent(), now())
        assert (await workers[9].counts())[State.UNRESOLVED] == 1
        async with PostgresJournal(postgres_dsn, schema=uuid4().hex) as other:
            assert (await other.counts())[State.UNRESOLVED] == 0


async def test_a_worker_without_the_right_to_create_tables_uses_existing_ones(make, administer, postgres_dsn, schema):
    """After the tables are created, the rights to read and write them suffice."""
    async with make():
        pass
    role = f"worker {uuid4().hex}"
    await administer(
        f'CREATE ROLE "{role}" LOGIN; GRANT USAGE ON SCHEMA {{schema}} TO "{role}";'
        f'GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {{schema}} TO "{role}"'
    )
    async with PostgresJournal(psycopg.conninfo.make_conninfo(postgres_dsn, user=role), schema=schema) as journal:
        _, entry = await journal.begin(intent(), now())
        assert (await journal.finish(entry, MADE)).ending == MADE
    with pytest.raises(JournalError, match="permission denied"):
        async with PostgresJournal(psycopg.conninfo.make_conninfo(postgres_dsn, user=role), schema="another"):
            pass
    await administer(f'CREATE SCHEMA "{role}" AUTHORIZATION "{role}"')  # without the right to create schemas
    async with PostgresJournal(psycopg.conninfo.make_conninfo(postgres_dsn, user=role), schema=role) as journal:
        assert (await journal.begin(intent(), now()))[0] is Standing.NEW


async def test_finding_a_refund_depends_on_no_locale(make, postgres_dsn, schema):
    """The operating system's locale data may change; an index in the order of such a locale then misses entries."""
    async with make(), await psycopg.AsyncConnection.connect(postgres_dsn) as connection:
        found = await connection.execute(
            "SELECT DISTINCT table_name, collation_name FROM information_schema.columns "
            "WHERE table_schema = %s AND column_name = 'no_refund'",
            [schema],
        )
        assert await found.fetchall() == [("refunds", "C")]


async def test_a_role_may_have_a_stricter_isolation_level(make, administer, postgres_dsn, schema):
    """A worker whose role has another default isolation level shares refunds like the others."""
    role = f"strict {uuid4().hex}"
    await administer(
        f'CREATE ROLE "{role}" LOGIN SUPERUSER; ALTER ROLE "{role}" SET default_transaction_isolation = serializable'
    )
    found = []

    async def one(journal, number):
        found.append((await journal.begin(intent(f"R-{number}"), now()))[0])

    dsn = psycopg.conninfo.make_conninfo(postgres_dsn, user=role)
    workers = [PostgresJournal(dsn, schema=schema) for _ in range(2)]
    async with workers[0], workers[1], anyio.create_task_group() as group:
        for number in range(1000):
            group.start_soon(one, workers[0], number)
            group.start_soon(one, workers[1], 999 - number)
    assert sorted(found) == [Standing.LEASED] * 1000 + [Standing.NEW] * 1000


@pytest.mark.parametrize(
    "meanwhile", ["INSERT INTO {schema}.eras (id, datid) VALUES (2, 0)", "UPDATE {schema}.version SET id = id"]
)
async def test_workers_of_a_stricter_isolation_level_begin_an_era_and_bind_together(
    make, administer, elsewhere, meanwhile, monkeypatch
):
    """Another worker commits the same change while this one waits for it."""
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_isolation=serializable")
    async with make() as journal, anyio.create_task_group() as group:
        await administer(FAIL_OVER)
        async with elsewhere(meanwhile, "R-1") as other:

            async def work():
                await journal.bind("201304121000001004", "https://gateway.example/apply")
                assert (await journal.begin(intent(), now()))[0] is Standing.QUERY_FIRST

            group.start_soon(work)
            while not await (await other.execute("SELECT FROM pg_locks WHERE NOT granted")).fetchall():
                pass
            await other.commit()


# ── locks of another transaction ─────────────────────────────────────────────────────────────────


@pytest.fixture
def elsewhere(postgres_dsn, schema):
    """Another transaction, which executes a statement and stays open during the context."""

    @asynccontextmanager
    async def transaction(statement, number):
        async with await psycopg.AsyncConnection.connect(postgres_dsn) as connection:
            await connection.execute(
                psycopg.sql.SQL(statement).format(schema=psycopg.sql.Identifier(schema), number=number)
            )
            yield connection
            await connection.rollback()

    return transaction


LOCKED = "SELECT FROM {schema}.refunds WHERE no_refund = {number} FOR UPDATE"
CHANGED = "UPDATE {schema}.refunds SET holder = NULL WHERE no_refund = {number}"
INSERTED = """
INSERT INTO {schema}.refunds (no_refund, fields, body, state, history)
VALUES ({number}, '{{}}', '', 'unresolved', '')
"""


@pytest.mark.parametrize(("held", "is_known"), [(LOCKED, True), (CHANGED, True), (INSERTED, False)])
async def test_a_locked_refund_does_not_delay_the_others(make, elsewhere, held, is_known):
    """The other refunds of the batch get their results at once; the locked one gets it after the other transaction."""
    answered = []

    async def begin(journal, number):
        standing, _ = await journal.begin(intent(number), now())
        answered.append((number, standing))

    async with make() as journal:
        if is_known:
            _, entry = await journal.begin(intent("R-5"), now())
            await journal.release(entry, None)
        async with anyio.create_task_group() as group, elsewhere(held, "R-5"):
            for number in range(20):
                group.start_soon(begin, journal, f"R-{number}")
            while len(answered) < 19:  # noqa: ASYNC110 - no event tells
                await anyio.sleep(0.01)
            assert {standing for _, standing in answered} == {Standing.NEW}
            assert "R-5" not in dict(answered)
            assert (await journal.find("R-5") is not None) is is_known  # find does not wait
        assert dict(answered)["R-5"] is Standing.NEW


async def test_a_refund_locked_for_longer_than_the_timeout_fails_alone(make, elsewhere):
    """Its caller gets a ``JournalError`` with the reason, and nothing is recorded for it."""
    async with make(timeout=0.4) as journal, elsewhere(INSERTED, "R-1"):
        with pytest.raises(JournalError, match=r"another transaction has locked this refund's row for 0\.4 s"):
            await journal.begin(intent(), now())
        assert (await journal.begin(intent("R-2"), now()))[0] is Standing.NEW
        assert await journal.find("R-1") is None


async def test_a_dead_workers_transaction_is_ended_by_the_database(make):
    """The rows of a worker that dies in a transaction are unlocked soon, even if its connection stays open."""
    async with make() as journal, make(timeout=1.0) as dead:
        _, entry = await journal.begin(intent(), now())
        await journal.release(entry, None)
        async with dead._pool.connection() as connection:
            lock = "SELECT FROM {schema}.refunds FOR UPDATE", ()
            await dead._send(connection, (sql.BEGIN, ()), dead._clock_query, lock)
            assert (await journal.begin(intent(), now()))[0] is Standing.NEW
            with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
                await dead._send(connection, (sql.COMMIT, ()))


async def test_a_begin_that_is_cancelled_while_it_waits_is_rolled_back(make, elsewhere):
    """A ``begin`` that was cancelled records nothing after the other transaction has ended."""
    async with make() as journal, elsewhere(INSERTED, "R-1"):
        with anyio.move_on_after(0.3) as scope:
            await journal.begin(intent(), now())
        assert scope.cancelled_caught
    async with make() as journal:
        found = await journal.find("R-1")
        assert found is None or found.sent_at is None
        assert (await journal.begin(intent(), now()))[0] is Standing.NEW


async def test_a_begin_that_is_cancelled_during_its_insert_is_rolled_back(make, elsewhere, postgres_dsn, monkeypatch):
    """It is rolled back even if the rollback runs while its row waits for the other transaction."""
    waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT%'"
    async with (
        make() as journal,
        await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as observer,
        elsewhere(INSERTED, "R-1"),
        anyio.create_task_group() as group,
    ):
        group.start_soon(journal.begin, intent(), now())
        while not journal._retries:
            await anyio.lowlevel.checkpoint()
        monkeypatch.setattr(sql, "WAIT_BRIEFLY", sql.WAIT_BRIEFLY.replace("100ms", "60s"))
        while not (await observer.execute(waits)).rowcount:
            await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            assert await journal.find("R-1") is None
    async with make() as journal:
        assert (await journal.begin(intent(), now()))[0] is Standing.NEW


async def test_closing_waits_for_operations_on_locked_refunds(make, elsewhere):
    """An ending for a row that another transaction has locked is recorded before the journal is closed."""
    async with make() as journal:
        _, entry = await journal.begin(intent(), now())
        async with elsewhere(LOCKED, "R-1"), anyio.create_task_group() as group:
            group.start_soon(journal.finish, entry, MADE)
            await anyio.sleep(0.1)
            group.cancel_scope.cancel()
    async with make() as journal:
        assert (await journal.find("R-1")).ending == MADE


@pytest.mark.parametrize("verb", ["release", "acted", "decide"])
async def test_operations_that_begin_no_refund_wait_for_a_locked_refund(make, elsewhere, verb):
    """They change the entry after the other transaction, although a locked row looks like a refund without an entry."""
    ended = anyio.Event()
    async with make() as journal:
        await journal.begin_acting()
        _, entry = await journal.begin(intent(), now())
        if verb == "acted":
            await journal.finish(entry, MADE)
        elif verb == "decide":
            await journal.release(entry, now())

        async def change():
            if verb == "release":
                await journal.release(entry, None)
            elif verb == "acted":
                await journal.acted("R-1", now())
            else:
                await journal.decide("R-1", REJECTED, now())
            ended.set()

        async with anyio.create_task_group() as group, elsewhere(LOCKED, "R-1"):
            group.start_soon(change)
            while not journal._retries:
                await anyio.lowlevel.checkpoint()
                assert not ended.is_set()
        found = await journal.find("R-1")
    changed = {"release": found.sent_at is None, "acted": found.state is State.DONE, "decide": found.ending == REJECTED}
    assert changed[verb]


async def test_operations_on_locked_refunds_fail_with_the_database(make, elsewhere, administer):
    """If the database fails while callers wait for a locked row, they get ``JournalError``."""
    async with make(timeout=0.5) as journal:
        _, entry = await journal.begin(intent(), now())

        async def settle():
            with pytest.raises(JournalError, match="does not exist"):
                await journal.finish(entry, MADE)

        async with elsewhere(LOCKED, "R-1"), anyio.create_task_group() as group:
            group.start_soon(settle)
            await anyio.sleep(0.1)
            await administer("ALTER TABLE {schema}.eras RENAME TO gone")
        await administer("ALTER TABLE {schema}.gone RENAME TO eras")


# ── another incarnation, and clocks that are set ─────────────────────────────────────────────────


FAIL_OVER = "UPDATE {schema}.eras SET postmaster_start_time = '2020-01-01'"
"""Makes the journal look like a copy on another server."""


async def test_after_a_failover_new_refunds_are_queried_first(make, administer):
    """During the grace all, later those with an earlier ``dt_refund``. Not in the inbox, which sends nothing."""
    async with make() as journal:
        inbox = await journal.inbox()
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.NEW
        await administer(FAIL_OVER)
        await administer(FAIL_OVER.replace("{schema}", '"' + inbox._schema.replace('"', '""') + '"'))
        dated = {"no_refund": "R-2", "money_refund": "200.01", "dt_refund": "20990101000000"}
        standing, entry = await journal.begin(intent("R-2", fields=dated), now())
        assert (standing, entry.sent_at) == (Standing.QUERY_FIRST, None)
        # Created before the failover: a lost call may have sent it, so its grace begins now.
        standing, entry = await journal.begin(intent("R-0"), now())
        assert (standing, entry.sent_at is not None) == (Standing.QUERY_FIRST, True)
        assert (await inbox.begin(intent("R-2", grace=None), now()))[0] is Standing.NEW
        await administer(
            "UPDATE {schema}.eras SET began = began - interval '2 hours', inserted_by = pg_current_xact_id()::xid"
        )
    async with make() as journal:
        dated = {"no_refund": "R-3", "money_refund": "200.01", "dt_refund": "20990101000000"}
        assert (await journal.begin(intent("R-3", fields=dated), now()))[0] is Standing.NEW
        dated = {"no_refund": "R-4", "money_refund": "200.01", "dt_refund": "20200101000000"}
        assert (await journal.begin(intent("R-4", fields=dated), now()))[0] is Standing.QUERY_FIRST


async def test_after_a_failover_the_grace_and_the_leases_start_again(workers):
    """A refund sent an hour ago counts as sent at the failover, and a lease gets its full length again."""
    async with workers.make() as journal:
        _, entry = await journal.begin(intent("R-1"), now())
        await journal.release(entry, now(-3600))
        await journal.begin(intent("R-2", lease=0.5), now())
        await workers.fail_over()
        begun = now()
        standing, entry = await journal.begin(intent("R-1"), now())
        assert standing is Standing.UNRESOLVED
        assert begun.boot <= entry.sent_at.boot <= now().boot
        assert (await journal.begin(intent("R-2"), now()))[0] is Standing.LEASED
        while (await journal.begin(intent("R-2"), now()))[0] is Standing.LEASED:  # noqa: ASYNC110 - no event tells
            await anyio.sleep(0.02)
        assert now().boot >= begun.boot + 0.5


async def test_after_the_restore_of_a_dump_new_refunds_are_queried_first(make, administer):
    """The server was not restarted, but the rows of a dump are inserted again."""
    async with make() as journal:
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.NEW
    await administer("CREATE TABLE {schema}.dump AS SELECT * FROM {schema}.eras; TRUNCATE {schema}.eras")
    await administer("INSERT INTO {schema}.eras SELECT * FROM {schema}.dump")
    async with make() as journal:
        standing, entry = await journal.begin(intent("R-2"), now())
        assert (standing, entry.sent_at is not None) == (Standing.QUERY_FIRST, True)


BACK = """
DELETE FROM {schema}.refunds; DELETE FROM {schema}.eras WHERE id > 1;
UPDATE {schema}.eras SET postmaster_start_time = pg_postmaster_start_time(), inserted_by = pg_current_xact_id()::xid
"""


@pytest.mark.parametrize("change", [BACK, "DROP SCHEMA {schema} CASCADE"])
async def test_after_the_way_back_to_an_earlier_server_new_refunds_are_queried_first(make, administer, change):
    """A DNS name or a proxy leads to another server and back, or another worker creates the tables again."""
    async with make() as journal:
        await administer(FAIL_OVER)
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.QUERY_FIRST
        await administer(change)
        async with make():
            standing, entry = await journal.begin(intent("R-1"), now())
    assert (standing, entry.sent_at is not None) == (Standing.QUERY_FIRST, True)


async def test_in_a_copy_of_the_database_new_refunds_are_queried_first(postgres_dsn, administer):
    """``CREATE DATABASE … TEMPLATE`` copies the rows unchanged: as a backup that replaces the database later."""
    dsn = postgres.new_database(postgres_dsn)
    async with PostgresJournal(dsn) as journal:
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.NEW
    name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
    await administer(f"CREATE DATABASE {name}_copy TEMPLATE {name}")
    async with PostgresJournal(psycopg.conninfo.make_conninfo(dsn, dbname=f"{name}_copy")) as journal:
        standing, entry = await journal.begin(intent("R-2"), now())
        assert (standing, entry.sent_at is not None) == (Standing.QUERY_FIRST, True)


async def test_lost_rows_are_written_again(make, administer):
    """``finish``, ``resend``, and ``release`` of a refund that may have been sent write its lost row again."""
    async with make() as journal:
        begun = [(await journal.begin(intent(f"R-{number}"), now()))[1] for number in range(3)]
        await administer("DELETE FROM {schema}.refunds")
        await journal.finish(begun[0], MADE)
        await journal.release(begun[1], now(-10), {"ret_code": "1002"})
        await journal.resend(begun[2])
        assert (await journal.find("R-0")).ending == MADE
        assert (await journal.find("R-1")).refused == {"ret_code": "1002"}
        assert (await journal.find("R-2")).sent_at.boot == begun[2].leased_until.boot
        assert (await journal.begin(intent("R-1"), now()))[0] is Standing.UNRESOLVED
        assert (await journal.begin(intent("R-2"), now()))[0] is Standing.LEASED


class Machine:
    """The clocks of another machine: another boot, and a wall clock that can be set."""

    def __init__(self, timeline, boot=0.0):
        self._timeline, self.boot, self.wall = timeline, boot, 0.0

    def __call__(self, seconds=0.0):
        at = now()
        return Moment(at.wall + timedelta(seconds=self.wall), at.boot + self.boot, self._timeline).after(seconds)


@pytest.mark.parametrize("step", [-7200, 600, 901, 86_400])
async def test_workers_wall_clocks_do_not_count(workers, step):
    """Leases and the age of moments do not change if a worker's wall clock is set."""
    one, other = Machine("one", 1e6), Machine("other", -1e4)
    async with workers.make(clock=one) as first, workers.make(clock=other) as second:
        await first.begin(intent("R-1", lease=60), one())
        _, entry = await first.begin(intent("R-2"), one())
        one.wall = step
        await first.release(entry, one(-10))
        other.wall = step
        assert (await second.begin(intent("R-1"), other()))[0] is Standing.LEASED
        standing, entry = await second.begin(intent("R-2"), other())
        assert standing is Standing.UNRESOLVED
        assert 9.9 < other().boot - entry.sent_at.boot < 15


async def test_a_jump_of_the_databases_clock_starts_a_new_era(workers):
    """The worker's boot clock shows less elapsed time than the database's clock, so a new era begins for all."""
    steady, young = Machine("steady"), Machine("young")
    async with workers.make(clock=steady) as witness, workers.make(clock=young) as other:
        _, entry = await witness.begin(intent("R-1"), steady())
        await witness.release(entry, steady())
        steady.boot -= 86_400  # a day passes by the database's clock
        assert (await witness.begin(intent("R-2"), steady()))[0] is Standing.QUERY_FIRST
        _, entry = await other.begin(intent("R-1"), young())
        assert young().boot - entry.sent_at.boot < 15
        assert (await witness.begin(intent("R-3"), steady()))[0] is Standing.QUERY_FIRST


@pytest.mark.parametrize("at", ["2026-03-08T06:55:00+00:00", "2026-11-01T05:55:00+00:00"])
async def test_daylight_saving_changes_no_duration(postgres_dsn, schema, administer, at, monkeypatch):
    """The hour changes five minutes after a failover: the grace since then has its full length, and no era begins."""
    monkeypatch.setenv("PGTZ", "America/New_York")
    world = dials.World(f"dials_{uuid4().hex}", postgres_dsn)
    world.advance((datetime.fromisoformat(at) - EPOCH).total_seconds())
    machine = dials.Machine(world, "machine")
    async with PostgresJournal(world.dsn, schema=schema, clock=machine.clock) as journal:
        _, entry = await journal.begin(intent("R-1"), machine.clock())
        await journal.release(entry, machine.clock())
        await administer(FAIL_OVER)
        await journal.begin(intent("R-2"), machine.clock())
        world.advance(600)
        _, entry = await journal.begin(intent("R-1"), machine.clock())
        assert elapsed(entry.sent_at, machine.clock()) == 600
        standing, entry = await journal.begin(intent("R-3"), machine.clock())
        assert (standing, entry.sent_at) == (Standing.QUERY_FIRST, machine.clock())


async def test_a_database_may_have_another_datestyle(make, monkeypatch):
    monkeypatch.setenv("PGDATESTYLE", "German")
    async with make() as journal:
        assert (await journal.begin(intent(), now()))[0] is Standing.NEW


async def test_a_journal_needs_the_clock_of_its_session(workers):
    """A moment of another boot clock raises ``ConfigurationError``: leases could have any length."""
    async with workers.make() as journal:
        with pytest.raises(ConfigurationError, match="must be the clock of the session"):
            await journal.begin(intent(), Machine("elsewhere")())


# ── failures ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_may_lose_commits_is_named_at_opening(make, caplog):
    """The tests' server runs without fsync, for speed: one warning names the setting, and no other."""
    async with make():
        pass
    [message] = [record.getMessage() for record in caplog.records]
    assert "its server runs with fsync = off: a power failure can lose recorded refunds" in message


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_CN"])
async def test_a_database_with_another_encoding_is_refused(postgres_dsn, encoding):
    """Opening raises before a refund is recorded, because such a database cannot store every text of the gateway."""
    name = f"books_{uuid4().hex}"
    create = f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    async with await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as connection:
        await connection.execute(create)
    dsn = psycopg.conninfo.make_conninfo(postgres_dsn, dbname=name)
    with pytest.raises(ConfigurationError, match=f"encoding of its database is {encoding}, .* encoding UTF8"):
        async with PostgresJournal(dsn):
            pass
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        found = await connection.execute(sql.FIND_TABLES, ["lianlian"])
        assert (await found.fetchone())[1:] == (None, None)


async def test_a_journal_ignores_the_encoding_of_the_dsn(postgres_dsn, schema):
    """Chinese text comes back unchanged, although the DSN asks for an encoding without Chinese."""
    dsn = psycopg.conninfo.make_conninfo(postgres_dsn, client_encoding="latin1")
    async with PostgresJournal(dsn, schema=schema) as journal:
        await journal.begin(intent(body="退款".encode()), now())
        assert (await journal.find("R-1")).body == "退款".encode()


async def test_another_version_is_refused_with_advice(make, administer):
    """Tables of another schema version raise an error with that version and a cure."""
    async with make():
        pass
    await administer("UPDATE {schema}.version SET version = 1")
    with pytest.raises(JournalError, match=r"schema version 1, but this release needs 8; resolve its open refunds"):
        async with make():
            pass


async def test_tables_that_a_later_release_has_upgraded_are_refused_at_once(make, administer):
    """A worker of this release that still runs writes nothing into them, because it does not know their rules."""
    async with make() as journal:
        _, entry = await journal.begin(intent(), now())
        await administer("UPDATE {schema}.version SET version = 9")
        for operation in (journal.begin(intent("R-2"), now()), journal.finish(entry, MADE)):
            with pytest.raises(JournalError, match="schema version 9, and this release supports 8 at most; install"):
                await operation
        assert (await journal.find("R-1")).ending is None


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM {schema}.version",
        "INSERT INTO {schema}.version SELECT * FROM {schema}.version",
        "DELETE FROM {schema}.eras",
    ],
)
async def test_a_partial_restore_is_refused_with_advice(make, administer, change):
    """Only the tables were restored, or only the data into tables that another worker had created."""
    async with make():
        pass
    await administer(change)
    with pytest.raises(JournalError, match=r"must have one row, .* drop the schema, then restore"):
        async with make():
            pass


async def test_a_lost_connection_is_replaced(make, administer):
    """If the server ends an idle connection, no caller gets an error."""
    async with make() as journal:
        _, entry = await journal.begin(intent(), now())
        async with journal._pool.connection() as connection:
            process = connection.info.backend_pid
        await administer(f"SELECT pg_terminate_backend({process}, 60000)")
        assert (await journal.begin(intent(), now()))[0] is Standing.LEASED
        assert (await journal.finish(entry, MADE)).ending == MADE


async def test_a_journal_works_again_as_soon_as_its_database_does(postgres_dsn, schema, tmp_path_factory):
    """The pauses between its attempts to connect do not grow with the length of the outage."""
    folder, path = psycopg.conninfo.conninfo_to_dict(postgres_dsn)["host"], tmp_path_factory.mktemp("s") / "s"
    path.symlink_to(folder)
    dsn = psycopg.conninfo.make_conninfo(postgres_dsn, host=str(path), application_name=schema[:40])
    async with PostgresJournal(dsn, schema=schema, timeout=0.6) as journal:
        assert await journal.find("R-1") is None
        path.unlink()
        ended = "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE application_name = {name}"
        # With autocommit, because a transaction sees the connections of its first look at pg_stat_activity.
        async with await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as connection:
            failures = 0
            while failures < 2:  # a connection that was being opened may end only in the second round
                await connection.execute(psycopg.sql.SQL(ended).format(name=schema[:40]))
                try:
                    await journal.find("R-1")
                except JournalError:
                    failures += 1
        path.symlink_to(folder)
        with contextlib.suppress(JournalError):  # on a busy machine
            await journal.find("R-1")
        assert await journal.find("R-1") is None


async def test_a_statement_that_ends_every_connection_fails(make, monkeypatch):
    """It is repeated on as many new connections as the pool has; then ``JournalError`` names the reason."""
    async with make() as journal:
        with monkeypatch.context() as patch:
            ending = "SELECT pg_terminate_backend(pg_backend_pid(), 0) FROM {schema}.version WHERE '' <> ANY(%s)"
            patch.setattr(sql, "FIND", ending)
            with pytest.raises(JournalError, match="terminating connection"):
                await journal.find("R-1")
        assert await journal.find("R-1") is None


async def test_a_transaction_that_exceeds_the_timeout_fails(make, administer):
    """All its callers get ``JournalError``; the next transaction succeeds."""
    blocking, blocked = anyio.Event(), anyio.Event()

    async def block():
        async with make() as other, other._pool.connection() as connection, connection.transaction():
            await connection.execute(other._sql("LOCK TABLE {schema}.refunds"))
            blocking.set()
            await blocked.wait()

    async with make(timeout=0.3) as journal:
        async with anyio.create_task_group() as group:
            group.start_soon(block)
            await blocking.wait()
            with pytest.raises(JournalError, match=r"no answer within 0\.3 s"):
                await journal.begin(intent(), now())
            with pytest.raises(JournalError, match=r"no answer within 0\.3 s"):
                await journal.counts()
            blocked.set()
        assert (await journal.begin(intent(), now()))[0] is Standing.NEW


async def test_the_error_for_an_unreachable_database_has_no_password(tmp_path):
    """``JournalError`` names the database and the reason, without the password."""
    journal = PostgresJournal(f"postgresql://clerk:s3cret@/books?host={tmp_path}")
    with pytest.raises(JournalError, match=f"journal lianlian in books at {tmp_path}: .*No such file") as caught:
        async with journal:
            pass
    assert "s3cret" not in str(caught.value) + repr(caught.value.__cause__) + repr(journal)


@pytest.mark.parametrize("dsn", ["s3cret", "postgresql://clerk:s3cret@[::1/books", "password=s3cret books"])
async def test_an_invalid_dsn_is_not_shown(dsn):
    """An invalid connection string raises ``ConfigurationError``, which shows no part of it."""
    with pytest.raises(ConfigurationError, match="dsn: must be a PostgreSQL connection string") as caught:
        PostgresJournal(dsn)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("dsn", "kind", "seconds"),
    [
        ("host=a,b", "read-write", "5"),
        ("postgresql://a:1,b:2,c:3,d,e,f/books", "read-write", "2"),
        ("host=a,b target_session_attrs=any connect_timeout=7", "any", "7"),
        ("host=a", None, "10"),
        ("", None, "10"),
    ],
)
async def test_of_several_hosts_the_one_that_accepts_writes_is_used(dsn, kind, seconds):
    """After a failover, the first host may be a standby, or not answer. A DSN may say otherwise."""
    found = psycopg.conninfo.conninfo_to_dict(connection_string(dsn, 10.0))
    assert (found.get("target_session_attrs"), found["connect_timeout"]) == (kind, seconds)


async def test_a_host_that_does_not_answer_is_passed_over(postgres_dsn, schema):
    """As after a failover because of a power failure: nobody refuses the connection."""
    folder = psycopg.conninfo.conninfo_to_dict(postgres_dsn)["host"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dsn = f"host=127.0.0.1,{folder} port={silent.getsockname()[1]},5432 user=postgres dbname=postgres"
        async with PostgresJournal(dsn, schema=schema, timeout=5.0) as journal:
            assert (await journal.begin(intent(), now()))[0] is Standing.NEW


@pytest.mark.parametrize("password", ["part/s3cret", "part@s3cret", "part@x/s3cret", "part?@s3cret", "1/s3cret"])
async def test_a_password_that_is_not_encoded_is_refused_and_not_shown(password):
    """A part of it would be the host or the database's name for libpq, and errors show those."""
    with pytest.raises(ConfigurationError, match="write each @ as %40") as caught:
        PostgresJournal(f"postgresql://clerk:{password}@db/books")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "dsn", ["postgres://clerk:s?3@/b?host=/tmp/a@b", "host=@b user=a@b", "postgres://c:%40%2F@h/b"]
)
async def test_an_unambiguous_dsn_is_accepted(dsn):
    """An ``@`` in a parameter, or an encoded one."""
    assert repr(PostgresJournal(dsn)).startswith("<PostgresJournal lianlian in ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dsn": None}, "dsn: must be of type str, not NoneType"),
        ({"schema": 5}, "schema: must be of type str, not int"),
        ({"schema": ""}, "schema: must have 1 to 57 bytes, and no %; is ''"),
        ({"schema": "100 %"}, "schema: must have 1 to 57 bytes, and no %; is '100 %'"),
        ({"schema": "退" * 20}, "schema: must have 1 to 57 bytes"),
        ({"timeout": "10"}, "timeout: must be a number of seconds greater than 0 and at most 86400, is '10'"),
        ({"timeout": 0}, "timeout: must be a number of seconds greater than 0"),
        ({"timeout": math.inf}, "timeout: must be a number of seconds greater than 0 and at most 86400, is inf"),
    ],
)
async def test_invalid_settings_are_refused(settings, words):
    """The error names the setting, the accepted values and the given value."""
    with pytest.raises(ConfigurationError, match=words):
        PostgresJournal(**{"dsn": "postgresql://clerk@/books"} | settings)


async def test_the_longest_schema_has_an_inbox(postgres_dsn):
    """PostgreSQL cuts a longer name off, so the inbox would have the tables of another schema."""
    async with PostgresJournal(postgres_dsn, schema=uuid4().hex + "x" * 25) as journal:
        assert (await journal.inbox()).id != journal.id


async def test_a_forked_child_is_refused(make, monkeypatch):
    """In another process every method of an open journal raises."""
    async with make() as journal:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(os, "getpid", lambda: -1)
            for verb in (journal.find("R-1"), journal.counts(), anext(journal.pending())):
                with pytest.raises(JournalError, match="open the journal after the fork"):
                    await verb
        assert await journal.find("R-1") is None


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_is_refused(make):
    """On trio, which psycopg does not support, opening raises ``ConfigurationError``."""
    with pytest.raises(ConfigurationError, match="asyncio only"):
        async with make():
            pass
