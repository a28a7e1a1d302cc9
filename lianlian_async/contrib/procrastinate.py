"""Refunds as jobs of procrastinate, on PostgreSQL: from one process to a fleet (extra ``postgres``, asyncio only)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Iterable, Mapping
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Final, Self

from procrastinate import App, BaseRetryStrategy, JobContext, PsycopgConnector, RetryDecision
from procrastinate.exceptions import AlreadyEnqueued, ConnectorException
from procrastinate.jobs import Job
from psycopg import AsyncConnection
from psycopg.errors import RaiseException

from lianlian_async.clock import Clock
from lianlian_async.errors import (
    BatchStopped,
    ConfigurationError,
    JournalError,
    LianLianError,
    RefundNotSent,
    RefundOutcomeUnknown,
    RefundRejected,
    SignatureInvalid,
)
from lianlian_async.journal.postgres import connection_string
from lianlian_async.models import RefundRequest
from lianlian_async.session import RefundSession
from lianlian_async.settings import is_number
from lianlian_async.signature_watch import Admission
from lianlian_async.worker_pool import iterate

__all__ = ["RefundQueue"]

logger = logging.getLogger("lianlian_async")

_CHUNK: Final = 500
_WAITING: Final = """
SELECT queueing_lock FROM procrastinate_jobs WHERE status = 'todo' AND queueing_lock = ANY(%(locks)s)
"""
_COUNT: Final = """
SELECT
    count(*) FILTER (WHERE status = 'todo' AND coalesce(scheduled_at <= now(), true)) AS waiting,
    count(*) FILTER (WHERE status = 'todo' AND scheduled_at > now()) AS later,
    count(*) FILTER (WHERE status = 'doing') AS at_work,
    count(*) FILTER (WHERE status = 'failed') AS failed,
    (
        SELECT count(*) FROM procrastinate_workers WHERE last_heartbeat > now() - %(seconds)s * interval '1 second'
    ) AS workers
FROM procrastinate_jobs WHERE queue_name = %(queue)s AND task_name = %(task)s
"""
_NOW: Final = "SELECT clock_timestamp() AS now"
_MENDING_SECONDS: Final = 900.0
"""How long a job rests whose refund was rejected, but may be sent again."""


_TIMEOUT: Final = 10.0
"""Seconds after which a transaction that is idle, and a connection whose other end is gone, are given up."""


async def _limit_idle_transactions(connection: AsyncConnection[Any]) -> None:
    """A worker that hangs within a transaction must not keep the others from the rows that it has locked."""
    await connection.execute(f"SET idle_in_transaction_session_timeout = '{_TIMEOUT:.0f}s'")
    await connection.commit()


class _ByOutcome(BaseRetryStrategy):
    """An unknown refund is asked about when that can decide; what was not sent is sent after a growing pause.

    The database's clock decides when a job is due: pauses are added to that one, by the boot clock since ``start``.
    """

    def start(self, clock: Clock, database: datetime) -> None:
        """Begin to read ``clock`` now, when the database's shows ``database``."""
        self._clock, self._boot, self._database = clock, clock().boot, database

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision | None:
        match exception:
            case RefundOutcomeUnknown():
                seconds = (exception.ask_again_at - self._clock().wall).total_seconds()
            case RefundNotSent() | JournalError() | BatchStopped():
                seconds = min(2 ** min(job.attempts, 9), 300)
            case RefundRejected():
                seconds = _MENDING_SECONDS
            case _:
                return None
        passed = self._clock().boot - self._boot
        return RetryDecision(retry_at=self._database + timedelta(seconds=passed + seconds))


