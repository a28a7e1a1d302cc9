"""The PostgreSQL journal: workers that share it, workers that die, and a database that is not there."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from uuid import uuid4

import anyio
import psycopg
import pytest
from journals import MADE, REJECTED, intent, now

from lianlian_async import ConfigurationError
from lianlian_async.errors import JournalError
from lianlian_async.journal import Standing, State
from lianlian_async.journal.postgres import PostgresJournal

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio"])
def anyio_backend(request):
    return request.param


@pytest.fixture
def schema():
    return f"Merchant's {uuid4().hex}"


@pytest.fixture
def make(postgres_dsn, schema):
    """Journals of as many workers as wanted, all on the same refunds."""
    return lambda **options: PostgresJournal(postgres_dsn, schema=schema, **options)


@pytest.fixture
def administer(postgres_dsn, schema):
    """Does something to the database behind the journal's back."""

    async def execute(statement):
        async with await psycopg.AsyncConnection.connect(postgres_dsn, autocommit=True) as connection:
            await connection.execute(psycopg.sql.SQL(statement).format(schema=psycopg.sql.Identifier(schema)))

    return execute


# ── many workers ─────────────────────────────────────────────────────────────────────────────────


async def test_two_workers_never_hold_the_same_refund(make):
    """Of two workers that intend the same refunds in opposite order, for each refund one gets NEW, the other HELD."""
    found = {}

    async def one(journal, number):
        found.setdefault(number, []).append((await journal.intend(intent(f"R-{number}"), now()))[0])

    async with make() as first, make() as second, anyio.create_task_group() as group:
        for number in range(1000):
            group.start_soon(one, first, number)
            group.start_soon(one, second, 999 - number)
    assert {number: sorted(standings) for number, standings in found.items()} == {
        number: [Standing.HELD, Standing.NEW] for number in range(1000)
    }


async def test_a_dead_worker_loses_its_lease(make):
    """What a worker held when it ended is HELD until its time is over, then UNSETTLED for another worker."""
    async with make() as dead:
        await dead.intend(intent("R-1", lease=0.2), now())
        await dead.intend(intent("R-2"), now())
    async with make() as heir:
        standings = []
        while Standing.UNSETTLED not in standings:
            standing, entry = await heir.intend(intent("R-1"), now())
            standings.append(standing)
        assert set(standings) <= {Standing.HELD, Standing.UNSETTLED}
        assert entry.sent_at.boot <= now().boot
        assert (await heir.intend(intent("R-2"), now()))[0] is Standing.HELD


async def test_a_worker_that_lost_its_lease_reports_in_vain_but_for_an_ending(make):
    """Its release does nothing to the heir's hold; its ending, being first, counts."""
    async with make() as late, make() as heir:
        _, lost = await late.intend(intent(lease=0), now())
        _, held = await heir.intend(intent(), now())
        await late.release(lost, None)
        assert (await late.intend(intent(), now()))[0] is Standing.HELD
        await late.settle(lost, MADE)
        assert (await heir.settle(held, REJECTED)).ending == MADE
        await heir.release(held, None)
        assert (await late.intend(intent(), now()))[0] is Standing.SETTLED


async def test_many_workers_may_make_the_tables_at_once(make, postgres_dsn):
    """Ten workers that open a journal which is not there yet all find it, and another schema is another journal."""
    async with AsyncExitStack() as stack:
        workers = [make() for _ in range(10)]
        async with anyio.create_task_group() as group:
            for worker in workers:
                group.start_soon(stack.enter_async_context, worker)
        await workers[0].intend(intent(), now())
        assert (await workers[9].counts())[State.UNSETTLED] == 1
        async with PostgresJournal(postgres_dsn, schema=uuid4().hex) as other:
            assert (await other.counts())[State.UNSETTLED] == 0


async def test_a_worker_that_may_not_make_tables_uses_those_that_are_there(make, administer, postgres_dsn, schema):
    """Once the tables are made, the rights to read and write them are enough."""
    async with make():
        pass
    role = f"worker {uuid4().hex}"
    await administer(
        f'CREATE ROLE "{role}" LOGIN; GRANT USAGE ON SCHEMA {{schema}} TO "{role}";'
        f'GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {{schema}} TO "{role}"'
    )
    async with PostgresJournal(psycopg.conninfo.make_conninfo(postgres_dsn, user=role), schema=schema) as journal:
        _, entry = await journal.intend(intent(), now())
        assert (await journal.settle(entry, MADE)).ending == MADE
    with pytest.raises(JournalError, match="permission denied"):
        async with PostgresJournal(psycopg.conninfo.make_conninfo(postgres_dsn, user=role), schema="another"):
            pass


