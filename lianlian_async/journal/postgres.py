"""The shared journal: one PostgreSQL database for many workers on many machines (extra ``postgres``, asyncio only).

A lease is stored in the refund's row, and expires even if its worker has died. A dead worker behind a half-open
connection may lock rows for seconds, so a batch skips locked rows, and a separate task retries their operations.
All workers insert new rows in the same order, which prevents deadlocks.

A write takes two round trips: the first reads the clock and locks the rows, the second writes them and commits. Each
sends all its statements in one message, with the parameters in the text (a simple query). This takes less CPU time than
a pipeline, and needs no prepared statements, which a pooler such as pgbouncer may mix up.
"""

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from typing import Any, Final, LiteralString

import anyio
from psycopg import AsyncClientCursor, AsyncConnection, Error, IsolationLevel, OperationalError, ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import LockNotAvailable
from psycopg.rows import dict_row
from psycopg.sql import SQL, Composed, Identifier
from psycopg_pool import AsyncConnectionPool

from lianlian_async.background import BackgroundTask, asyncio_loop
from lianlian_async.clock import Clock, Moment, system_clock
from lianlian_async.errors import ConfigurationError
from lianlian_async.secret import Secret, drop_secrets, without_locals
from lianlian_async.settings import check_seconds, check_type

from . import postgres_rows as sql
from .base import Entry, Intent, JournalError, Owner, Standing, State, upgrade_steps
from .group_commit import GroupCommitJournal, Queued
from .operations import Begin, Operation, Result, find, perform
from .postgres_moments import Reading
from .postgres_rows import entry_of, owner_of, rows_of

logger = logging.getLogger("lianlian_async")

SCHEMA_VERSION: Final = 8

Row = dict[str, Any]
Statement = tuple[LiteralString, Sequence[Any]]
"""SQL text, and a parameter for each ``%s`` in it."""

_UNSAFE: Final = (
    "its server runs with %s = off: a power failure can lose recorded refunds or damage the database; set it to on"
)
_AMBIGUOUS: Final = re.compile(r"\w+://([^@/]*@)?+[^?]*@")
"""A URL with an ``@`` in the host or the database's name."""
_INBOX: Final = "_inbox"
_LONGEST_SCHEMA: Final = 63 - len(_INBOX)
"""Bytes. PostgreSQL cuts off longer names: a journal and its inbox would have the same tables."""
_PAGE: Final = 500
_CONNECTIONS: Final = 4
_SHORTEST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0


class _BusyError(Exception):
    """Another transaction is inserting a refund of this batch."""


@without_locals
def connection_string(dsn: str, timeout: float) -> str:
    """Return ``dsn`` with UTF-8, ``connect_timeout``, and TCP settings that end half-open connections.

    With several hosts, connections lead to the host that accepts writes, even if others do not answer. Values in
    ``dsn`` take precedence, except the encoding. Raises ``ConfigurationError`` if ``dsn`` is invalid.
    """
    try:
        given = conninfo_to_dict(dsn)
    except ProgrammingError:  # its message would show the password
        raise ConfigurationError("dsn: must be a PostgreSQL connection string or URL") from None
    if _AMBIGUOUS.match(dsn):  # libpq takes a part of the password for the host or the database
        raise ConfigurationError("dsn: in the user, password and database of a URL, write each @ as %40, each / as %2F")
    defaults: dict[str, Any] = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    hosts = str(given.get("host")).count(",") + 1
    defaults |= {"tcp_user_timeout": round(timeout * 1000), "connect_timeout": max(2, int(timeout / hosts))}
    if hosts > 1:
        defaults["target_session_attrs"] = "read-write"
    return make_conninfo(**(defaults | given | {"client_encoding": "utf8"}))


