"""A queue of refunds for one or many worker processes: procrastinate jobs in PostgreSQL (extra ``postgres``, asyncio).

To queue a refund in the transaction that updates its order, pass the connection of that transaction::

    # SQLAlchemy (postgresql+psycopg), with an AsyncSession
    raw = await (await session.connection()).get_raw_connection()
    await queue.enqueue([request], connection=raw.driver_connection)

    # Django, in transaction.atomic(), where the connection is synchronous
    with connection.cursor() as cursor:
        cursor.execute(*queue.statement([request]))
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext, suppress
from types import TracebackType
from typing import Any, Final, LiteralString, Self, TypeVar, cast

import anyio
from procrastinate import App, JobContext, PsycopgConnector, RetryStrategy
from psycopg import AsyncConnection, AsyncCursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from lianlian_async.background import complete
from lianlian_async.errors import ConfigurationError
from lianlian_async.journal.postgres import PostgresJournal, connection_string
from lianlian_async.models import RefundRequest
from lianlian_async.outcome import Outcome
from lianlian_async.session import RefundSession
from lianlian_async.settings import check_integer, check_type, is_number
from lianlian_async.worker_pool import iterate

from .slices import TASK, Slice, SliceFetcher, SliceWorker, follow_up

__all__ = ["RefundQueue"]

T = TypeVar("T")

logger = logging.getLogger("lianlian_async")

_SLICES: Final = 10
"""Slices that one statement inserts."""
# A single statement, so that it can run in the caller's transaction. Jobs become due by the database's clock.
_INSERT: Final = """
INSERT INTO procrastinate_jobs (queue_name, task_name, priority, args, status, scheduled_at)
SELECT %(queue)s, %(task)s, priority, args, status, clock_timestamp() + seconds * interval '1 second'
FROM jsonb_to_recordset(%(jobs)s::jsonb)
    AS job (priority int, args jsonb, status procrastinate_job_status, seconds float)
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
# The time of a job's first event is when it was queued. Only follow-up jobs (priority 1) have a cause.
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
# A job with a queueing lock would collide with its successor, which replaces it.
_RESCUE: Final = """
UPDATE procrastinate_jobs AS job
SET status = CASE WHEN queueing_lock IS NULL THEN 'todo' ELSE 'failed' END::procrastinate_job_status,
    attempts = attempts + 1, scheduled_at = NULL, abort_requested = false
WHERE status = 'doing' AND queue_name = %(queue)s AND NOT EXISTS (
    SELECT FROM procrastinate_workers AS worker
    WHERE worker.id = job.worker_id AND last_heartbeat >= now() - %(seconds)s * interval '1 s'
) RETURNING id, status
"""
# Find the refunds that a job already covers. Ignore slices that no worker has started: they may wait for a long time.
_HELD: Final = """
SELECT refund FROM procrastinate_jobs, jsonb_path_query(args, '$.refunds[*]') AS refund
WHERE queue_name = %(queue)s AND task_name = %(task)s AND refund = ANY(%(refunds)s)
    AND (status IN ('doing', 'failed') OR status = 'todo' AND (priority > 0 OR attempts > 0))
"""
_DATABASE: Final = """
SELECT concat_ws(' ', extract(epoch FROM pg_postmaster_start_time()), to_regclass('procrastinate_jobs')::oid,
    (SELECT oid FROM pg_database WHERE datname = current_database())) AS id
"""
_TIMEOUT: Final = 10.0
"""Timeout in seconds for idle transactions and half-open connections."""


async def _limit_idle_transactions(connection: AsyncConnection[Any]) -> None:
    """End the transaction of a worker that hangs, as its row locks block the other workers."""
    await connection.execute(f"SET idle_in_transaction_session_timeout = '{_TIMEOUT:.0f}s'")
    await connection.commit()


