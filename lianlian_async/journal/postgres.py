"""The shared journal: one PostgreSQL database for many workers on many machines (extra ``postgres``, asyncio only).

A lease is stored in its refund's row and ends by time, also when its worker has died. No batch waits for a row that
another transaction has locked, as a dead worker behind a half-open connection may for long: locked rows are skipped,
and their operations are retried in a task of their own. All workers insert new rows in the same order, which prevents
deadlocks. ``postgres_moments`` relates the database's clock to the workers' clocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, LiteralString

import anyio
import attrs
from psycopg import AsyncConnection, Error, IsolationLevel, ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import LockNotAvailable
from psycopg.rows import DictRow, dict_row
from psycopg.sql import SQL, Composed, Identifier
from psycopg_pool import AsyncConnectionPool

from lianlian_async.background import BackgroundTask
from lianlian_async.clock import Clock, Moment, system_clock
from lianlian_async.errors import ConfigurationError
from lianlian_async.secret import Secret, drop_secrets, without_locals
from lianlian_async.settings import check_type, is_number, positive_seconds

from . import postgres_rows as sql
from .base import Entry, Intent, JournalError, Owner, Standing, State
from .group_commit import GroupCommitJournal, Queued
from .operations import Begin, Find, Operation, Result, TakeBack, perform
from .postgres_moments import Reading
from .postgres_rows import entry_of, owner_of, rows_of

__all__ = ["PostgresJournal", "connection_string"]

SCHEMA_VERSION: Final = 4

_PAGE: Final = 500
_SHORTEST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0


class _BusyError(Exception):
    """Another transaction is inserting one of these refunds."""


@without_locals
def connection_string(dsn: str, timeout: float) -> str:
    """Return ``dsn`` with keepalives and ``tcp_user_timeout``, so that a half-open connection ends; its own win.

    Raises ``ConfigurationError``.
    """
    try:
        given = conninfo_to_dict(dsn)
    except ProgrammingError:  # its text would show the password
        raise ConfigurationError("dsn: not a PostgreSQL connection string or URL") from None
    alive: dict[str, Any] = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    return make_conninfo(**(alive | {"tcp_user_timeout": round(timeout * 1000)} | given))


class PostgresJournal(GroupCommitJournal):
    """A :class:`~lianlian_async.journal.Journal` in the PostgreSQL database ``dsn``, shared by many workers.

    Its tables are in ``schema``, which is created if it is missing; those of its inbox, if it has one, in ``…_inbox``.
    Several journals in one database need several schemas. Workers' wall clocks need not agree and may be set: only the
    database's clock and the boot clocks count.

    *After a crash:* a call returns only after its commit is on disk, also if the database has ``synchronous_commit``
    off. Workers may die at any moment: their leases end, and the next worker asks the gateway first.

    *After a failover or a restore:* a standby or a backup may lack the last commits. When the journal sees another
    incarnation of the database, ``not_found_grace`` (see ``RetryPolicy``) starts again for all earlier refunds, and
    new refunds are asked about before they are sent: for ``not_found_grace`` seconds every one, later those whose
    ``dt_refund`` is older than that. The gateway's answers are written again if their rows are lost. One risk remains:
    a request that is under way during the failover, on a lease that was lost, may arrive after another worker was told
    "no such record". Synchronous replication prevents it. Stop all workers before you restore a backup.

    Args:
        dsn: a connection string or URL of libpq.
        schema: the tables' schema.
        timeout: seconds for one transaction, connecting included.
        not_found_grace: seconds, as in the workers' ``RetryPolicy``; 0 never asks about new refunds.
        clock: the session's clock.
    """

    @without_locals
    def __init__(
        self,
        dsn: str,
        *,
        schema: str = "lianlian",
        timeout: float = 10.0,
        not_found_grace: float = 900.0,
        clock: Clock = system_clock,
    ) -> None:
        positive_seconds("timeout", timeout)
        if not is_number(not_found_grace) or not not_found_grace >= 0:
            raise ConfigurationError(f"not_found_grace: must be a number of at least 0, is {not_found_grace!r}")
        check_type("dsn", dsn, str)
        check_type("schema", schema, str)
        self._dsn = Secret(connection_string(dsn, timeout))
        database = conninfo_to_dict(self._dsn.reveal())
        super().__init__(f"{schema} in {database.get('dbname')} at {database.get('host')}")
        self._schema = schema
        self._timeout = timeout
        self._grace = not_found_grace
        self._clock = clock
        self._is_acting = False
        self._retries = set[BackgroundTask]()
        # A transaction that is idle for half of the timeout belongs to a dead worker.
        self._options = {"timeout": f"{timeout * 1000:.0f}ms", "idle": f"{max(1000, timeout * 500):.0f}ms"}

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        if now.timeline != self._clock().timeline:
            raise ConfigurationError("PostgresJournal: give it the clock of its session, PostgresJournal(…, clock=…)")
        return await super().begin(intent, now)

    def pending(self) -> AsyncIterator[Entry]:
        return self._walk(sql.PENDING)

    def unresolved(self) -> AsyncIterator[Entry]:
        """Every entry that is UNRESOLVED, oldest first; in bounded memory."""
        return self._walk(sql.UNRESOLVED)

    def entries(self) -> AsyncIterator[Entry]:
        return self._walk(sql.ENTRIES)

    async def _walk(self, page_of: LiteralString) -> AsyncGenerator[Entry]:
        [newest] = await self._fetch(sql.LAST)
        place = 0
        while page := await self._fetch(page_of, place, newest["id"], _PAGE):
            for row in page:
                yield entry_of(row, self._reading)
            place = page[-1]["id"]

    async def latest_made(self) -> Entry | None:
        return next((entry_of(row, self._reading) for row in await self._fetch(sql.LATEST_MADE)), None)

    async def counts(self) -> Mapping[State, int]:
        return dict.fromkeys(State, 0) | {State(row["state"]): row["count"] for row in await self._fetch(sql.COUNT)}

    # ── opening and closing ────────────────────────────────────────────────────────────────────────

    def _beside(self) -> PostgresJournal:
        # Nothing is sent for the entries of an inbox, so it never has to ask first.
        return PostgresJournal(
            self._dsn.reveal(),
            schema=f"{self._schema}_inbox",
            timeout=self._timeout,
            not_found_grace=0,
            clock=self._clock,
        )

    async def _open(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError("PostgresJournal runs on asyncio only, as psycopg does") from None
        # Not from the pool, which would retry without raising the error.
        with self._errors():
            async with await AsyncConnection.connect(self._dsn.reveal(), row_factory=dict_row) as connection:
                await self._prepare(connection)
        self._pool = AsyncConnectionPool(
            self._dsn.reveal,  # the function, so that the pool holds no password
            connection_class=AsyncConnection[DictRow],
            open=False,
            min_size=1,
            max_size=4,
            configure=_set_isolation,
            check=AsyncConnectionPool.check_connection,
            # A connection pooler in between may mix up prepared statements.
            kwargs={"autocommit": True, "prepare_threshold": None, "row_factory": dict_row},
        )
        await self._pool.open()

    async def _prepare(self, connection: AsyncConnection[DictRow]) -> None:
        """Create the tables if they are missing; one worker at a time."""
        await _set_isolation(connection)
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"journal {self._schema}"])
        found = await connection.execute(sql.FIND_VERSION, [self._schema])
        if not found.rowcount:
            await connection.execute(self._sql(sql.CREATE))
        [row] = await (await connection.execute(self._sql(sql.READ_VERSION))).fetchall()
        if (version := row["version"]) != SCHEMA_VERSION:
            raise JournalError(
                f"journal {self._name}: schema version {version}, but this release needs {SCHEMA_VERSION}; "
                "complete it with the release that created it"
            )
        self._id, self.owner = row["id"], owner_of(row)
        self._reading = await self._read_clock(connection)

    async def _bind(self, owner: Owner) -> None:
        async with self._connected() as connection:
            await connection.execute(self._sql(sql.BIND), [owner.oid_partner, owner.apply_url])
            [row] = await (await connection.execute(self._sql(sql.READ_VERSION))).fetchall()
        owner.confirm(owner_of(row), self._name)

    async def begin_acting(self) -> None:
        [row] = await self._fetch(sql.READ_VERSION)
        if not row["is_acting"]:
            async with self._connected() as connection, connection.transaction():
                await self._read_clock(connection)
                for statement in sql.BEGIN_ACTING:
                    await connection.execute(self._sql(statement))
        self._is_acting = True  # also if a failover loses that commit

    async def _close(self) -> None:
        while self._retries:
            await next(iter(self._retries)).join()
        await self._pool.close()

    # ── batches ──────────────────────────────────────────────────────────────────────────────────

    async def _write(self, batch: Sequence[Queued]) -> None:
        finds = [queued for queued in batch if isinstance(queued.operation, Find)]
        if finds:
            operations = [queued.operation for queued in finds]
            rows = await self._select(sql.FIND, [operation.no_refund for operation in operations])
            entries = {row["no_refund"]: entry_of(row, self._reading) for row in rows}
            for queued, result in zip(finds, perform(operations, entries), strict=True):
                queued.result = result
        writes = [queued for queued in batch if not isinstance(queued.operation, Find)]
        if writes:
            await self._carry_out(writes, anyio.current_time() + self._timeout)

    async def _carry_out(self, batch: Sequence[Queued], until: float, pause: float = 0.0) -> None:
        """Carry out ``batch`` in one transaction; retry locked refunds later, until ``until`` (event loop's clock)."""
        try:
            results = await self._transact([queued.operation for queued in batch])
            for queued, result in zip(batch, results, strict=True):
                queued.result = result
            parts = [[queued for queued in batch if queued.result is None]]
        except _BusyError:  # it does not say which refund, so each half is retried without the other
            numbers = sorted({queued.operation.no_refund for queued in batch})
            middle = numbers[len(numbers) // 2]
            parts = [
                [queued for queued in batch if (queued.operation.no_refund < middle) is is_first]
                for is_first in (True, False)
            ]
        for part in filter(None, parts):
            self._retry(part, until, min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE))

    def _retry(self, batch: Sequence[Queued], until: float, pause: float) -> None:
        done = anyio.Event()
        for queued in batch:
            queued.done = done

        async def retry() -> None:
            await anyio.sleep(pause)
            if anyio.current_time() >= until:
                raise JournalError(
                    f"journal {self._name}: another transaction has held this refund's row for {self._timeout} s"
                )
            await self._carry_out(batch, until, pause)
            # A TakeBack that came while the transaction was open did not see the new row.
            begins = (queued.operation for queued in batch if isinstance(queued.operation, Begin))
            if late := [Queued(TakeBack(begin), done) for begin in begins if begin.is_taken_back]:
                await self._carry_out(late, until, pause)

        def end(error: BaseException | None) -> None:
            self._retries.discard(task)
            if error is not None:
                for queued in batch:
                    queued.fail(error)
            done.set()

        task = BackgroundTask(retry, end)
        self._retries.add(task)

    async def _transact(self, operations: Sequence[Operation[Any]]) -> Sequence[Result | None]:
        async with self._connected() as connection:
            while True:
                async with connection.transaction():
                    reading = await self._read_clock(connection)
                    if reading.continues(self._reading):
                        self._reading = reading
                        return await self._perform(connection, reading, operations)
                await connection.execute(self._sql(sql.NEW_ERA), [reading.era + 1])

    async def _read_clock(self, connection: AsyncConnection[DictRow]) -> Reading:
        before = self._clock()
        [row] = await (await connection.execute(self._sql(sql.BEGIN), self._options)).fetchall()
        names = (field.name for field in attrs.fields(Reading) if field.name in row)
        return Reading(before=before, after=self._clock(), **{name: row[name] for name in names})

    async def _perform(
        self, connection: AsyncConnection[DictRow], reading: Reading, operations: Sequence[Operation[Any]]
    ) -> Sequence[Result | None]:
        """Return the results; None for a refund whose row is locked by another transaction."""
        numbers = list({operation.no_refund for operation in operations})
        found = await (await connection.execute(self._sql(sql.LOCK), [numbers])).fetchall()
        rows = {row["no_refund"]: row for row in found if row["no_refund"] is not None}
        reading = attrs.evolve(reading, after=self._clock())  # later than every moment in a row
        before = {number: entry_of(row, reading) for number, row in rows.items()}
        for operation in operations:
            if isinstance(operation, Begin):
                operation.postpone(reading.after.boot)
                operation.ask_first = reading.may_have_lost(operation.intent.fields, self._grace)
        after = before.copy()
        results = perform(operations, after, is_acting=self._is_acting or found[0]["is_acting"])
        new = [entry for number, entry in after.items() if number not in rows]
        skipped = {entry.no_refund for entry in new}
        if new:
            await connection.execute(sql.WAIT_BRIEFLY)
            try:
                inserted = await connection.execute(self._sql(sql.INSERT), [rows_of(new, rows, reading)])
            except LockNotAvailable:
                raise _BusyError from None
            skipped -= {row["no_refund"] for row in await inserted.fetchall()}
        changed = [entry for number, entry in after.items() if number in rows and entry is not before[number]]
        if changed:
            await connection.execute(self._sql(sql.UPDATE), [rows_of(changed, rows, reading)])
        return [
            None if operation.no_refund in skipped else result
            for operation, result in zip(operations, results, strict=True)
        ]

    async def _fetch(self, statement: LiteralString, *parameters: Any) -> list[dict[str, Any]]:
        self._opened()
        return await self._select(statement, *parameters)

    async def _select(self, statement: LiteralString, *parameters: Any) -> list[dict[str, Any]]:
        async with self._connected() as connection:
            return await (await connection.execute(self._sql(statement), parameters)).fetchall()

    def _sql(self, statement: LiteralString) -> Composed:
        return SQL(statement).format(schema=Identifier(self._schema))

    # ── errors ────────────────────────────────────────────────────────────────────────────────────

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
            drop_secrets(error)
            raise JournalError(f"journal {self._name}: {reason}") from error


async def _set_isolation(connection: AsyncConnection[Any]) -> None:
    """Set READ COMMITTED: a transaction that waited for another one has to see its rows."""
    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
