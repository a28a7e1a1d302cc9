"""Journals of every released version of the schema: they are opened, used, and upgraded in place."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import anyio
import psycopg
import psycopg.sql
import pytest

from lianlian_async.errors import JournalError
from lianlian_async.journal import (
    SqliteJournal,
    SqliteReader,
    Standing,
    State,
    postgres,
    postgres_rows,
    sqlite_schema,
)
from lianlian_async.journal.base import Fact, facts
from lianlian_async.journal.postgres import PostgresJournal
from tests.support.journals import MADE, intent, now

pytestmark = pytest.mark.anyio

SCHEMAS = Path(__file__).with_name("schemas")
ADD_COLUMN = "ALTER TABLE {schema}.refunds ADD COLUMN note text; UPDATE {schema}.refunds SET note = 'upgraded'"
FAILING = ADD_COLUMN + "; SELECT no_such_column FROM {schema}.refunds"


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Sqlite:
    """A released SqliteJournal."""

    def __init__(self, release, folder):
        self.path = folder / "journal.sqlite"
        with closing(sqlite3.connect(self.path)) as connection:
            connection.executescript((SCHEMAS / f"{release}.sqlite.sql").read_text("utf-8"))

    def make(self):
        return SqliteJournal(self.path)

    def next_release(self, patch, step):
        version = self.read("PRAGMA user_version")
        patch.setattr(sqlite_schema, "SCHEMA_VERSION", version + 1)
        patch.setitem(sqlite_schema.UPGRADES, version, step.replace("{schema}", "main"))
        return version

    def read(self, statement):
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(statement.format(schema="main")).fetchone()[0]

    def version(self):
        return self.read("PRAGMA user_version")


class Postgres:
    """A released PostgresJournal."""

    def __init__(self, release, dsn):
        self.dsn = dsn
        with psycopg.connect(dsn) as connection:
            connection.execute((SCHEMAS / f"{release}.postgres.sql").read_text("utf-8"))

    def make(self):
        return PostgresJournal(self.dsn, schema="released")

    def next_release(self, patch, step):
        version = self.version()
        patch.setattr(postgres, "SCHEMA_VERSION", version + 1)
        patch.setitem(postgres_rows.UPGRADES, version, step)
        return version

    def read(self, statement):
        with psycopg.connect(self.dsn) as connection:
            return connection.execute(statement.format(schema="released")).fetchone()[0]

    def version(self):
        return self.read("SELECT version FROM {schema}.version")


@pytest.fixture(params=["sqlite", "postgres"])
def released(request, tmp_path):
    """A journal of release 0.1.0."""
    if request.param == "sqlite":
        return Sqlite("0.1.0", tmp_path)
    return Postgres("0.1.0", request.getfixturevalue("database"))


async def check_entries(journal):
    """Check all entries of a released journal, then use it."""
    states = {entry.no_refund: entry.state async for entry in journal.entries()}
    assert states == {
        "R-unknown": State.UNRESOLVED,
        "R-accepted": State.ACCEPTED,
        "R-made": State.FINAL,
        "R-rejected": State.REJECTED,
    }
    unknown = await journal.find("R-unknown")
    assert unknown.body == b'{"no_refund":"R-unknown"}'
    assert unknown.refused["ret_code"] == "1002"
    assert facts(unknown.history) == [Fact(1795680000, 1, "begun", "")]
    assert journal.owner.oid_partner == "201103171000000000"
    standing, entry = await journal.begin(intent("R-new"), now())
    assert standing in (Standing.NEW, Standing.QUERY_FIRST)  # PostgreSQL sees another incarnation of the database
    assert (await journal.finish(entry, MADE)).state is State.FINAL
    await journal.acted("R-made", now())
    assert (await journal.find("R-made")).state is State.DONE


async def test_a_released_journal_can_be_used(released):
    """This release reads and writes a journal of each released version."""
    async with released.make() as journal:
        await check_entries(journal)


async def test_a_new_journal_has_the_released_tables(released, tmp_path):
    """A change of the tables needs a new schema version, and a step that upgrades the released tables."""
    if isinstance(released, Sqlite):
        async with SqliteJournal(tmp_path / "new"):
            pass
        tables = []
        for path in (released.path, tmp_path / "new"):
            with closing(sqlite3.connect(path)) as connection:
                tables.append(connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall())
    else:
        async with PostgresJournal(released.dsn, schema="new"):
            pass
        column = "concat(table_name, column_name, data_type, collation_name)"
        columns = f"SELECT string_agg({column}, ' ' ORDER BY table_name, ordinal_position)"
        where = "FROM information_schema.columns WHERE table_schema ="
        tables = [released.read(f"{columns} {where} '{schema}'") for schema in ("released", "new")]
    assert tables[0] == tables[1]


async def test_a_step_upgrades_a_released_journal(released, monkeypatch):
    """A newer release upgrades the tables once, and all entries stay."""
    version = released.next_release(monkeypatch, ADD_COLUMN)
    async with released.make():
        pass
    async with released.make() as journal:
        await check_entries(journal)
    assert released.version() == version + 1
    assert released.read("SELECT count(*) FROM {schema}.refunds WHERE note = 'upgraded'") == 4


async def test_a_failed_upgrade_changes_nothing(released, monkeypatch):
    """If a step fails, the journal stays as it was, and the older release still uses it."""
    with monkeypatch.context() as newer:
        version = released.next_release(newer, FAILING)
        with pytest.raises(JournalError, match="no_such_column"):
            async with released.make():
                pass
    assert released.version() == version
    async with released.make() as journal:
        await check_entries(journal)


async def test_concurrent_workers_upgrade_once(released, monkeypatch):
    """Workers that open the tables at the same time upgrade them once: a second ``ADD COLUMN`` would fail."""
    if isinstance(released, Sqlite):
        pytest.skip("one process at a time opens a journal file")
    released.next_release(monkeypatch, ADD_COLUMN)

    async def open_one():
        async with released.make():
            pass

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(open_one)


async def test_a_reader_does_not_upgrade_a_file(tmp_path, monkeypatch):
    """Reading changes nothing: the error names a command that upgrades the file."""
    released = Sqlite("0.1.0", tmp_path)
    version = released.next_release(monkeypatch, ADD_COLUMN)
    with pytest.raises(JournalError, match="older release created it; `lianlian journal resume` upgrades it"):
        async with SqliteReader(released.path):
            pass
    assert released.version() == version
