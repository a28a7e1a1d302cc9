"""A queue of refunds for any number of workers: procrastinate jobs in PostgreSQL (extra ``postgres``; asyncio only).

To queue a refund in the transaction that updates its order, pass the connection of that transaction::

    # SQLAlchemy (postgresql+psycopg), with an AsyncSession
    raw = await (await session.connection()).get_raw_connection()
    await queue.enqueue([request], connection=raw.driver_connection)

    # Django, in transaction.atomic(), where the connection is synchronous
    with connection.cursor() as cursor:
        cursor.execute(*queue.statement([request]))
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from typing import Any, Final, LiteralString, Self, TypeVar, cast

import anyio
from procrastinate import App, JobContext, PsycopgConnector, RetryStrategy
from procrastinate.exceptions import ConnectorException
from psycopg import AsyncConnection, AsyncCursor, IsolationLevel
from psycopg.errors import UndefinedTable
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier

from lianlian_async.background import complete
from lianlian_async.errors import ConfigurationError, LianLianError
from lianlian_async.journal.postgres import PostgresJournal, connection_string
from lianlian_async.models import RefundRequest
from lianlian_async.outcome import Outcome
from lianlian_async.secret import without_locals
from lianlian_async.session import RefundSession
from lianlian_async.settings import check_function, check_integer, check_seconds, check_type
from lianlian_async.worker_pool import iterate

from .slices import TASK, Slice, SliceFetcher, SliceWorker, follow_up

__all__ = ["RefundQueue"]

T = TypeVar("T")

logger = logging.getLogger("lianlian_async")

_REQUEUE_LOST: Final = "lianlian:requeue-lost"
_SLICES: Final = 10
"""Maximum number of slices that ``enqueue`` inserts with one statement."""
# A single statement, so that ``RefundQueue.statement`` can return it. Jobs become due by the database's clock. The
# commit is durable: a refund that was queued must not be lost.
_INSERT: Final = """
INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args, status, scheduled_at)
SELECT %(queue)s, %(task)s, priority, args, status, clock_timestamp() + seconds * interval '1 second'
FROM jsonb_to_recordset(%(jobs)s::jsonb)
    AS job (priority int, args jsonb, status procrastinate_job_status, seconds float),
    (SELECT set_config('synchronous_commit', CASE WHEN current_setting('synchronous_commit') IN ('off', 'local')
        THEN 'on' ELSE current_setting('synchronous_commit') END, true)) AS durable
"""
_COUNT: Final = """
SELECT
    coalesce(sum(refunds) FILTER (WHERE status = 'todo' AND NOT is_later), 0)::bigint AS waiting,
    coalesce(sum(refunds) FILTER (WHERE status = 'todo' AND is_later), 0)::bigint AS later,
    coalesce(sum(refunds) FILTER (WHERE status = 'doing'), 0)::bigint AS at_work,
    coalesce(sum(refunds) FILTER (WHERE status = 'failed'), 0)::bigint AS failed,
    (SELECT count(*) FROM procrastinate_workers WHERE last_heartbeat > now() - %(seconds)s * interval '1 s') AS workers
FROM (
    SELECT status, coalesce(scheduled_at > now(), false) AS is_later,
        CASE jsonb_typeof(args->'refunds') WHEN 'array' THEN jsonb_array_length(args->'refunds') ELSE 1 END AS refunds
    FROM procrastinate_jobs WHERE queue_name = %(queue)s AND task_name = %(task)s
) AS job
"""
# A job's first event has the time at which it was queued. Only follow-up jobs (priority 1) have a cause.
_ACTIVITY: Final = """
WITH job AS (SELECT * FROM procrastinate_jobs WHERE queue_name = %(queue)s AND task_name = %(task)s)
SELECT
    (SELECT extract(epoch FROM now() - greatest(scheduled_at, queued_at))::float
    FROM job, LATERAL (SELECT min(at) AS queued_at FROM procrastinate_events WHERE job_id = job.id) AS event
    WHERE status = 'todo' AND coalesce(scheduled_at <= now(), true) ORDER BY id LIMIT 1) AS oldest_waiting_seconds,
    (SELECT coalesce(jsonb_object_agg(cause, refunds), '{}') FROM (
        SELECT args->>'cause' AS cause, sum(jsonb_array_length(args->'refunds')) AS refunds FROM job
        WHERE priority > 0 AND status IN ('todo', 'doing') AND args ? 'cause' GROUP BY 1
    ) AS again) AS queued_again,
    (SELECT coalesce(jsonb_agg(jsonb_build_object(
        'id', id, 'heartbeat_seconds', round(extract(epoch FROM now() - last_heartbeat)),
        'slices', (SELECT count(*) FROM job WHERE worker_id = worker.id AND status = 'doing')
    ) ORDER BY id), '[]') FROM procrastinate_workers AS worker) AS workers
