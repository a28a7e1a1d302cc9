"""Batches: ``refund_many`` takes any number of requests and yields one outcome for each, in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Self, TypeVar

import anyio

from .background import Background
from .errors import BatchStopped, ConfigurationError, JournalError, RefundOutcomeUnknown, RefundRejected
from .flow import drain, iterate
from .journal import Journal
from .models import RefundRequest
from .outcome import Outcome
from .session import RefundSession

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
) -> Outcomes:
    """Have many refunds made, and yield one :class:`~lianlian_async.Outcome` for each request, as they end.

    ::

        async for outcome in refund_many(session, requests, journal=journal):
            ...

    Requests are taken only as fast as outcomes are: memory depends on ``concurrency``, not on the input's length.
    A single refund's error never disturbs another. Leaving the loop early, or being cancelled, takes no further
    request; a refund that was under way then stays unsettled in the journal.

    Args:
        session: an open session.
        requests: any iterable or async iterable; an exception of its own ends the batch after the running ones.
        concurrency: refunds at the same time; by default the session's ``max_connections``.
        journal: an open journal; by default the session's own.
        keep_going: do not stop at a rejection that is our own configuration's fault.
        wait_unknown: keep what stays unknown until all others are done, wait for each one's ``ask_again_at``
            and ask once more; only these are held in memory.

    Raises:
        BatchStopped: at the end of the iteration, where a rejection's ``is_configuration`` stopped it.
        JournalError: at the end of the iteration, where the journal failed: nothing more was sent.
    """
    if concurrency is not None and concurrency < 1:
        raise ConfigurationError(f"concurrency: must be at least 1, is {concurrency}")
    run = _Run(
        session,
        requests,
        concurrency=concurrency or session.max_connections,
        journal=journal,
        keep_going=keep_going,
        wait_unknown=wait_unknown,
    )
    return Outcomes(run)


class Outcomes(AsyncIterator[Outcome]):
    """The iterator that ``refund_many`` returns. Dropping it ends the batch; ``aclose`` waits for that end."""

    def __init__(self, run: _Run) -> None:
        # The running tasks know the run, never this object: so that dropping it is noticed at once.
        self._run = run
        self._background: Background | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Outcome:
        if self._background is None:
            self._background = Background(self._run.work)
        try:
            return await self._run.outcomes.receive()
        except anyio.EndOfStream:
            await self.aclose()
        if self._run.failure is not None:
            failure, self._run.failure = self._run.failure, None
            raise failure
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the batch: cancel what is under way, and wait until it has stopped."""
        if self._background is not None:
            await self._background.aclose()
        self._run.outcomes.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._run.outcomes.close()
        if self._background is not None:
            self._background.cancel_soon()


class _Run:
    """The workers of one batch, and what they share."""

    def __init__(
        self,
        session: RefundSession,
        requests: Iterable[RefundRequest] | AsyncIterable[RefundRequest],
        *,
        concurrency: int,
        journal: Journal | None,
        keep_going: bool,
        wait_unknown: bool,
    ) -> None:
        self._session = session
        self._requests = requests
        self._concurrency = concurrency
        self._journal = journal
        self._keep_going = keep_going
        self._wait_unknown = wait_unknown
        self._unknown: list[tuple[RefundOutcomeUnknown, Outcome]] = []
        self._found, self.outcomes = anyio.create_memory_object_stream[Outcome](0)
        self.failure: Exception | None = None
        """What the iteration ends in, once all that was begun has been told."""

    async def work(self) -> None:
        """Carry out all requests, then ask once more about what is unknown."""
        with self._found:
            await drain(self._requested(), self._guarded(self._refund), workers=self._concurrency)
            await drain(self._due(), self._guarded(self._settle), workers=self._concurrency)

    def _guarded(self, handle: Callable[[T], Awaitable[None]]) -> Callable[[T], Awaitable[None]]:
        async def guarded(item: T) -> None:
            try:
                await handle(item)
            except Exception as error:  # noqa: BLE001 - it is raised where the batch is consumed
                self.failure = self.failure or error

        return guarded

    async def _requested(self) -> AsyncGenerator[RefundRequest]:
        """The requests, until one of them or their source gives a reason to stop."""
        try:
            async with aclosing(iterate(self._requests)) as requests:
                while self.failure is None:
                    yield await anext(requests)
        except StopAsyncIteration:
            return
        except Exception as error:  # noqa: BLE001 - it is raised where the batch is consumed
            self.failure = error

    async def _refund(self, request: RefundRequest) -> None:
        outcome = await self._session.outcome_of(request, journal=self._journal)
        if self._wait_unknown and isinstance(outcome.error, RefundOutcomeUnknown):
            self._unknown.append((outcome.error, outcome))
        else:
            await self._tell(outcome)

    async def _due(self) -> AsyncGenerator[tuple[RefundOutcomeUnknown, Outcome]]:
        """What is unknown, each at the time when asking again can decide; at once, if the batch has stopped."""
        for unknown, outcome in sorted(self._unknown, key=lambda pair: pair[0].ask_again_at):
            if self.failure is None:
                await anyio.sleep((unknown.ask_again_at - self._session.now()).total_seconds())
            yield unknown, outcome

    async def _settle(self, pair: tuple[RefundOutcomeUnknown, Outcome]) -> None:
        unknown, outcome = pair
        if self.failure is None:
            outcome = await self._session.outcome_of(unknown.request, journal=self._journal, earlier=unknown)
        await self._tell(outcome)

    async def _tell(self, outcome: Outcome) -> None:
        error = outcome.error
        if isinstance(error, RefundRejected) and error.is_configuration and not self._keep_going:
            self.failure = self.failure or BatchStopped(error)
        elif isinstance(error, JournalError):
            self.failure = self.failure or error
        await self._found.send(outcome)