class PostgresJournal(GroupCommitJournal):
    """A :class:`~lianlian_async.journal.Journal` in the PostgreSQL database ``dsn``, shared by many workers.

    Its tables are in ``schema``, which is created if it is missing; the tables of its inbox are in ``…_inbox``. Each
    journal in a database needs its own schema. The workers' wall clocks may be wrong: the journal uses the database's
    clock and the boot clocks.

    *After a crash:* a call returns only after its commit is on disk, even if ``synchronous_commit`` is off in the
    database. If ``fsync`` or ``full_page_writes`` is off, opening the journal logs a warning. A worker may die at any
    time: its leases expire, and the next worker queries the gateway first.

    *After a failover or a restore:* a standby or a backup may lack the last commits. When the journal finds that the
    database server was restarted or replaced:

    - The ``RetryPolicy.not_found_grace`` of a call starts again for the refunds that the journal has.
    - A refund that it does not have is queried before it is sent: for ``not_found_grace`` seconds every such refund,
      later those whose ``dt_refund`` is before the end of that time.
    - A call whose row was lost may have sent such a refund, if its ``dt_refund`` is before the finding. Then "no such
      record" is believed only after ``not_found_grace``.

    One risk of a second refund remains: a request whose row was lost arrives after ``not_found_grace``, or its
    ``dt_refund`` is later than the finding. Synchronous replication prevents this. Stop all workers before you restore
    a backup, and restore all tables of the schema: only the table ``eras`` shows that a backup was restored.

    Args:
        dsn: a connection string or URL of libpq.
        schema: the schema of the tables.
        timeout: time limit in seconds for one transaction, including the time to connect.
        clock: must be the session's clock.
    """

    @without_locals
    def __init__(
        self, dsn: str, *, schema: str = "lianlian", timeout: float = 10.0, clock: Clock = system_clock
    ) -> None:
        check_seconds("timeout", timeout, most=86_400)  # PostgreSQL counts it in milliseconds, as a 32-bit integer
        check_type("dsn", dsn, str)
        check_type("schema", schema, str)
        if "%" in schema or not 1 <= len(schema.removesuffix(_INBOX).encode()) <= _LONGEST_SCHEMA:
            raise ConfigurationError(f"schema: must have 1 to {_LONGEST_SCHEMA} bytes, and no %; is {schema!r}")
        self._dsn = Secret(connection_string(dsn, timeout))
        database = conninfo_to_dict(self._dsn.reveal())
        super().__init__(f"{schema} in {database.get('dbname')} at {database.get('host')}")
        self._schema = schema
        self._timeout = timeout
        self._clock = clock
        self._is_acting = False
        self._retries = set[BackgroundTask]()
        # A transaction that is idle for half of the timeout belongs to a worker that is dead or hangs.
        self._clock_query: Statement = sql.READ_CLOCK, (f"{timeout * 1000:.0f}ms", f"{max(1000, timeout * 500):.0f}ms")

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        if now.timeline != self._clock().timeline:
            raise ConfigurationError("clock: must be the clock of the session; pass PostgresJournal(…, clock=…)")
        return await super().begin(intent, now)

    def pending(self) -> AsyncIterator[Entry]:
        return self._walk(sql.PENDING)

    def entries(self) -> AsyncIterator[Entry]:
        return self._walk(sql.ENTRIES)

    async def _walk(self, statement: LiteralString) -> AsyncGenerator[Entry]:
        [newest] = await self._fetch(sql.LAST)
        last_id = 0
        while page := await self._fetch(statement, last_id, newest["id"], _PAGE):
            for row in page:
                yield entry_of(row, self._reading)
            last_id = page[-1]["id"]

    async def canaries(self) -> list[Entry]:
        return [entry_of(row, self._reading) for row in await self._fetch(sql.CANARIES)]

    async def counts(self) -> Mapping[State, int]:
        return dict.fromkeys(State, 0) | {State(row["state"]): row["count"] for row in await self._fetch(sql.COUNT)}

    def _new_inbox(self) -> "PostgresJournal":
        return PostgresJournal(
            self._dsn.reveal(), schema=f"{self._schema}{_INBOX}", timeout=self._timeout, clock=self._clock
        )

    async def _open(self) -> None:
        if asyncio_loop() is None:
            raise ConfigurationError("PostgresJournal runs on asyncio only, as psycopg does")
        # Connect once without the pool: the pool would retry instead of raising the error.
        with self._errors():
            async with await AsyncConnection.connect(self._dsn.reveal(), row_factory=dict_row) as connection:
                await self._prepare(connection)
        self._pool = AsyncConnectionPool(
            self._dsn.reveal,  # the function, so that the pool does not store the password
            connection_class=AsyncConnection[Row],
            open=False,
            min_size=1,
            max_size=_CONNECTIONS,
            reconnect_timeout=self._timeout,  # then the next call connects; the pool itself would pause for minutes
            kwargs={"autocommit": True, "row_factory": dict_row, "cursor_factory": AsyncClientCursor},
        )
        await self._pool.open()

    async def _prepare(self, connection: AsyncConnection[Row]) -> None:
        """Create or upgrade the tables. An advisory lock lets one worker at a time do so."""
        await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
        await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"journal {self._schema}"])
        [found] = await (await connection.execute(sql.FIND_TABLES, [self._schema])).fetchall()
        if found["encoding"] != "UTF8":
            raise ConfigurationError(
                f"journal {self._name}: the encoding of its database is {found['encoding']}, which cannot store every "
                "text of the gateway; use a database with the encoding UTF8"
            )
        if found["nspname"] is None:
            await connection.execute(self._sql(sql.CREATE_SCHEMA))
        if found["tablename"] is None:
            await connection.execute(self._sql(sql.CREATE))
        rows = await (await connection.execute(self._sql(sql.READ_VERSION))).fetchall()
        if len(rows) != 1:
            raise JournalError(
                f"journal {self._name}: its table version must have one row, and its table eras at least one; drop the "
                "schema, then restore all its tables together, with their data"
            )
        [row] = rows
        for step in upgrade_steps(self._name, row["version"], SCHEMA_VERSION, sql.UPGRADES):
            await connection.execute(self._sql(step))
            await connection.execute(self._sql(sql.UPGRADED), [SCHEMA_VERSION])
        self._id, self.owner = row["id"], owner_of(row)
        for row in await (await connection.execute(sql.FIND_UNSAFE)).fetchall():
            logger.warning("journal %s: %s", self._name, _UNSAFE % row["name"])
        statement, parameters = self._clock_query
        before = self._clock()
        answer = await connection.execute(self._sql(statement), parameters)
        self._reading = self._read_clock(before, await answer.fetchall())

    async def _bind(self, owner: Owner) -> None:
        bind = sql.BIND, (owner.oid_partner, owner.apply_url)
        async with self._sent((sql.BEGIN, ()), bind, (sql.READ_VERSION, ()), (sql.COMMIT, ())) as (_, _, answers):
            owner.confirm(owner_of(answers[2][0]), self._name)

    async def begin_acting(self) -> None:
        [row] = await self._fetch(sql.READ_VERSION)
        if not row["is_acting"]:
            changes = [(statement, ()) for statement in (*sql.BEGIN_ACTING, sql.COMMIT)]
            async with self._sent((sql.BEGIN, ()), self._clock_query, *changes):
                pass
        self._is_acting = True  # stays True even if a failover loses that commit

    async def _close(self) -> None:
        while self._retries:
            await next(iter(self._retries)).join()
        await self._pool.close()

    async def _write(self, batch: Sequence[Queued]) -> None:
        await self._carry_out(batch, anyio.current_time() + self._timeout)

    async def _carry_out(self, batch: Sequence[Queued], until: float, pause: float = 0.0) -> None:
        """Carry out ``batch`` in one transaction. Retry locked refunds later, up to ``until`` (event loop's clock)."""
        parts = [batch]
        try:
            await self._transact(batch)
        except _BusyError:  # the error does not name the refund: retry each half separately
            numbers = sorted({queued.operation.no_refund for queued in batch})
            middle = len(numbers) // 2
            halves = set(numbers[:middle]), set(numbers[middle:])
            parts = [[queued for queued in batch if queued.operation.no_refund in half] for half in halves]
        for part in parts:
            if left := [queued for queued in part if queued.result is None]:
                self._retry(left, until, min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE))

    def _retry(self, batch: Sequence[Queued], until: float, pause: float) -> None:
        done = anyio.Event()
        for queued in batch:
            queued.done = done

        async def retry() -> None:
            await anyio.sleep(pause)
            if anyio.current_time() >= until:
                raise JournalError(
                    f"journal {self._name}: another transaction has locked this refund's row for {self._timeout} s; "
                    "end that transaction"
                )
            await self._carry_out(batch, until, pause)
            # The take_back of a cancelled begin may have run before this commit, and so left the lease: repeat it.
            late = [
                Queued(Operation(queued.operation.no_refund, begin.take_back), done)
                for queued in batch
                if isinstance(begin := queued.operation.apply, Begin) and begin.is_taken_back
            ]
            if late:
                await self._carry_out(late, until, pause)

        def end(error: BaseException | None) -> None:
            self._retries.discard(task)
            if error is not None:
                for queued in batch:
                    queued.fail(error)
            done.set()

        task = BackgroundTask(retry, end)
        self._retries.add(task)

    async def _transact(self, batch: Sequence[Queued]) -> None:
        """Give each operation its result, except those whose row another transaction has locked."""
        finds = [queued for queued in batch if queued.operation.apply is find]
        writes = [queued for queued in batch if queued.operation.apply is not find]
        select: list[Statement] = [(sql.FIND, [[queued.operation.no_refund for queued in finds]])] if finds else []
        if not writes:
            async with self._sent(*select) as (_, _, [rows]):
                return self._answer(finds, rows)
        lock: Statement = sql.LOCK, [list({queued.operation.no_refund for queued in writes})]
        while True:
            async with self._sent((sql.BEGIN, ()), self._clock_query, lock, *select) as (connection, before, answers):
                _, clock, locked, *found = answers
                reading = self._read_clock(before, clock)
                if reading.continues(self._reading):
                    self._reading = reading
                    for rows in found:
                        self._answer(finds, rows)
                    results = await self._perform(connection, locked, [queued.operation for queued in writes])
                    for queued, result in zip(writes, results, strict=True):
                        queued.result = result
                    return None
                new_era: Statement = sql.NEW_ERA, [reading.era + 1]
                await self._send(connection, (sql.ROLLBACK, ()), (sql.BEGIN, ()), new_era, (sql.COMMIT, ()))

    def _answer(self, finds: Sequence[Queued], rows: Sequence[Row]) -> None:
        entries = {row["no_refund"]: entry_of(row, self._reading) for row in rows}
        for queued in finds:
            queued.result = Result(entries.get(queued.operation.no_refund))

    def _read_clock(self, before: Moment, answer: Sequence[Row]) -> Reading:
        """Return the reading from the ``answer`` to ``READ_CLOCK``; ``before``: the clock before the query was sent."""
        after, [row] = self._clock(), answer
        return Reading(
            before=before,
            database=datetime.fromisoformat(row["database"]),
            after=after,
            era=row["era"],
            began=datetime.fromisoformat(row["began"]),
            is_same_incarnation=row["is_same_incarnation"],
        )

    async def _perform(
        self, connection: AsyncConnection[Row], found: Sequence[Row], operations: Sequence[Operation[Any]]
    ) -> Sequence[Result | None]:
        """Carry out ``operations`` and commit; ``found``: the rows that ``LOCK`` returned.

        Return the results; the result is None if another transaction has locked or inserted the refund's row.
        """
        upgrade_steps(self._name, found[0]["version"], SCHEMA_VERSION, {})  # raises after an upgrade by a later release
        reading = self._reading
        rows = {row["no_refund"]: row for row in found if row["no_refund"] is not None}
        before = {number: entry_of(row, reading) for number, row in rows.items()}
        for operation in operations:
            if isinstance(begin := operation.apply, Begin):
                begin.postpone(reading.after.boot)
                if reading.era > 1:
                    begin.allow_for_failover(reading.began, reading.database)
        after = before.copy()
        results = perform(operations, after, is_acting=self._is_acting or found[0]["is_acting"])
        changed = [entry for number, entry in after.items() if number in rows and entry is not before[number]]
        new = [entry for number, entry in after.items() if number not in rows]
        absent = list({operation.no_refund for operation in operations} - after.keys())
        statements: list[Statement] = [(sql.FIND, [absent])] if absent else []  # finds the locked ones
        if changed:
            statements.append((sql.UPDATE, [rows_of(changed, rows, reading)]))
        if new:
            statements += [(sql.WAIT_BRIEFLY, ()), (sql.INSERT, [rows_of(new, rows, reading)])]
        try:
            answers = await self._send(connection, *statements, (sql.COMMIT, ()))
        except LockNotAvailable:
            raise _BusyError from None
        locked, inserted = (answers[0] if absent else []), (answers[-2] if new else [])
        skipped = {entry.no_refund for entry in new} - {row["no_refund"] for row in inserted}
        skipped |= {row["no_refund"] for row in locked}
        return [
            None if operation.no_refund in skipped else result
            for operation, result in zip(operations, results, strict=True)
        ]

    async def _fetch(self, statement: LiteralString, *parameters: Any) -> list[Row]:
        self._check_usable()
        async with self._sent((statement, parameters)) as (_, _, [rows]):
            return rows

    async def _send(self, connection: AsyncConnection[Row], *statements: Statement) -> list[list[Row]]:
        """Send ``statements`` in one message and return the rows of each."""
        text = SQL(";").join([self._sql(statement) for statement, _ in statements])
        cursor = await connection.execute(text, [value for _, parameters in statements for value in parameters])
        answers = []
        for _ in statements:
            answers.append(await cursor.fetchall() if cursor.description else [])
            cursor.nextset()
        return answers

    def _sql(self, statement: LiteralString) -> Composed:
        return SQL(statement).format(schema=Identifier(self._schema))

    @asynccontextmanager
    async def _sent(
        self, *statements: Statement
    ) -> AsyncGenerator[tuple[AsyncConnection[Row], Moment, list[list[Row]]]]:
        """Send ``statements`` as :meth:`_send` does, on a connection of the pool.

        Yields the connection, the clock before the send, and the rows of each statement. If the server has closed the
        connection, the statements are sent again on another one, so they must be idempotent. If the ``async with``
        block raises, the transaction is rolled back.
        """
        with self._errors():
            closed = 0
            while True:
                async with self._pool.connection() as connection:
                    before = self._clock()
                    try:
                        answers = await self._send(connection, *statements)
                    except OperationalError:
                        if not connection.broken or closed == _CONNECTIONS:
                            raise
                        closed += 1
                        continue
                    yield connection, before, answers
                    return

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with anyio.fail_after(self._timeout):
                yield
        except (Error, OSError) as error:
            reason = " ".join(str(error).split()) or f"no answer within {self._timeout} s"
            drop_secrets(error)
            raise JournalError(f"journal {self._name}: {reason}") from error
