"""Refunds as jobs of procrastinate, on PostgreSQL: from one process to a fleet (extra ``postgres``, asyncio only).

To queue a refund in the transaction that marks its order, pass the connection of that transaction::

    # SQLAlchemy (postgresql+psycopg), with an AsyncSession
    raw = await (await session.connection()).get_raw_connection()
    await queue.enqueue([request], connection=raw.driver_connection)

    # Django, in transaction.atomic(): its connection is a synchronous one
    with connection.cursor() as cursor:
        cursor.execute(*queue.statement([request]))
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from types import TracebackType
from typing import Any, Final, LiteralString, Self, TypeVar, cast

import anyio
from procrastinate import App, JobContext, PsycopgConnector, RetryStrategy
from psycopg import AsyncConnection, AsyncCursor
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from lianlian_async.errors import ConfigurationError
from lianlian_async.journal.postgres import PostgresJournal, connection_string
from lianlian_async.models import RefundRequest
from lianlian_async.session import RefundSession
from lianlian_async.settings import check_integer, check_type, is_number
from lianlian_async.worker_pool import iterate

from .slices import TASK, Slice, SliceFetcher, SliceWorker, follow_up

__all__ = ["RefundQueue"]

T = TypeVar("T")

logger = logging.getLogger("lianlian_async")

_SLICES: Final = 10
"""How many slices one statement inserts."""
# One statement, which can be part of anyone's transaction. The database's clock says when a job is due.
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
_FAILURES: Final = """
SELECT args->'refunds'->0->>'no_refund' AS no_refund, args->>'cause' AS cause FROM procrastinate_jobs
WHERE queue_name = %(queue)s AND task_name = %(task)s AND status = 'failed' ORDER BY id LIMIT %(limit)s
"""
_RESCUE: Final = """
UPDATE procrastinate_jobs AS job
SET status = 'todo', attempts = attempts + 1, scheduled_at = NULL, abort_requested = false
WHERE status = 'doing' AND queue_name = %(queue)s AND NOT EXISTS (
    SELECT FROM procrastinate_workers AS worker
    WHERE worker.id = job.worker_id AND last_heartbeat >= now() - %(seconds)s * interval '1 s'
) RETURNING id
"""
# Not in slices that no worker has begun: those may wait for long.
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
"""Seconds after which a transaction that is idle, and a connection whose other end is gone, are given up."""


async def _limit_idle_transactions(connection: AsyncConnection[Any]) -> None:
    """A worker that hangs within a transaction must not keep the others from the rows that it has locked."""
    await connection.execute(f"SET idle_in_transaction_session_timeout = '{_TIMEOUT:.0f}s'")
    await connection.commit()


class RefundQueue:
    """A queue of refunds in the PostgreSQL database ``dsn``, for any number of producers and workers.

    A job carries a slice of ``slice_size`` refunds. The journal, which all workers share, records the outcome of each
    refund. One that stays unknown is queued again for its ``ask_again_at``; one that needs a person, such as
    a ``RefundConflict`` or a row that cannot be read, becomes a failed job (:meth:`failures`).
    """

    def __init__(self, dsn: str, *, queue: str = "lianlian", rescue_after: float = 60.0, slice_size: int = 200) -> None:
        """``rescue_after``: seconds without a sign of life after which a worker's jobs are given to others; at least 1.

        Raises ``ConfigurationError``: a worker that lives would be taken for dead, even by itself, between two signs.
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
        await self.app.open_async()
        if not await self.app.check_connection_async():
            await self.app.schema_manager.apply_schema_async()
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
        """Put refunds into the queue, in bulk, and return how many. Doing it again is harmless: the journal knows them.

        With ``connection``, a psycopg connection to the queue's database, they are all inserted in its open
        transaction, in a savepoint, and workers see them when the caller commits. Raises ``ConfigurationError`` if it
        leads to another database, or has no open transaction.
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
                else:  # whatever factories the caller has set
                    await AsyncCursor(connection, row_factory=tuple_row).execute(statement, parameters)
                number += len(chunk)
        return number

    async def _check(self, connection: AsyncConnection[Any]) -> None:
        check_type("connection", connection, AsyncConnection)
        theirs = await AsyncCursor(connection, row_factory=tuple_row).execute(_DATABASE)
        ours = await self.app.connector.execute_query_one_async(_DATABASE)
        if await theirs.fetchone() != (ours["id"],):
            raise ConfigurationError(
                "connection: leads to another database or schema than the queue's; pass a connection to the queue's own"
            )
        if connection.info.transaction_status == TransactionStatus.IDLE:
            raise ConfigurationError("connection: has no open transaction; enqueue in `async with conn.transaction()`")

    def statement(self, requests: Iterable[RefundRequest]) -> tuple[LiteralString, dict[str, str]]:
        """Return the SQL statement that puts ``requests`` into the queue, and its parameters in psycopg's form.

        For connections that :meth:`enqueue` cannot use; it does not check whether they lead to the queue's database.
        """
        rows, size = [request.to_dict() for request in requests], self._slice_size
        slices = [{"refunds": rows[start : start + size]} for start in range(0, len(rows), size)]
        jobs = [{"priority": 0, "status": "todo", "args": args} for args in slices]
        return _INSERT, self._names | {"jobs": json.dumps(jobs)}

    async def _put(self, jobs: list[dict[str, Any]]) -> None:
        await self.app.connector.execute_query_async(_INSERT, **self._names, jobs=json.dumps(jobs))

    async def counts(self) -> Mapping[str, int]:
        """How many refunds are ``waiting``, to be looked at ``later``, ``at_work``, ``failed``; and the ``workers``.

        All refunds of a slice that a worker holds are ``at_work``. What is done stands in the journal only. Workers are
        all that have given a sign of life lately.
        """
        return await self.app.connector.execute_query_one_async(_COUNT, **self._names, seconds=self._rescue_after)

    async def failures(self, limit: int = 20) -> Sequence[Mapping[str, str | None]]:
        """Return the oldest refunds that need a person: ``no_refund`` (None if it cannot be read) and ``cause``."""
        return await self.app.connector.execute_query_all_async(_FAILURES, **self._names, limit=limit)

    async def work(self, session: RefundSession, *, concurrency: int = 20, wait: bool = True) -> None:
        """Finish refunds with ``session``, which needs a ``PostgresJournal``; until cancelled, or done if not ``wait``.

        ``concurrency`` bounds the refunds at the same time. Cancelled, or stopped by SIGINT or SIGTERM, it finishes
        what it has begun and puts the rest back. Raises :class:`BatchStopped` on a rejection that stops a batch, or
        where the gateway's answers do not verify; the refunds go back into the queue.
        """
        if not isinstance(session.journal, PostgresJournal):
            raise ConfigurationError("work: the session needs a PostgresJournal, which all workers share")
        self._worker = worker = SliceWorker(
            session,
            app=self.app,
            queues=[self._names["queue"]],
            concurrency=check_integer("concurrency", concurrency, least=1),
            wait=wait,
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
            worker.stop()
            with anyio.CancelScope(shield=True):  # a cancelled scope would cancel again and again
                await running
            raise
        if worker.failure is not None:
            raise worker.failure

    async def _run_slice(self, context: JobContext, /, **_: Any) -> None:
        worker = self._working()
        jobs = await Slice(worker, context.job).run()
        try:
            await self._put(jobs)  # committed before this job ends
        except Exception as error:
            worker.fail(error)  # a job that its worker cannot end is rescued when that is gone
            raise

    def _working(self) -> SliceWorker:
        if self._worker is None:
            raise RuntimeError("refund jobs run in RefundQueue.work, which brings the session")
        return self._worker

    async def _tend(self, timestamp: int) -> None:
        """Give the jobs of dead workers to others, and queue open refunds that no job holds."""
        session, queue, connector = self._working().session, self._names["queue"], self.app.connector
        for job in await connector.execute_query_all_async(_RESCUE, queue=queue, seconds=self._rescue_after):
            logger.warning("job %s was left by a dead worker, it is run again", job["id"])
        async with aclosing(_chunks(_open_refunds(session), self._slice_size)) as chunks:
            async for refunds in chunks:
                found = await connector.execute_query_all_async(_HELD, **self._names, refunds=refunds)
                held = [row["refund"] for row in found]
                if free := [refund for refund in refunds if refund not in held]:
                    await self._put([follow_up(free, tries=1)])
                    logger.warning("%d open refunds that no job held are queued again", len(free))


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
    """The refunds that may have been made, and on which no lease is held. What was never sent stays as it is."""
    async for entry in cast("PostgresJournal", session.journal).unresolved():
        if entry.sent_at is not None and entry.sent_at.boot <= session.clock().boot:
            yield dict(entry.fields)
