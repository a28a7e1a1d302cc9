"""The shared journal: one PostgreSQL database for many workers on many machines (extra ``postgres``, asyncio only).

A lease stands in the row, and is over when its time is, whatever became of the worker that took it. No batch waits
for a row that another transaction holds, maybe of a worker that is dead behind a half-open connection: what is
locked is skipped, and waits apart. New rows are inserted in the same order by all workers, so that these never wait
for each other in a circle. ``postgres_moments`` tells how the database's clock and the workers' go together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final, LiteralString, cast

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
from .group_commit import GroupCommitJournal
from .operations import Begin, Look, Operation, Result, TakeBack, perform
from .postgres_moments import Reading
from .postgres_rows import entry_of, owner_of, rows_of

__all__ = ["PostgresJournal", "connection_string"]

SCHEMA_VERSION: Final = 4

_PAGE: Final = 500
_SHORTEST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0


class _BusyError(Exception):
    """Another transaction, which goes on, is inserting one of these refunds."""


@attrs.define(eq=False)
class _Apart:
    """Operations that wait because another transaction holds their refunds, and later their answers."""

    operations: Sequence[Operation[Any]]
    answers: Sequence[Result] = attrs.field(default=(), init=False)
    done: anyio.Event = attrs.field(factory=anyio.Event, init=False)

    async def answer(self, place: int) -> Result:
        """Wait for one of the answers."""
        await self.done.wait()
        return self.answers[place]


@without_locals
def connection_string(dsn: str, timeout: float) -> str:
    """Return ``dsn`` so that a connection whose other end is gone is given up; what ``dsn`` says itself stays.

    Raises ``ConfigurationError``.
    """
    try:
        given = conninfo_to_dict(dsn)
    except ProgrammingError:  # whose text would show the password
        raise ConfigurationError("dsn: not a PostgreSQL connection string or URL") from None
    alive: dict[str, Any] = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    return make_conninfo(**(alive | {"tcp_user_timeout": round(timeout * 1000)} | given))


class PostgresJournal(GroupCommitJournal):
    """A :class:`~lianlian_async.journal.Journal` in the PostgreSQL database that ``dsn`` names.

    Its tables live in ``schema``, which is made if it is not there, those of its inbox, if it ever has one, in
    ``…_inbox``; several journals in one database take several schemas. Two workers never hold one refund at the
    same time. Clocks of workers need not agree, and may be set: the database's clock and the boot clocks count.

    *What holds over crashes:* what a call was told is on disk, also where the database's ``synchronous_commit`` is
    off. Workers may die at any moment: their leases end, and whoever comes next asks the gateway first.

    *What holds over failover and restore:* a standby or a backup may lack the last commits. Where the database is
    another incarnation than before, the grace of what was begun earlier (``RetryPolicy.not_found_grace``) starts again,
    and a refund that is not on record is asked about before it is sent: each one for ``not_found_grace`` seconds, and
    later each one whose ``dt_refund`` is older than that. What the gateway answered is written again if its row is
    lost. What remains: a request that is on its way during the failover, under a lease that was lost, may arrive
    after another worker was told "no such record". Synchronous replication prevents that. Stop all workers before
    you restore a backup.

    ``timeout`` is how many seconds the database may take for one transaction, connecting included. Set
    ``not_found_grace`` as in the ``RetryPolicy`` of the workers; 0 asks about nothing that is new. ``clock`` is the
    session's.
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
        self._apart: dict[_Apart, BackgroundTask] = {}
        # A transaction that is idle for half of the timeout is a dead worker's; whoever waits for it goes on then.
        self._options = {"timeout": f"{timeout * 1000:.0f}ms", "idle": f"{max(1000, timeout * 500):.0f}ms"}

    async def begin(self, intent: Intent, now: Moment) -> tuple[Standing, Entry]:
        """See :meth:`Journal.begin`."""
        if now.timeline != self._clock().timeline:
            raise ConfigurationError("PostgresJournal: give it the clock of its session, PostgresJournal(…, clock=…)")
        return await super().begin(intent, now)

    def pending(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.pending`. Entries that begin later are left out."""
        return self._walk(sql.PENDING)

    def entries(self) -> AsyncIterator[Entry]:
        """See :meth:`Journal.entries`."""
        return self._walk(sql.ENTRIES)

    async def _walk(self, page_of: LiteralString) -> AsyncGenerator[Entry]:
        [newest] = await self._fetch(sql.LAST)
        place = 0
        while page := await self._fetch(page_of, place, newest["id"], _PAGE):
            for row in page:
                yield entry_of(row, self._reading)
            place = page[-1]["id"]

    async def latest_made(self) -> Entry | None:
        """See :meth:`Journal.latest_made`."""
        return next((entry_of(row, self._reading) for row in await self._fetch(sql.LATEST_MADE)), None)

    async def counts(self) -> Mapping[State, int]:
        """See :meth:`Journal.counts`."""
        return dict.fromkeys(State, 0) | {State(row["state"]): row["count"] for row in await self._fetch(sql.COUNT)}

    # ── open and closed ──────────────────────────────────────────────────────────────────────────

    def _beside(self) -> PostgresJournal:
        """The inbox: nothing is sent for its entries, so that it never asks first."""
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
            raise ConfigurationError(
                "PostgresJournal runs on asyncio only: psycopg knows no other event loop"
            ) from None
        # Not through the pool: that would wait and try again, and never tell what is wrong.
        with self._errors():
            async with await AsyncConnection.connect(self._dsn.reveal(), row_factory=dict_row) as connection:
                await self._prepare(connection)
        self._pool = AsyncConnectionPool(
            self._dsn.reveal,  # the function: the pool, too, holds no password
            connection_class=AsyncConnection[DictRow],
            open=False,
            min_size=1,
            max_size=4,
            configure=_read_what_is_committed,
            check=AsyncConnectionPool.check_connection,
            # Connection poolers in between may not keep prepared statements apart.
            kwargs={"autocommit": True, "prepare_threshold": None, "row_factory": dict_row},
        )
        await self._pool.open()

    async def _prepare(self, connection: AsyncConnection[DictRow]) -> None:
        """Make the tables if they are not there; one worker at a time."""
        await _read_what_is_committed(connection)
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
        self._id, self._owner = row["id"], owner_of(row)
        self._reading = await self._read_clock(connection)

    async def _bind(self, owner: Owner) -> None:
        async with self._connected() as connection:
            await connection.execute(self._sql(sql.BIND), [owner.oid_partner, owner.apply_url])
            [row] = await (await connection.execute(self._sql(sql.READ_VERSION))).fetchall()
        owner.confirm(owner_of(row), self._name)

    async def begin_acting(self) -> None:
        """See :meth:`Journal.begin_acting`."""
        [row] = await self._fetch(sql.READ_VERSION)
        if not row["is_acting"]:
            async with self._connected() as connection, connection.transaction():
                await self._read_clock(connection)
                for statement in sql.BEGIN_ACTING:
                    await connection.execute(self._sql(statement))

    async def _close(self) -> None:
        while self._apart:
            await next(iter(self._apart)).done.wait()
        await self._pool.close()

    # ── batches ──────────────────────────────────────────────────────────────────────────────────

    async def _write(self, operations: Sequence[Operation[Any]]) -> Sequence[Result]:
        looks = [operation for operation in operations if isinstance(operation, Look)]
        writes = [operation for operation in operations if not isinstance(operation, Look)]
        answers = dict[int, Result]()
        if looks:
            rows = await self._select(sql.FIND, [look.no_refund for look in looks])
            found = {row["no_refund"]: entry_of(row, self._reading) for row in rows}
            answers |= zip(map(id, looks), perform(looks, found), strict=True)
        if writes:
            done = await self._carry_out(writes, anyio.current_time() + self._timeout)
            answers |= zip(map(id, writes), done, strict=True)
        return [answers[id(operation)] for operation in operations]

    async def _carry_out(
        self, operations: Sequence[Operation[Any]], until: float, pause: float = 0.0
    ) -> Sequence[Result]:
        """Do all in one transaction; try apart what another one holds, until a moment (event loop's clock)."""
        answers = dict[int, Result | None]()
        try:
            answers |= zip(map(id, operations), await self._transact(operations), strict=True)
            parts = [[one for one in operations if answers[id(one)] is None]]
        except _BusyError:  # nobody tells which refund it is, so the halves go on without each other
            numbers = sorted({operation.no_refund for operation in operations})
            middle = numbers[len(numbers) // 2]
            parts = [[one for one in operations if (one.no_refund < middle) is is_first] for is_first in (True, False)]
        pause = min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        for part in filter(None, parts):
            apart = _Apart(part)
            self._apart[apart] = BackgroundTask(partial(self._try_again, apart, until, pause))
            answers |= {id(one): Result(None, None, partial(apart.answer, place)) for place, one in enumerate(part)}
        return cast("list[Result]", [answers[id(operation)] for operation in operations])  # each has one by now

    async def _try_again(self, apart: _Apart, until: float, pause: float) -> None:
        reason = f"journal {self._name}: another transaction has held this refund's row for {self._timeout} s"
        apart.answers = _failed(apart.operations, reason)
        try:
            await anyio.sleep(pause)
            if anyio.current_time() < until:
                apart.answers = await self._carry_out(apart.operations, until, pause)
                # Its TakeBack came while the transaction was open, and did not see the row.
                gone = [one for one in apart.operations if isinstance(one, Begin) and one.is_taken_back]
                if gone:
                    await self._carry_out([TakeBack(one) for one in gone], until, pause)
        except JournalError as error:
            apart.answers = _failed(apart.operations, str(error))
        finally:
            del self._apart[apart]
            apart.done.set()

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
        numbers = list({operation.no_refund for operation in operations})
        found = await (await connection.execute(self._sql(sql.LOCK), [numbers])).fetchall()
        rows = {row["no_refund"]: row for row in found if row["no_refund"] is not None}
        reading = attrs.evolve(reading, after=self._clock())  # whatever is in a row happened before
        before = {number: entry_of(row, reading) for number, row in rows.items()}
        for operation in operations:
            if isinstance(operation, Begin):
                operation.postpone(reading.after.boot)
                operation.ask_first = reading.may_have_lost(operation.intent.fields, self._grace)
        after = before.copy()
        answers = perform(operations, after, is_acting=found[0]["is_acting"])
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
            None if operation.no_refund in skipped else answer
            for operation, answer in zip(operations, answers, strict=True)
        ]

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
            drop_secrets(error)
            raise JournalError(f"journal {self._name}: {reason}") from error


def _failed(operations: Sequence[Operation[Any]], reason: str) -> Sequence[Result]:
    """An error for each: one that is raised in many tasks would grow with each."""
    return [Result(None, JournalError(reason)) for _ in operations]


async def _read_what_is_committed(connection: AsyncConnection[Any]) -> None:
    """Whatever the database's default is: who has waited for another has to see what that one wrote."""
    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