async def test_a_database_may_isolate_more_than_is_needed(make, administer, postgres_dsn, schema):
    """Workers whose role has another isolation level by default share refunds as all others do."""
    role = f"strict {uuid4().hex}"
    await administer(
        f'CREATE ROLE "{role}" LOGIN SUPERUSER; ALTER ROLE "{role}" SET default_transaction_isolation = serializable'
    )
    found = []

    async def one(journal, number):
        found.append((await journal.intend(intent(f"R-{number}"), now()))[0])

    dsn = psycopg.conninfo.make_conninfo(postgres_dsn, user=role)
    workers = [PostgresJournal(dsn, schema=schema) for _ in range(2)]
    async with workers[0], workers[1], anyio.create_task_group() as group:
        for number in range(1000):
            group.start_soon(one, workers[0], number)
            group.start_soon(one, workers[1], 999 - number)
    assert sorted(found) == [Standing.HELD] * 1000 + [Standing.NEW] * 1000


# ── what may befall it ───────────────────────────────────────────────────────────────────────────


async def test_another_version_is_refused_with_advice(make, administer):
    """Tables of a version that is not ours raise, say which, and what to do."""
    async with make():
        pass
    await administer("UPDATE {schema}.version SET version = 1")
    with pytest.raises(JournalError, match=r"of version 1, and this is a library for version 2; finish it"):
        async with make():
            pass


async def test_a_lost_connection_is_replaced(make, administer):
    """When the server ends its connections, the journal goes on with new ones."""
    async with make() as journal:
        _, entry = await journal.intend(intent(), now())
        async with journal._pool.connection() as connection:
            process = connection.info.backend_pid
        await administer(f"SELECT pg_terminate_backend({process}, 60000)")
        assert (await journal.intend(intent(), now()))[0] is Standing.HELD
        assert (await journal.settle(entry, MADE)).ending == MADE


async def test_a_database_that_does_not_answer_fails_in_time(make, administer):
    """Where a transaction takes longer than ``timeout``, everyone in it gets ``JournalError``; then it goes on."""
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
                await journal.intend(intent(), now())
            with pytest.raises(JournalError, match=r"no answer within 0\.3 s"):
                await journal.counts()
            blocked.set()
        assert (await journal.intend(intent(), now()))[0] is Standing.NEW


async def test_a_database_that_is_not_there_is_named_without_the_password(tmp_path):
    """A database that cannot be reached raises ``JournalError``: which it was, and why, and no password."""
    journal = PostgresJournal(f"postgresql://clerk:s3cret@/books?host={tmp_path}")
    with pytest.raises(JournalError, match=f"journal lianlian in books at {tmp_path}: .*No such file") as caught:
        async with journal:
            pass
    assert "s3cret" not in str(caught.value) + repr(caught.value.__cause__) + repr(journal)


@pytest.mark.parametrize("dsn", ["s3cret", "postgresql://clerk:s3cret@[::1/books", "password=s3cret books"])
async def test_a_dsn_that_is_none_is_not_repeated(dsn):
    """A connection string that cannot be read raises ``ConfigurationError``, in which none of it is shown."""
    with pytest.raises(ConfigurationError, match="dsn: not a PostgreSQL connection string") as caught:
        PostgresJournal(dsn)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None


async def test_a_forked_child_is_refused(make, monkeypatch):
    """Seen from any other process, an open journal raises in every verb."""
    async with make() as journal:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(os, "getpid", lambda: -1)
            for verb in (journal.find("R-1"), journal.counts(), anext(journal.pending())):
                with pytest.raises(JournalError, match="open journals after forking"):
                    await verb
        assert await journal.find("R-1") is None


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_is_refused(make):
    """On trio, which psycopg does not know, opening it raises ``ConfigurationError``."""
    with pytest.raises(ConfigurationError, match="asyncio only"):
        async with make():
            pass
