"""Slices of a refund queue: one procrastinate job contains many refunds, and a worker makes them with ``refund_many``.

Two slices may contain the same refund, and a slice may run twice: the journal prevents a second refund.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Final

from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job
from procrastinate.manager import JobManager
from procrastinate.worker import Worker
from psycopg.errors import ForeignKeyViolation

from lianlian_async import errors
from lianlian_async.batch import refund_many
from lianlian_async.models import RefundRequest
from lianlian_async.outcome import Outcome
from lianlian_async.secret import drop_secrets
from lianlian_async.session import RefundSession
from lianlian_async.signature_watch import Admission

logger = logging.getLogger("lianlian_async")

TASK: Final = "lianlian:refunds"
_LONG_PAUSE: Final = 900.0
"""Seconds until a refund is due again: after some rejections (see ``_keep``), or without a ``notify_url``."""
# procrastinate's own heartbeat does not register a worker again after another worker has removed it.
_HEARTBEAT: Final = """
INSERT INTO procrastinate_workers (id) OVERRIDING SYSTEM VALUE VALUES (%(worker_id)s)
ON CONFLICT (id) DO UPDATE SET last_heartbeat = now()
"""


def follow_up(
    refunds: list[Any], tries: int, seconds: float = 0.0, cause: str | None = None, *, failed: bool = False
) -> dict[str, Any]:
    """Return a job that is due after ``seconds`` and has a higher priority than new slices.

    ``tries``: number of runs that may have sent its refunds; ``cause``: why it is queued, or has ``failed``.
    """
    args = {"refunds": refunds, "tries": tries} | ({"cause": cause} if cause else {})
    return {"priority": 1, "status": "failed" if failed else "todo", "seconds": seconds, "args": args}


class SliceWorker(Worker):
    """A procrastinate worker whose slices share one session and one limit of concurrent refunds."""

    def __init__(
        self, session: RefundSession, *, concurrency: int, on_outcome: Callable[[Outcome], object], **options: Any
    ) -> None:
        super().__init__(concurrency=concurrency, **options)
        self.session = session
        self.on_outcome = on_outcome
        self.admission = Admission(session.signatures, concurrency)
        self.failure: Exception | None = None
        """The error that stopped the worker."""
        self.is_stopping = False
        self.needs_more = asyncio.Event()
        """Set while fewer than ``concurrency`` fetched refunds wait, or the worker stops; else no job is fetched."""
        self._waiting = 0
        self.add_waiting(0)

    def stop(self) -> None:
        """Start no further refund, and end after the running refunds have finished."""
        self.is_stopping = True
        self.needs_more.set()
        super().stop()  # type: ignore[no-untyped-call]

    def interrupt(self) -> None:
        """Stop; if already stopping, cancel the running slices: procrastinate queues them again."""
        for job in self._running_jobs if self.is_stopping else ():
            job.cancel()
        self.stop()

    def fail(self, error: Exception) -> None:
        """Stop because of ``error``."""
        self.failure = self.failure or error
        self.stop()

    def add_waiting(self, number: int) -> None:
        """Add ``number`` fetched refunds to the waiting ones; a negative ``number`` removes them."""
        self._waiting += number
        (self.needs_more.set if self._waiting < self.concurrency or self.is_stopping else self.needs_more.clear)()

    @property
    def finished(self) -> int:
        """The number of refunds in running slices that are neither waiting nor in flight."""
        jobs = [context.job for context in self._running_jobs.values()]
        refunds = sum(len(_rows(job)) for job in jobs if job.task_name == TASK)
        return max(0, refunds - self._waiting - self.admission.in_flight)


class SliceFetcher(JobManager):
    """Fetches a job only when its worker needs more refunds, and none after the worker was stopped.

    A suspended worker continues later, even if another worker has removed it from the table of workers.
    """

    def __init__(self, worker: SliceWorker) -> None:
        super().__init__(worker.app.connector)
        self._worker = worker

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        """Return the next job, or None."""
        await self._worker.needs_more.wait()
        try:
            job = None if self._worker.is_stopping else await super().fetch_job(queues=queues, worker_id=worker_id)
        except ConnectorException as error:
            if not isinstance(error.__cause__, ForeignKeyViolation):
                raise
            await self.update_heartbeat(worker_id)  # a fetched job refers to its worker's row
            return await self.fetch_job(queues, worker_id)
        arguments: Any = job and job.task_kwargs
        if job is not None and not isinstance(arguments, dict):  # procrastinate and `_rows` need an object
            job = job.evolve(task_kwargs={"refunds": [arguments]})
        if job is not None and job.task_name == TASK:
            self._worker.add_waiting(len(_rows(job)))
        return job

    async def listen_for_jobs(self, **options: Any) -> None:
        """Listen for new jobs. An error, which procrastinate logs, loses its frames: they contain the password."""
        try:
            await super().listen_for_jobs(**options)
        except Exception as error:
            drop_secrets(error)
            raise

    async def update_heartbeat(self, worker_id: int) -> None:
        """Set the time of the worker's last heartbeat; register the worker again if necessary."""
        await self.connector.execute_query_async(_HEARTBEAT, worker_id=worker_id)