class RefundQueue:
    """A queue of refunds in the PostgreSQL database ``dsn``, for any number of producers and workers.

    A job contains a slice: up to ``slice_size`` refunds. All workers share one journal, which records the outcome of
    each refund. A refund that stays unknown is queued again for its ``ask_again_at``. A refund that needs a person
    (``RefundConflict``, or a row that cannot be read) becomes a failed job (:meth:`failures`).
    """

    def __init__(self, dsn: str, *, queue: str = "lianlian", rescue_after: float = 60.0, slice_size: int = 200) -> None:
        """``rescue_after``: seconds without a heartbeat after which other workers take over a worker's jobs.

        Raises ``ConfigurationError`` if it is less than 1: a live worker would count as dead between two heartbeats.
        """
        if not is_number(rescue_after) or rescue_after < 1:
            raise ConfigurationError(f"rescue_after: must be at least 1 second, is {rescue_after!r}")
        conninfo = connection_string(dsn, _TIMEOUT)
        self.app = App(connector=PsycopgConnector(conninfo=conninfo, configure=_limit_idle_transactions))
        self._names = {"queue": queue, "task": TASK}
        self._rescue_after = rescue_after
        self._slice_size = check_integer("slice_size", slice_size, least=1)
        self._worker: SliceWorker | None = None
        self.app.task(name=TASK, queue=queue, retry=RetryStrategy(wait=60), pass_context=True)(self._run_slice)
        tend = self.app.task(name="lianlian:tend", queue=queue, queueing_lock=f"tend {queue}", priority=2)(self._tend)
        self.app.periodic(cron="* * * * *", periodic_id=queue)(tend)

    async def __aenter__(self) -> Self:
        try:
            await self.app.open_async()
            if not await self.app.check_connection_async():
                await self.app.schema_manager.apply_schema_async()
        except BaseException:  # the tasks of a pool that stays open do not end when the event loop does
            await complete(self.app.close_async)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.app.close_async()

    async def enqueue(
        self,
        requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest],
        *,
        connection: AsyncConnection[Any] | None = None,
    ) -> int:
        """Insert refunds into the queue in bulk, and return their number.

        Idempotent: the journal prevents a second refund for the same ``no_refund``. With ``connection`` (psycopg), all
        are inserted in its open transaction, in a savepoint. Raises ``ConfigurationError`` if it has none, or leads to
        another database than the queue's.
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
                else:  # do not use the caller's cursor_factory and row_factory
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

        For connections that :meth:`enqueue` does not accept. It does not check that they lead to the same database.
        """
        rows, size = [request.to_dict() for request in requests], self._slice_size
        slices = [{"refunds": rows[start : start + size]} for start in range(0, len(rows), size)]
        jobs = [{"priority": 0, "status": "todo", "args": args} for args in slices]
        return _INSERT, self._names | {"jobs": json.dumps(jobs)}

    async def _put(self, jobs: list[dict[str, Any]]) -> None:
        await self.app.connector.execute_query_async(_INSERT, **self._names, jobs=json.dumps(jobs))

    async def counts(self) -> Mapping[str, int]:
        """Return the number of refunds by job status, and the number of live ``workers``.

        ``waiting``: due now; ``later``: scheduled; ``at_work``: in a slice that a worker has fetched; ``failed``.
        Finished refunds are in the journal only. A live worker had a heartbeat in the last ``rescue_after`` seconds.
        """
        return await self.app.connector.execute_query_one_async(_COUNT, **self._names, seconds=self._rescue_after)

    async def failures(self, limit: int = 20) -> Sequence[Mapping[str, str | None]]:
        """Return the oldest refunds that need a person: ``no_refund`` (None if it cannot be read) and ``cause``."""
        return await self.app.connector.execute_query_all_async(_FAILURES, **self._names, limit=limit)

    async def activity(self) -> Mapping[str, Any]:
        """Return numbers that show whether the queue moves.

        ``oldest_waiting_seconds``: of the refunds that are due, or None. ``queued_again``: the refunds that were begun
        and queued again, by cause. ``workers``: each with ``id``, ``heartbeat_seconds`` since its last heartbeat, and
        number of running ``slices``.
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
        """Process queued refunds with ``session`` (it needs a ``PostgresJournal``) until cancelled.

        With ``wait=False``, return when the queue is empty. ``concurrency``: maximum number of refunds in flight;
        ``on_outcome`` is called with each outcome. After a cancellation, SIGINT or SIGTERM, the running refunds finish
        and the others go back into the queue; a second one also cancels the running ones. The others also go back
        before :class:`BatchStopped` (see ``refund_many``) or :class:`InvalidRequest` (no ``notify_url``) is raised.
        """
        if not isinstance(session.journal, PostgresJournal):
            raise ConfigurationError("work: the session needs a PostgresJournal, which all workers share")
        self._worker = worker = SliceWorker(
            session,
            app=self.app,
            queues=[self._names["queue"]],
            concurrency=check_integer("concurrency", concurrency, least=1),
            wait=wait,
            on_outcome=on_outcome,
            delete_jobs="successful",
            update_heartbeat_interval=self._rescue_after / 6,
            stalled_worker_timeout=self._rescue_after,
        )
        self.app.job_manager = SliceFetcher(worker)
        await self._tend(0)
        running = asyncio.ensure_future(worker.run())  # type: ignore[no-untyped-call]
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):  # without it, a cancelled scope would cancel this wait again and again
                while not running.done():
                    worker.interrupt()
                    with suppress(asyncio.CancelledError):
                        await asyncio.shield(running)
            raise
        if worker.failure is not None:
            raise worker.failure

    async def _run_slice(self, context: JobContext, /, **_: Any) -> None:
        worker = self._working()
        jobs = await Slice(worker, context.job).run()
        try:
            await self._put(jobs)  # committed before this job ends
        except Exception as error:
            worker.fail(error)  # the job stays `doing`; another worker rescues it after this one has stopped
            raise

    def _working(self) -> SliceWorker:
        if self._worker is None:
            raise RuntimeError(
                "no session for this refund job: start the worker with RefundQueue.work(session), "
                "not with procrastinate's own command"
            )
        return self._worker

    async def _tend(self, timestamp: int) -> None:
        """Queue the jobs of dead workers again, and the open refunds that no job covers."""
        session, queue, connector = self._working().session, self._names["queue"], self.app.connector
        for job in await connector.execute_query_all_async(_RESCUE, queue=queue, seconds=self._rescue_after):
            logger.warning("job %s is set to %s: its worker is dead", job["id"], job["status"])
        async with aclosing(_chunks(_open_refunds(session), self._slice_size)) as chunks:
            async for refunds in chunks:
                found = await connector.execute_query_all_async(_HELD, **self._names, refunds=refunds)
                held = [row["refund"] for row in found]
                if free := [refund for refund in refunds if refund not in held]:
                    await self._put([follow_up(free, tries=1)])
                    logger.warning("%d open refunds are queued again: no job covered them", len(free))


async def _chunks(items: AsyncIterable[T], size: int) -> AsyncGenerator[list[T]]:
    chunk = list[T]()
    async for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _open_refunds(session: RefundSession) -> AsyncGenerator[dict[str, str]]:
    """Yield the refunds that may have been made and have no lease. Refunds that were never sent are not included."""
    async for entry in cast("PostgresJournal", session.journal).unresolved():
        if entry.sent_at is not None and entry.sent_at.boot <= session.clock().boot:
            yield dict(entry.fields)
