"""The shared journal: one PostgreSQL database for many workers on many machines (extra ``postgres``, asyncio only).

A hold is a lease: it stands in the row, by the database's clock, and is over when its time is, whatever became
of the worker that took it. Every batch locks its rows in the same order: workers wait for each other, but never
in a circle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, timedelta
from typing import Any, Final, LiteralString

import anyio
from psycopg import AsyncConnection, Error, IsolationLevel, ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg.sql import SQL, Composed, Identifier
from psycopg_pool import AsyncConnectionPool

from lianlian_async.errors import ConfigurationError

from .base import Ending, Entry, JournalError, State
from .group import GroupedJournal
from .operations import Answer, Begin, Look, Operation, perform

__all__ = ["PostgresJournal"]

SCHEMA_VERSION: Final = 1

_FIND_VERSION: Final = "SELECT FROM pg_tables WHERE schemaname = %s AND tablename = 'version'"
_READ_VERSION: Final = "SELECT version FROM {schema}.version"
_CREATE: Final = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE {schema}.refunds (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    no_refund text NOT NULL UNIQUE,
    digest text NOT NULL,
    fields json NOT NULL,
    body text NOT NULL,
    state text NOT NULL,
    record json,
    sent_at timestamptz,
    holder text
);
CREATE INDEX pending ON {schema}.refunds (id) WHERE state IN ('unsettled', 'accepted');
CREATE TABLE {schema}.version AS SELECT 1 AS version;
"""
_INSERT: Final = """
INSERT INTO {schema}.refunds (no_refund, digest, fields, body, state)
SELECT no_refund, digest, fields, body, 'unsettled'
FROM json_to_recordset(%s) AS new (no_refund text, digest text, fields json, body text)
ORDER BY no_refund ON CONFLICT (no_refund) DO NOTHING
"""
_FIND: Final = "SELECT * FROM {schema}.refunds WHERE no_refund = ANY(%s)"
_LOCK: Final = """
SELECT *, clock_timestamp() AS now FROM {schema}.refunds WHERE no_refund = ANY(%s) ORDER BY no_refund FOR UPDATE
"""
_UPDATE: Final = """
UPDATE {schema}.refunds AS refund
SET fields = new.fields, body = new.body, state = new.state, record = new.record, sent_at = new.sent_at,
    holder = new.holder
FROM json_to_recordset(%s) AS new (
    no_refund text, fields json, body text, state text, record json, sent_at timestamptz, holder text
)
WHERE refund.no_refund = new.no_refund
"""
_PENDING: Final = """
SELECT * FROM {schema}.refunds WHERE state IN ('unsettled', 'accepted') AND id > %s AND id <= %s ORDER BY id LIMIT %s
"""
_ENTRIES: Final = "SELECT * FROM {schema}.refunds WHERE id > %s AND id <= %s ORDER BY id LIMIT %s"
_LAST: Final = "SELECT coalesce(max(id), 0) AS id FROM {schema}.refunds"
_COUNT: Final = "SELECT state, count(*) FROM {schema}.refunds GROUP BY state"

_PAGE: Final = 500