class Slice:
    """The unfinished refunds of one job."""

    def __init__(self, worker: SliceWorker, job: Job) -> None:
        self._worker = worker
        tries = job.task_kwargs.get("tries")
        # An earlier run may have sent these refunds, even if the journal has lost them: tries > 0 queries them first.
        self._tries = max(tries if isinstance(tries, int) else 0, min(job.attempts, 1))
        self._pause = min(2.0 ** min(self._tries, 9), 300.0)  # seconds, after a failure of the network or the journal
        self._unread = _rows(job)[::-1]
        self._under_way = dict[int, RefundRequest]()
        self._failed: list[dict[str, Any]] = []
        self._cause: Any = job.task_kwargs.get("cause")
        self._again = dict[tuple[int, str], dict[str, Any]]()
        """Follow-up jobs, by their delay in whole seconds and by cause."""

    async def run(self) -> list[dict[str, Any]]:
        """Make the refunds; return follow-up jobs for those that are not finished."""
        worker, pause = self._worker, 0.0
        outcomes = refund_many(
            worker.session, self._requests(), concurrency=worker.concurrency, query_first=self._tries > 0
        )
        try:
            async with aclosing(outcomes):
                async for outcome in outcomes:
                    del self._under_way[id(outcome.request)]
                    worker.admission.release()
                    if outcome.error is not None:
                        self._keep(outcome.request, outcome.error)
                    worker.on_outcome(outcome)  # after _keep, because it may raise
        except errors.JournalError as error:
            logger.warning("%d refunds are queued again: %s", len(self._unread), error)
            pause = self._pause
        except Exception as error:  # noqa: BLE001 - it stops the worker, and the queue's `work` raises it
            worker.fail(error)
        finally:
            for _ in self._under_way:
                worker.admission.release()
            worker.add_waiting(-len(self._unread))
        for request in self._under_way.values():
            self._retry(request, 0.0, "interrupted")
        rest = [follow_up(self._unread[::-1], self._tries, pause, self._cause)] if self._unread else []
        return [*self._failed, *self._again.values(), *rest]

    async def _requests(self) -> AsyncGenerator[RefundRequest]:
        """Yield each readable refund when it may start."""
        worker = self._worker
        while self._unread:
            await worker.admission.acquire()
            if worker.is_stopping:
                worker.admission.release()
                return
            row = self._unread.pop()
            worker.add_waiting(-1)
            try:
                request = _read(row)
            except errors.InvalidRequest as error:
                worker.admission.release()
                self._fail(row, error)
            else:
                self._under_way[id(request)] = request
                yield request

    def _keep(self, request: RefundRequest, error: errors.LianLianError) -> None:
        """Add the refund to a follow-up job or a failed job; a permanent rejection needs neither."""
        match error:
            case errors.RefundOutcomeUnknown():
                seconds = (error.ask_again_at - self._worker.session.clock().wall).total_seconds()
                self._retry(request, seconds, f"unknown: {error.reason}")
            case errors.RefundNotSent():
                self._retry(request, self._pause, f"not sent: {error.last_error}")
            case errors.JournalError():
                self._retry(request, self._pause, "journal error")
            case errors.RefundRejected():
                if error.stops_batch:
                    self._worker.stop()
                if error.stops_batch or error.may_pass:
                    self._retry(request, _LONG_PAUSE, f"rejected: {error.ret_code} {error.meaning}")
            case errors.InvalidRequest():  # the row is valid, but neither it nor the merchant has a notify_url
                logger.warning("refund %s: %s", request.no_refund, error)
                self._retry(request, _LONG_PAUSE, str(error))
            case _:
                self._fail(request.to_dict(), error)

    def _retry(self, request: RefundRequest, seconds: float, cause: str) -> None:
        job = self._again.setdefault((int(seconds), cause), follow_up([], self._tries + 1, seconds, cause))
        job["args"]["refunds"].append(request.to_dict())
        job["seconds"] = max(job["seconds"], seconds)

    def _fail(self, row: Any, error: errors.LianLianError) -> None:
        logger.error("a person has to decide about a refund: %s", error)
        self._failed.append(follow_up([row], self._tries + 1, cause=str(error), failed=True))


def _rows(job: Job) -> list[Any]:
    """Return the refunds in ``job`` as stored. They may have any form: other programs can add jobs."""
    refunds = job.task_kwargs.get("refunds")
    return refunds if isinstance(refunds, list) else [refunds]


def _read(row: Any) -> RefundRequest:
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise errors.InvalidRequest([errors.Problem("refunds", "must be objects of strings", type(row).__name__)])
    return RefundRequest.from_record(row)
