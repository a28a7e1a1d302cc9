"""Batches: ``refund_many`` takes any number of requests and yields one outcome for each, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar

import anyio
import attrs

from .background import BackgroundTask
from .errors import BatchStopped, InvalidRequest, JournalError, Problem, RefundOutcomeUnknown, RefundRejected
from .journal import Journal
from .models import RefundRequest
from .outcome import Outcome
from .session import RefundSession
from .settings import check_journal, check_type
from .signature_watch import Admission
from .worker_pool import Handover, checked, iterate, run_workers

__all__ = ["Outcomes", "refund_many"]

T = TypeVar("T")


def refund_many(
    session: RefundSession,
    requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest],
    *,
    concurrency: int | None = None,
    journal: Journal | None = None,
    keep_going: bool = False,
    wait_unknown: bool = False,
    query_first: bool = False,
) -> Outcomes:
    """Have many refunds made, and yield one :class:`~lianlian_async.Outcome` for each request, as they end.

    ::

        async for outcome in refund_many(session, requests, journal=journal):
            ...

    Requests are taken only as fast as outcomes are: memory depends on ``concurrency``, not on the input's length.
    A single refund's error never disturbs another; an item that is no ``RefundRequest`` has an outcome, too, with
    ``InvalidRequest`` as its error and the item itself as its request: nothing is sent for it.
    Leaving the loop early, or being cancelled in it, ends the batch: no further request is taken, and a refund that
    was under way stays unresolved in the journal. Whoever keeps the iterator in a variable ends it with ``aclose``, or
    uses it in ``async with``.

    Args:
        session: an open session.
        requests: any iterable or async iterable, iterated in a task of the batch's own; an exception of it ends the
            batch after the running ones. An async generator is closed when the batch ends.
        concurrency: refunds at the same time; by default the session's ``max_connections``.
        journal: an open journal; by default the session's own.
        keep_going: do not stop at a rejection that every further refund would meet; answers that do not verify stop the
            batch all the same.
        wait_unknown: keep what stays unknown until all others are done, wait for each one's ``ask_again_at``
            and ask once more; only these are held in memory.
        query_first: query before a refund is sent that is new in the journal, as ``RefundSession(query_first=True)``.

    Raises:
        BatchStopped: at the end of the iteration, where a rejection's ``stops_batch`` stopped it, or answers about four
            refunds in a row without a valid signature. Until one answer has verified, at most four are under way.
        JournalError: at the end of the iteration, where the journal failed: nothing more was sent.
        LianLianError: at the end of the iteration, where something cancelled the batch, or a task of it, from outside
            or within. Refunds that were under way may have been made.
        BaseException: whatever else a layer of the caller's own raised, at the end of the iteration.
    """
    check_type("session", session, RefundSession)
    check_journal(journal)
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable | AsyncIterable):
        raise InvalidRequest([Problem("requests", "must be an iterable of RefundRequest", type(requests).__name__)])
    run = _Run(
        session,
        requests,
        concurrency=session.max_connections if concurrency is None else checked(concurrency),
        journal=journal,
        keep_going=keep_going,
        wait_unknown=wait_unknown,
        query_first=query_first,
    )
    return Outcomes(run)


class Outcomes(AsyncIterator[Outcome]):
    """The iterator that ``refund_many`` returns. Dropping it ends the batch; ``aclose`` waits for that end.

    Waiting for an outcome may be cancelled, by a timeout say: none is lost, and the batch goes on.
    """

    def __init__(self, run: _Run) -> None:
        # The running tasks know the run, never this object: so that dropping it is noticed at once.
        self._run = run
        self._background: BackgroundTask | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[Outcome]:
        # No coroutine of its own: a cancellation's traceback would hold its frame, and that would hold this object.
        if self._background is None and not self._closed:
            self._background = BackgroundTask(self._run.work, self._run.end)
        return self._run.next()

    async def aclose(self) -> None:
        """End the batch: cancel what is under way, and wait until it has stopped."""
        self._closed = True
        self._run.found.end()
        if self._background is not None:
            await self._background.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._background is not None:
            self._background.cancel_soon()


class _Run:
    """One batch: what it is given, how far it is, and what it has found out."""

    def __init__(
        self,
        session: RefundSession,
        requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest],
        *,
        concurrency: int,
        journal: Journal | None,
        keep_going: bool,
        wait_unknown: bool,
        query_first: bool,
    ) -> None:
        self._session = session
        self._requests = requests
        self._concurrency = concurrency
        self._journal = journal
        self._keep_going = keep_going
        self._wait_unknown = wait_unknown
        self._query_first = query_first
        self._admission = Admission(session.signatures)
        self._unknown: list[tuple[RefundOutcomeUnknown, Outcome]] = []
        self._intake = anyio.CancelScope()
        self._failure: BaseException | None = None  # what the iteration ends in, once all that was begun has been told
        self.found = Handover[Outcome]()

    async def next(self) -> Outcome:
        """The next outcome that is found."""
        try:
            return await self.found.take()
        except anyio.EndOfStream:
            failure, self._failure = self._failure, None
        raise failure or StopAsyncIteration

    async def work(self) -> None:
        """Carry out all requests, then ask once more about what is unknown."""
        await self._drain(self._admitted(), self._refund)
        await self._drain(self._due(), self._resolve)
        for _, outcome in self._unknown:  # the batch has stopped
            await self.found.give(outcome)

    def end(self, error: BaseException | None) -> None:
        """Release the consumer: :meth:`work` has ended, in ``error`` if it was not complete."""
        self._failure = self._failure or error
        self.found.end()

    async def _drain(self, items: Iterable[T] | AsyncIterable[T], handle: Callable[[T], Awaitable[None]]) -> None:
        if self._failure is None:
            self._intake = anyio.CancelScope()
            try:
                await run_workers(items, handle, workers=self._concurrency, intake=self._intake)
            except BaseException as error:
                at_once = KeyboardInterrupt, SystemExit, GeneratorExit, anyio.get_cancelled_exc_class()
                if isinstance(error, at_once):
                    raise
                self._stop(error)  # it is raised where the batch is consumed

    def _stop(self, reason: BaseException) -> None:
        self._failure = self._failure or reason
        self._intake.cancel()

    async def _admitted(self) -> AsyncGenerator[RefundRequest]:
        """The requests, each taken only when it may be begun."""
        async with aclosing(iterate(self._requests)) as source:
            while True:
                await self._admission.enter()
                try:
                    request = await anext(source)
                except StopAsyncIteration:
                    return
                yield request

    async def _refund(self, request: RefundRequest) -> None:
        try:
            outcome = await self._session.outcome_of(request, journal=self._journal, query_first=self._query_first)
        finally:
            if (failure := self._admission.watch.failure()) is not None:
                self._stop(BatchStopped(failure))
            self._admission.leave()  # after the stop, or another refund would begin
        if self._wait_unknown and isinstance(outcome.error, RefundOutcomeUnknown):
            self._unknown.append((outcome.error, outcome))
        else:
            await self._tell(outcome)

    async def _due(self) -> AsyncGenerator[tuple[RefundOutcomeUnknown, Outcome]]:
        """What is unknown, each at the time when asking again can decide."""
        self._unknown.sort(key=lambda pair: pair[0].ask_again_at, reverse=True)
        while self._unknown:
            unknown, _ = self._unknown[-1]
            await anyio.sleep(max(0.0, (unknown.ask_again_at - self._session.clock().wall).total_seconds()))
            yield self._unknown.pop()

    async def _resolve(self, pair: tuple[RefundOutcomeUnknown, Outcome]) -> None:
        unknown, earlier = pair
        try:
            later = await self._session.outcome_of(unknown.request, journal=self._journal, earlier=unknown)
        except Exception:
            await self._tell(earlier)
            raise
        await self._tell(
            attrs.evolve(
                later,
                attempts=earlier.attempts + later.attempts,
                queries=earlier.queries + later.queries,
                seconds=earlier.seconds + later.seconds,
            )
        )

    async def _tell(self, outcome: Outcome) -> None:
        error = outcome.error
        if isinstance(error, RefundRejected) and error.stops_batch and not self._keep_going:
            self._stop(BatchStopped(error))
        elif isinstance(error, JournalError):
            self._stop(error)
        await self.found.give(outcome)