"""
_FAILURES: Final = """
SELECT args->'refunds'->0->>'no_refund' AS no_refund, args->>'cause' AS cause FROM procrastinate_jobs
WHERE queue_name = %(queue)s AND task_name = %(task)s AND status = 'failed' ORDER BY id LIMIT %(limit)s
"""
# Queue the jobs of dead workers again. Only the periodic job has a queueing lock: its successor may already be queued
# with that lock, so it fails instead. A worker of another program fails our jobs, because it lacks their task, and
# counts that as an attempt; a job that we insert as failed has no attempt. If the database's clock was ahead, a dead
# worker's heartbeat or a job's time may be far in the future.
_RESCUE: Final = """
UPDATE procrastinate_jobs AS job
SET status = CASE WHEN queueing_lock IS NULL AND NOT abort_requested THEN 'todo' ELSE 'failed'
    END::procrastinate_job_status, attempts = attempts + 1, scheduled_at = NULL
WHERE queue_name = %(queue)s AND (status = 'failed' AND task_name = %(task)s AND attempts > 0 AND NOT abort_requested
    OR status = 'todo' AND scheduled_at > now() + interval '1 day'
    OR status = 'doing' AND NOT EXISTS (
        SELECT FROM procrastinate_workers AS worker
        WHERE worker.id = job.worker_id AND abs(extract(epoch FROM now() - last_heartbeat)) <= %(seconds)s
)) RETURNING id, status
"""
# Find the refunds that may have been made, but that no job contains. Ignore new jobs that no worker has started: they
# may wait behind a long queue, and such a refund must not wait so long.
_LOST: Final = """
SELECT fields::jsonb AS refund FROM {schema}.refunds WHERE state = 'unresolved' AND sent_at IS NOT NULL
EXCEPT
SELECT refund FROM procrastinate_jobs, jsonb_path_query(args, '$.refunds[*]') AS refund
WHERE queue_name = %(queue)s AND task_name = %(task)s
    AND (status = 'doing' OR status = 'failed' AND NOT abort_requested
        OR status = 'todo' AND (priority > 0 OR attempts > 0))
"""
# Identifies the database and the table, to compare two connections.
_DATABASE: Final = """
SELECT concat_ws(' ', extract(epoch FROM pg_postmaster_start_time()), to_regclass('procrastinate_jobs')::oid,
    (SELECT oid FROM pg_database WHERE datname = current_database())) AS id
"""
_JOURNAL: Final = "SELECT id FROM {schema}.version"
_DELETE_DECIDED: Final = """
DELETE FROM procrastinate_jobs USING {schema}.refunds
WHERE queue_name = %(queue)s AND task_name = %(task)s AND status = 'failed' AND state NOT IN ('unresolved', 'conflict')
    AND no_refund = args->'refunds'->0->>'no_refund' AND args->'refunds' = jsonb_build_array(fields::jsonb)
