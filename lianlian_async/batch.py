"""Batches: ``refund_many`` takes any number of requests and yields the outcome of each refund."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

import anyio
import attrs

from .background import BackgroundTask
from .errors import BatchStopped, InvalidRequest, JournalError, Problem, RefundOutcomeUnknown, RefundRejected
from .journal import Journal
from .models import RefundRequest
from .outcome import Outcome
from .session import RefundSession
from .settings import check_integer, check_journal, check_type
from .signature_watch import Admission, SignatureWatch
from .worker_pool import Handover, run_workers

T = TypeVar("T")
_Held: TypeAlias = tuple[float, RefundOutcomeUnknown, Outcome]
"""When to resolve an unknown outcome, in seconds of the boot clock; its error; the outcome."""


def refund_many(
    session: RefundSession,
    requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest],
    *,
    concurrency: int | None = None,
    journal: Journal | None = None,
    keep_going: bool = False,
    wait_unknown: bool = False,
    query_first: bool = False,
) -> "Outcomes":
    """Make many refunds and yield one :class:`~lianlian_async.Outcome` for each request, as soon as it is known.

    ::

        async for outcome in refund_many(session, requests, journal=journal):
            ...

    Backpressure: requests are read only as fast as you read outcomes, so memory depends on ``concurrency``, not on the
    number of requests (with ``wait_unknown``, also on the number of unknown outcomes). After an error of one refund the
    batch continues, except as listed under *Raises*. An item that is not a ``RefundRequest`` gives an outcome with
    ``InvalidRequest`` as its error and the item as its request; nothing is sent for it.
    If you leave the loop early, or if it is cancelled, the batch ends. No further request is read. Running refunds may
    stay unresolved, or be made although you get no outcome: without a journal, repeat them with ``query_first``. If a
    variable keeps the iterator alive, call ``aclose``, or use ``contextlib.aclosing``.

    Args:
        session: an open session.
        requests: any iterable or async iterable, iterated in a background task. If it raises, the batch ends after the
            running refunds. An async generator is closed at the end of the batch. Without a journal, a request that
            occurs again after 1,000 other refunds may be sent twice.
        concurrency: maximum number of concurrent refunds; by default the session's ``max_connections``.
        journal: an open journal; by default the session's.
        query_first: query every refund that is new in the journal before it is sent.
        keep_going: continue after a rejection with ``stops_batch``. Invalid signatures still stop the batch.
        wait_unknown: keep unknown outcomes in memory until all other refunds have ended, then resolve each of them
            once, at its ``ask_again_at`` or later.

    Raises at once ``RuntimeError`` if the session is not open, and ``ConfigurationError`` or ``InvalidRequest`` for a
    wrong argument. Raises at the end of the iteration:
        BatchStopped: a rejection with ``stops_batch``, or ``SignatureInvalid`` for the answers about four refunds in a
            row. Until one answer has a valid signature, at most four refunds run concurrently.
        JournalError: the journal failed; no further refund was started.
        ConfigurationError: a setting, such as a proxy, prevents every send.
        RuntimeError: the session was closed during the batch.
        LianLianError: a task of the batch was cancelled from outside. Refunds that were running may have been made.
        BaseException: any exception of ``requests``; from your middleware, one that is not an ``Exception``.
    """
    check_type("session", session, RefundSession)
    check_journal(journal)
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable | AsyncIterable):
        raise InvalidRequest([Problem("requests", "must be an iterable of RefundRequest", type(requests).__name__)])
    if concurrency is None:
        concurrency = session.max_connections
    run = _Run(
        session=session,
        requests=requests,
        concurrency=check_integer("concurrency", concurrency, least=1),
        journal=journal,
        keep_going=keep_going,
        wait_unknown=wait_unknown,
        query_first=query_first,
        watch=session.signatures,
    )
    return Outcomes(run)


class Outcomes(AsyncIterator[Outcome]):
    """The iterator that ``refund_many`` returns. Deleting it ends the batch; ``aclose`` also waits for the end.

    You may cancel the wait for an outcome, for example by a timeout: no outcome is lost, and the batch continues.
    """

    def __init__(self, run: "_Run") -> None:
        # The tasks refer to the run, never to this object, so that deleting this object calls __del__ at once.
        self._run = run
        self._background: BackgroundTask | None = None
        self._closed = False

    def __anext__(self) -> Awaitable[Outcome]:
        # Not async def: a cancellation's traceback would keep the coroutine's frame alive, which refers to this object.
        if self._background is None and not self._closed:
            self._background = BackgroundTask(self._run.work, self._run.end)
        return self._run.next()

    @property
    def held(self) -> list[_Held]:
        """The unknown outcomes that ``wait_unknown`` keeps now. The list changes while the batch runs."""
        return self._run.unknown

    async def aclose(self) -> None:
        """End the batch: cancel its refunds and wait until they have ended."""
        self._closed = True
        self._run.found.end()
        if self._background is not None:
            await self._background.aclose()

    def __del__(self) -> None:
        if self._background is not None:
            self._background.cancel_soon()


@attrs.define(eq=False, kw_only=True)
class _Run:
    """The state of one batch."""

    session: RefundSession
    requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest]
    concurrency: int
    journal: Journal | None
    keep_going: bool
    wait_unknown: bool
    query_first: bool
    watch: SignatureWatch
    found: Handover[Outcome] = attrs.field(factory=Handover, init=False)
    unknown: list[_Held] = attrs.field(factory=list, init=False)
    _intake: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)
    _failure: BaseException | None = attrs.field(default=None, init=False)
    """Raised at the end of the iteration, after all outcomes."""

    async def next(self) -> Outcome:
        """Return the next outcome."""
        try:
            return await self.found.take()
        except anyio.EndOfStream:
            failure, self._failure = self._failure, None
        raise failure or StopAsyncIteration

    async def work(self) -> None:
        """Make all refunds, then resolve the unknown ones."""
        await self._drain(self.requests, self._refund)
        await self._drain(self._due(), self._resolve)
        for _, _, outcome in self.unknown:  # left only if the batch has stopped
            await self.found.give(outcome)

    def end(self, error: BaseException | None) -> None:
        """End the iteration after :meth:`work` has ended; ``error`` is the failure of :meth:`work`."""
        self._failure = self._failure or error
        self.found.end()

    async def _drain(self, items: Iterable[T] | AsyncIterable[T], handle: Callable[[T], Awaitable[None]]) -> None:
        if self._failure is None:
            self._intake = anyio.CancelScope()
            try:
                admission = Admission(self.watch, self.concurrency)
                await run_workers(items, handle, workers=admission, intake=self._intake)
            except (KeyboardInterrupt, SystemExit, GeneratorExit, anyio.get_cancelled_exc_class()):
                raise
            except BaseException as error:  # noqa: BLE001 - raised at the end of the iteration
                self._stop(error)

    def _stop(self, reason: BaseException) -> None:
        self._failure = self._failure or reason
        self._intake.cancel()

    async def _refund(self, request: RefundRequest) -> None:
        try:
            outcome = await self.session.outcome_of(request, journal=self.journal, query_first=self.query_first)
        finally:
            if (failure := self.watch.failure()) is not None:
                self._stop(BatchStopped(failure))
        if self.wait_unknown and isinstance(outcome.error, RefundOutcomeUnknown):
            now = self.session.clock()
            due = now.boot + (outcome.error.ask_again_at - now.wall).total_seconds()
            self.unknown.append((due, outcome.error, outcome))
        else:
            await self._tell(outcome)

    async def _due(self) -> AsyncGenerator[_Held]:
        """Yield the unknown outcomes, none before its ``ask_again_at``, even if the wall clock is set meanwhile."""
        self.unknown.sort(key=lambda held: held[0], reverse=True)
        while self.unknown:
            await anyio.sleep(max(0.0, self.unknown[-1][0] - self.session.clock().boot))
            yield self.unknown.pop()

    async def _resolve(self, held: _Held) -> None:
        _, unknown, earlier = held
        try:
            later = await self.session.outcome_of(unknown.request, journal=self.journal, earlier=unknown)
        except Exception:
            await self._tell(earlier)
            raise
        totals = {name: getattr(earlier, name) + getattr(later, name) for name in ("attempts", "queries", "seconds")}
        await self._tell(attrs.evolve(later, **totals))

    async def _tell(self, outcome: Outcome) -> None:
        error = outcome.error
        if isinstance(error, RefundRejected) and error.stops_batch and not self.keep_going:
            self._stop(BatchStopped(error))
        elif isinstance(error, JournalError):
            self._stop(error)
        await self.found.give(outcome)