class RefundQueue:
    """A queue of refunds in the PostgreSQL database ``dsn``, for any number of producers and workers.

    ::

        async with RefundQueue(dsn) as queue:
            await queue.enqueue(requests)

        # on each worker
        async with (
            PostgresJournal(dsn) as journal,
            RefundSession(Merchant.from_env(), journal=journal) as session,
            RefundQueue(dsn) as queue,
        ):
            await queue.work(session, concurrency=20)

    What became of each refund stands in the journal, which all workers share. A job fails for good only for
    what a person has to look at, such as a ``RefundConflict``.
    """

    def __init__(self, dsn: str, *, queue: str = "lianlian", rescue_after: float = 60.0) -> None:
        """``rescue_after``: seconds without a sign of life after which a worker's jobs are given to others; at least 1.

        Raises ``ConfigurationError``: a worker that lives would be taken for dead, even by itself, between two signs.
        """
        if not is_number(rescue_after) or rescue_after < 1:
            raise ConfigurationError(f"rescue_after: must be at least 1 second, is {rescue_after!r}")
        conninfo = connection_string(dsn, _TIMEOUT)
        self.app = App(connector=PsycopgConnector(conninfo=conninfo, configure=_limit_idle_transactions))
        self._queue = queue
        self._rescue_after = rescue_after
        self._session: RefundSession | None = None
        self._worker: asyncio.Task[None] | None = None
        self._failure: BatchStopped | None = None
        self._retry = _ByOutcome()
        task = self.app.task(name="lianlian:refund", queue=queue, retry=self._retry, pass_context=True)
        self._task = task(self._refund)
        rescue = self.app.task(name="lianlian:rescue", queue=queue, queueing_lock="lianlian:rescue")(self._rescue)
        self.app.periodic(cron="* * * * *")(rescue)

    async def __aenter__(self) -> Self:
        await self.app.open_async()
        if not await self.app.check_connection_async():
            await self.app.schema_manager.apply_schema_async()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.app.close_async()

    async def enqueue(self, requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest]) -> int:
        """Put refunds into the queue, in bulk; how many were not waiting there already.

        Doing it again is harmless: a refund waits in the queue once, and the journal knows it when it comes again.
        """
        added, chunk = 0, list[Job]()
        async for request in iterate(requests):
            number = f"{self._queue} {request.no_refund}"
            deferrer = self._task.configure(lock=number, queueing_lock=number)
            chunk.append(deferrer.make_new_job(fields=dict(request.to_dict())))
            if len(chunk) == _CHUNK:
                added += await self._add(chunk)
                chunk.clear()
        return added + (await self._add(chunk) if chunk else 0)

    async def _add(self, jobs: list[Job]) -> int:
        while True:
            rows = await self.app.connector.execute_query_all_async(_WAITING, locks=[job.queueing_lock for job in jobs])
            waiting = {row["queueing_lock"] for row in rows}
            new = [job for job in jobs if job.queueing_lock not in waiting]
            try:
                await self.app.job_manager.batch_defer_jobs_async(new)
            except AlreadyEnqueued:
                continue  # another producer came in between: look again
            return len(new)

    async def counts(self) -> Mapping[str, int]:
        """How many refunds are ``waiting``, to be looked at ``later``, ``at_work``, ``failed``; and the ``workers``.

        What is done stands in the journal only. Workers are all that have given a sign of life lately.
        """
        return await self.app.connector.execute_query_one_async(
            _COUNT, queue=self._queue, task=self._task.name, seconds=self._rescue_after
        )

    async def work(self, session: RefundSession, *, concurrency: int = 20, wait: bool = True) -> None:
        """Finish refunds with ``session``, which needs a ``PostgresJournal``; until cancelled, or done if not ``wait``.

        Raises :class:`BatchStopped` on a rejection that stops a batch, or where the gateway's answers do not verify;
        the refunds go back into the queue.
        """
        self._session = session
        self._admission = Admission(session.signatures)
        self._failure = None
        self._retry.start(session.clock, (await self.app.connector.execute_query_one_async(_NOW))["now"])
        await self._rescue(0)
        self._worker = asyncio.ensure_future(
            self.app.run_worker_async(
                queues=[self._queue],
                concurrency=concurrency,
                wait=wait,
                delete_jobs="successful",
                update_heartbeat_interval=self._rescue_after / 6,
                stalled_worker_timeout=self._rescue_after,
            )
        )
        try:
            await self._worker
        except asyncio.CancelledError:
            if self._failure is None:
                raise
        if self._failure is not None:
            raise self._failure

    async def _refund(self, context: JobContext, fields: dict[str, Any]) -> None:
        if self._session is None or self._worker is None:
            raise RuntimeError("refund jobs run in RefundQueue.work, which brings the session")
        job, request = context.job, RefundRequest.from_record(fields)
        error: LianLianError | None
        await self._admission.enter()
        try:
            if self._failure is None:
                # What was begun before may have been sent, whatever the journal has lost of it.
                error = (await self._session.outcome_of(request, query_first=job.attempts > 0)).error
            else:  # it came while this refund waited, and nothing of this one was sent
                error = BatchStopped(self._failure.cause)
        finally:
            if (failure := self._session.signatures.failure()) is not None:
                self._stop(self._worker, failure)
            self._admission.leave()
        if isinstance(error, RefundRejected):
            logger.warning("%s", error)
            if error.stops_batch:
                self._stop(self._worker, error)
            elif not error.may_pass:
                return
        if error is not None:
            raise error

    def _stop(self, worker: asyncio.Task[None], cause: RefundRejected | SignatureInvalid) -> None:
        if self._failure is None:  # a second cancellation would not let the running jobs end
            self._failure = BatchStopped(cause)
            worker.cancel()

    async def _rescue(self, timestamp: int) -> None:
        """Give the jobs of dead workers to others; the journal makes that safe."""
        for job in await self.app.job_manager.get_stalled_jobs(seconds_since_heartbeat=self._rescue_after):
            try:
                await self.app.job_manager.retry_job(job)
            except ConnectorException as error:
                if not isinstance(error.__cause__, RaiseException):
                    raise
                logger.info("job %s was left by a dead worker, another worker has rescued it", job.id)
            else:
                logger.warning("job %s was left by a dead worker, it is run again", job.id)