class PostgresJournal(GroupedJournal):
    """A :class:`~lianlian_async.journal.Journal` in the PostgreSQL database that ``dsn`` names.

    Its tables live in ``schema``, which is made if it is not there, those of its inbox, if it ever has one, in
    ``…_inbox``; several journals in one database take several schemas. Two workers never hold one refund at the
    same time. Clocks of workers need not agree: holds travel as durations. The moments in entries are by the clock
    of the worker that reads them.

    ``timeout`` is how many seconds the database may take for one transaction, connecting included. What the
    database calls committed has to be durable: leave its ``synchronous_commit`` on.
    """

    def __init__(self, dsn: str, *, schema: str = "lianlian", timeout: float = 10.0) -> None:
        try:
            database = conninfo_to_dict(dsn)
        except ProgrammingError:  # whose text would show the password
            raise ConfigurationError("dsn: not a PostgreSQL connection string or URL") from None
        super().__init__(f"{schema} in {database.get('dbname')} at {database.get('host')}")
        self._dsn = dsn
        self._schema = schema
        self._timeout = timeout
        self._ahead = timedelta(0)
        """How far the database's clock is ahead of ours, and of the time that the last batch took to arrive."""

    def pending(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.pending`. What is begun later is not among them."""
        return self._walk(_PENDING)

    def entries(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.entries`."""
        return self._walk(_ENTRIES)

    async def _walk(self, page_of: LiteralString) -> AsyncGenerator[Entry]:
        [newest] = await self._fetch(_LAST)
        place = 0
        while page := await self._fetch(page_of, place, newest["id"], _PAGE):
            for row in page:
                yield self._entry(row)
            place = page[-1]["id"]

    async def counts(self) -> Mapping[State, int]:
        """See :meth:`Journal.counts`."""
        return dict.fromkeys(State, 0) | {State(row["state"]): row["count"] for row in await self._fetch(_COUNT)}

    def _beside(self) -> PostgresJournal:
        return PostgresJournal(self._dsn, schema=f"{self._schema}_inbox", timeout=self._timeout)

    async def _open(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "PostgresJournal runs on asyncio only: psycopg knows no other event loop"
            ) from None
        # Not through the pool: that would wait and try again, and never tell what is wrong.
        with self._errors():
            async with await AsyncConnection.connect(self._dsn) as connection:
                await self._prepare(connection)
        self._pool = AsyncConnectionPool(
            self._dsn,
            connection_class=AsyncConnection[DictRow],
            open=False,
            min_size=1,
            max_size=2,
            configure=_read_what_is_committed,
            check=AsyncConnectionPool.check_connection,
            # Connection poolers in between may not keep prepared statements apart.
            kwargs={"autocommit": True, "prepare_threshold": None, "row_factory": dict_row},
        )
        await self._pool.open()

    async def _prepare(self, connection: AsyncConnection) -> None:
        """Make the tables if they are not there; one worker at a time."""
        await _read_what_is_committed(connection)
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"journal {self._schema}"])
        found = await connection.execute(_FIND_VERSION, [self._schema])
        if not found.rowcount:
            await connection.execute(self._sql(_CREATE))
        [(version,)] = await (await connection.execute(self._sql(_READ_VERSION))).fetchall()
        if version != SCHEMA_VERSION:
            raise JournalError(
                f"journal {self._name}: of version {version}, and this is a library for version {SCHEMA_VERSION}; "
                "finish it with the lianlian-async that began it, or name another schema"
            )

    async def _close(self) -> None:
        await self._pool.close()

    async def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[Answer]:
        numbers = list({operation.no_refund for operation in operations})
        if all(isinstance(operation, Look) for operation in operations):
            rows = await self._select(_FIND, numbers)  # nothing changes, so there is nothing to lock
            return perform(operations, {row["no_refund"]: self._entry(row) for row in rows})
        begins = [operation for operation in operations if isinstance(operation, Begin)]
        async with self._connected() as connection, connection.transaction():
            if begins:
                # Known as certainly not sent, until the rules decide: so that there is a row to lock.
                await connection.execute(self._sql(_INSERT), [self._rows(begin.begun() for begin in begins)])
            rows = await (await connection.execute(self._sql(_LOCK), [numbers])).fetchall()
            if begins:
                self._ahead = rows[0]["now"] - max(begin.now for begin in begins)
            before = {row["no_refund"]: self._entry(row) for row in rows}
            after = before.copy()
            answers = perform(operations, after)
            changed = [entry for number, entry in after.items() if entry is not before[number]]
            if changed:
                await connection.execute(self._sql(_UPDATE), [self._rows(changed)])
        return answers

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────

    def _entry(self, row: Mapping[str, Any]) -> Entry:
        return Entry(
            no_refund=row["no_refund"],
            digest=row["digest"],
            fields=row["fields"],
            body=row["body"].encode(),
            sent_at=row["sent_at"] and row["sent_at"].astimezone(UTC) - self._ahead,
            ending=row["record"] and Ending(state=State(row["state"]), record=row["record"]),
            holder=row["holder"],
        )

    def _rows(self, entries: Iterable[Entry]) -> str:
        """As one JSON array: one statement for any number of rows."""
        rows = [
            {
                "no_refund": entry.no_refund,
                "digest": entry.digest,
                "fields": dict(entry.fields),
                "body": entry.body.decode(),
                "state": entry.state,
                "record": entry.ending and dict(entry.ending.record),
                "sent_at": entry.sent_at and (entry.sent_at + self._ahead).isoformat(),
                "holder": entry.holder,
            }
            for entry in entries
        ]
        return json.dumps(rows)

    async def _fetch(self, statement: LiteralString, *parameters: Any) -> list[dict[str, Any]]:
        self._opened()
        return await self._select(statement, *parameters)

    async def _select(self, statement: LiteralString, *parameters: Any) -> list[dict[str, Any]]:
        async with self._connected() as connection:
            return await (await connection.execute(self._sql(statement), parameters)).fetchall()

    def _sql(self, statement: LiteralString) -> Composed:
        return SQL(statement).format(schema=Identifier(self._schema))

    # ── what can go wrong ────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _connected(self) -> AsyncGenerator[AsyncConnection[DictRow]]:
        with self._errors():
            async with self._pool.connection() as connection:
                yield connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with anyio.fail_after(self._timeout):
                yield
        except (Error, OSError) as error:
            reason = str(error).strip() or f"no answer within {self._timeout} s"
            raise JournalError(f"journal {self._name}: {reason}") from error


async def _read_what_is_committed(connection: AsyncConnection[Any]) -> None:
    """Whatever the database's default is: who has waited for another has to see what that one wrote."""
    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