"""
_CONNECTIONS: Final = 4
_TIMEOUT: Final = 10.0
"""Timeout in seconds for idle transactions, half-open connections, and the wait for a connection."""


async def _configure(connection: AsyncConnection[Any]) -> None:
    # At a stricter level, transactions of several workers at the same time can fail with serialization errors.
    await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
    # Let the database end the transaction of a worker that hangs, because its row locks block the other workers.
    await connection.execute(f"SET idle_in_transaction_session_timeout = '{_TIMEOUT:.0f}s'")
    await connection.commit()


class RefundQueue:
    """The queue of the :class:`.PostgresJournal` with the same ``dsn`` and ``schema``, for any number of workers.

    A journal and its queue belong to one merchant and one apply endpoint. A job contains a slice: up to
    ``slice_size`` refunds. The journal records the outcome of each refund. A refund whose outcome stays unknown is
    queued again, due at its ``ask_again_at``. A refund about which a person has to decide (``RefundConflict``, or
    unreadable data) becomes a failed job (:meth:`failures`). If other procrastinate workers use the database, let each
    name its ``queues``: a worker that also fetches these jobs fails them, which delays their refunds. If you abort a
    running job with procrastinate, the refunds that it has begun are still resolved, and the others are not made.
    """

    @without_locals
    def __init__(
        self, dsn: str, *, schema: str = "lianlian", rescue_after: float = 60.0, slice_size: int = 200
    ) -> None:
        """If a worker has had no heartbeat for ``rescue_after`` seconds, other workers take over its jobs.

        Raises ``ConfigurationError`` if that is less than 1: a busy worker cannot send a heartbeat so often.
        """
        self._rescue_after = check_seconds("rescue_after", rescue_after, least=1)
        conninfo = connection_string(dsn, _TIMEOUT)
        connector = PsycopgConnector(
            conninfo=conninfo,
            kwargs={"prepare_threshold": None},  # a pooler such as pgbouncer may mix up prepared statements
            configure=_configure,
            min_size=1,  # a fleet may have many workers, and the database few connections
            max_size=_CONNECTIONS,
            timeout=_TIMEOUT,
            reconnect_timeout=_TIMEOUT,  # as in PostgresJournal
        )
        self.app = App(connector=connector)
        check_type("schema", schema, str)
        self._names = {"queue": schema, "task": TASK}
        self._slice_size = check_integer("slice_size", slice_size, least=1)
        self._worker: SliceWorker | None = None
        self.app.task(name=TASK, queue=schema, retry=RetryStrategy(wait=60), pass_context=True)(self._run_slice)
        task = self.app.task(name=_REQUEUE_LOST, queue=schema, queueing_lock=f"{_REQUEUE_LOST} {schema}", priority=2)
        self.app.periodic(cron="* * * * *", periodic_id=schema)(task(self._requeue_lost))

    async def __aenter__(self) -> Self:
        try:
            await self.app.open_async()
            connector = cast("PsycopgConnector", self.app.connector)
            async with connector.pool.connection() as connection:  # one process at a time creates the tables
                await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('procrastinate', 0))")
                if not await self.app.check_connection_async():
                    await connection.execute(self.app.schema_manager.get_schema())
        except BaseException:  # if the pool stayed open, its tasks would outlive the event loop
            await complete(self.app.close_async)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.app.close_async()

    async def enqueue(
        self,
        requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest],
        *,
        connection: AsyncConnection[Any] | None = None,
    ) -> int:
        """Insert refunds into the queue in bulk, and return their number.

        Safe to repeat: the journal prevents a second refund with the same ``no_refund``. With ``connection`` (psycopg),
        all refunds are inserted in its open transaction, in a savepoint. Raises ``ConfigurationError`` if
        ``connection`` has no open transaction, or leads to another database than the queue's.
        """
        if connection is not None:
            await self._check(connection)
        number = 0
        async with (
            nullcontext() if connection is None else connection.transaction(),
            aclosing(_chunks(iterate(requests), _SLICES * self._slice_size)) as chunks,
        ):
            async for chunk in chunks:
                statement, parameters = self.statement(chunk)
                if connection is None:
                    await self.app.connector.execute_query_async(statement, **parameters)
                else:  # ignore the caller's cursor_factory and row_factory, which may be of any kind
                    await AsyncCursor(connection, row_factory=tuple_row).execute(statement, parameters)
                number += len(chunk)
        return number

    async def _check(self, connection: AsyncConnection[Any]) -> None:
        check_type("connection", connection, AsyncConnection)
        theirs = await AsyncCursor(connection, row_factory=tuple_row).execute(_DATABASE)
        ours = await self.app.connector.execute_query_one_async(_DATABASE)
        if await theirs.fetchone() != (ours["id"],):
            raise ConfigurationError(
                "connection: leads to another database or schema than the queue; connect to the queue's own database"
            )
        if connection.info.transaction_status == TransactionStatus.IDLE:
            raise ConfigurationError("connection: has no open transaction; enqueue in `async with conn.transaction()`")

    def statement(self, requests: Iterable[RefundRequest]) -> tuple[LiteralString, dict[str, str]]:
        """Return the SQL statement that inserts ``requests`` into the queue, and its parameters in psycopg's form.

        Use the statement with a connection that :meth:`enqueue` does not accept. Nothing checks that this connection
        leads to the queue's database.
        """
        rows, size = [request.to_dict() for request in requests], self._slice_size
        slices = [{"refunds": rows[start : start + size]} for start in range(0, len(rows), size)]
        jobs = [{"priority": 0, "status": "todo", "args": args} for args in slices]
        return _INSERT, self._names | {"jobs": json.dumps(jobs)}

    async def _put(self, jobs: list[dict[str, Any]]) -> None:
        await self.app.connector.execute_query_async(_INSERT, **self._names, jobs=json.dumps(jobs))

    async def counts(self) -> Mapping[str, int]:
        """Return the number of refunds by job status, and the number of live ``workers``.

        ``waiting``: due now; ``later``: scheduled; ``at_work``: in a slice that a worker has fetched, without the
        refunds that :meth:`work` of this object has finished; ``failed``. Finished refunds are in the journal only. A
        refund that was queued twice counts twice. A worker, of any queue in the database, is live if it had a heartbeat
        in the last ``rescue_after`` seconds.
        """
        found = await self.app.connector.execute_query_one_async(_COUNT, **self._names, seconds=self._rescue_after)
        finished = self._worker.finished if self._worker else 0
        return found | {"at_work": max(0, found["at_work"] - finished)}

    async def failures(self, limit: int = 20) -> Sequence[Mapping[str, str | None]]:
        """Return the oldest refunds about which a person has to decide, with ``no_refund`` and ``cause``.

        ``no_refund`` is None if it cannot be read. After ``lianlian journal decide``, a worker deletes that job.
        """
        return await self.app.connector.execute_query_all_async(_FAILURES, **self._names, limit=limit)

    async def activity(self) -> Mapping[str, Any]:
        """Return numbers that show whether the workers make progress.

        ``oldest_waiting_seconds``: how long the oldest due job has waited, or None. ``queued_again``: the number of
        refunds in unfinished follow-up jobs, by cause. ``workers``: each with its ``id``, ``heartbeat_seconds`` since
        its last heartbeat, and the number of its running ``slices``.
        """
        return await self.app.connector.execute_query_one_async(_ACTIVITY, **self._names)

    @property
    def in_flight(self) -> int:
        """The number of refunds that :meth:`work` has begun and not finished."""
        return self._worker.admission.in_flight if self._worker else 0

    async def work(
        self,
        session: RefundSession,
        *,
        concurrency: int = 20,
        wait: bool = True,
        on_outcome: Callable[[Outcome], object] = lambda _: None,
    ) -> None:
        """Process queued refunds with ``session`` until cancelled. The session's journal must be the queue's.

        With ``wait=False``, return when no job is due. ``concurrency``: maximum number of refunds in flight;
        ``on_outcome`` is called with each outcome. After a cancellation, the running refunds finish and the others go
        back into the queue; a second cancellation also cancels the running refunds. Signals are left to your program:
        ``asyncio.run`` turns Ctrl-C into a cancellation, but not SIGTERM. If every further refund would fail with the
        same error, the worker stops as if cancelled once, and raises ``BatchStopped`` or ``ConfigurationError``. A
        restart of the database also stops it with an error: let a supervisor start it again. A refund without
        ``notify_url`` is queued again if the merchant has none either.
        """
        if not isinstance(session.journal, PostgresJournal) or session.journal.id != await self._journal_id():
            raise ConfigurationError(
                f"work: the session needs a PostgresJournal with the queue's dsn and schema={self._names['queue']!r}"
            )
        check_function("on_outcome", on_outcome)
        self._worker = worker = SliceWorker(
            session,
            app=self.app,
            queues=[self._names["queue"]],
            concurrency=check_integer("concurrency", concurrency, least=1),
            wait=wait,
            on_outcome=on_outcome,
            delete_jobs="successful",
            install_signal_handlers=False,
            update_heartbeat_interval=self._rescue_after / 6,
            stalled_worker_timeout=self._rescue_after,
        )
        self.app.job_manager = SliceFetcher(worker)
        await self._requeue_lost(0)
        running = asyncio.ensure_future(worker.run())  # type: ignore[no-untyped-call]
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):  # a cancelled scope cancels each wait in it again, unless shielded
                while not running.done():
                    worker.interrupt()
                    with suppress(asyncio.CancelledError):
                        await asyncio.shield(running)
            raise
        if worker.failure is not None:
            raise worker.failure
        if worker.is_stopping:
            raise LianLianError(
                "work: procrastinate has stopped this worker; its log names the cause, such as a restart of the "
                "database. Start the worker again"
            )

    def _sql(self, statement: LiteralString) -> str:
        return SQL(statement).format(schema=Identifier(self._names["queue"])).as_string()

    async def _journal_id(self) -> str | None:
        try:
            return cast("str", (await self.app.connector.execute_query_one_async(self._sql(_JOURNAL)))["id"])
        except ConnectorException as error:
            if isinstance(error.__cause__, UndefinedTable):
                return None
            raise

    async def _run_slice(self, context: JobContext, /, **_: Any) -> None:
        worker = self._working()
        jobs = await Slice(worker, context.job).run()
        try:
            await self._put(jobs)  # the follow-up jobs are committed before this job ends
        except Exception as error:
            worker.fail(error)  # the job is retried, by procrastinate or, if it stays `doing`, by another worker
            raise

    def _working(self) -> SliceWorker:
        if self._worker is None:
            raise RuntimeError(
                "no session for this refund job: start the worker with RefundQueue.work(session), "
                "not with procrastinate's own command"
            )
        return self._worker

    async def _requeue_lost(self, timestamp: int) -> None:
        """Queue jobs of dead workers and unresolved refunds without a job again; delete decided failed jobs."""
        session, connector = self._working().session, self.app.connector
        for job in await connector.execute_query_all_async(_RESCUE, **self._names, seconds=self._rescue_after):
            cause = "its worker is dead or lacks its task, or the database's clock was set"
            logger.warning("job %s is set to %s: %s", job["id"], job["status"], cause)
        await connector.execute_query_async(self._sql(_DELETE_DECIDED), **self._names)
        found = await connector.execute_query_all_async(self._sql(_LOST), **self._names)
        for start in range(0, len(found), self._slice_size):
            refunds = [row["refund"] for row in found[start : start + self._slice_size]]
            if lost := [refund for refund in refunds if await _is_open(session, refund)]:
                await self._put([follow_up(lost, tries=1)])
                logger.warning("%d refunds are queued again: no started or follow-up job contains them", len(lost))


async def _chunks(items: AsyncIterable[T], size: int) -> AsyncGenerator[list[T]]:
    chunk = list[T]()
    async for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _is_open(session: RefundSession, refund: Mapping[str, str]) -> bool:
    """Return whether a refund is unresolved and no call may still send it; a call that queries may have the lease."""
    entry = await cast("PostgresJournal", session.journal).find(refund["no_refund"])
    if entry is None or entry.ending is not None or entry.sent_at is None:
        return False
    return entry.sent_at.boot <= session.clock().boot
