"""The inbox: final states that the gateway has notified, each of them acted on once, by one worker at a time."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final

import anyio
import attrs

from lianlian_async.background import is_failure
from lianlian_async.clock import Clock
from lianlian_async.errors import InvalidRequest, LianLianError, RefundConflict
from lianlian_async.journal import Ending, Entry, Intent, Journal, Standing, State
from lianlian_async.models import Refund, RefundRequest
from lianlian_async.recording import answer, learn, take
from lianlian_async.worker_pool import iterate, run_workers

from .dispatch import act_on

__all__ = ["Inbox"]

logger = logging.getLogger("lianlian_async")

_NO_LEASE: Final = -60.0
"""Seconds: expired at once, even with clock skew between workers."""
_LOOK_EVERY: Final = 30.0
"""Seconds between two looks at what other workers may have left behind."""
_LONGEST_REST: Final = 300.0
"""Seconds that a handler rests at most after it failed: one second the first time, twice as long each further time."""


@attrs.frozen
class _Rest:
    """A notification that is not to be acted on at present."""

    failures: int
    until: float = math.inf
    """The event loop's second; infinite while it is being acted on."""


class Inbox:
    """A :class:`~.acting.Book` in ``journal``, and the handler ``act``, which may take ``seconds`` for one refund.

    ``refunds`` is the journal of the refunds themselves; ``clock`` reads the clocks.
    """

    def __init__(
        self,
        journal: Journal,
        act: Callable[[Refund], Coroutine[Any, Any, None]],
        *,
        refunds: Journal,
        seconds: float,
        clock: Clock,
    ) -> None:
        self._journal = journal
        self._act = act
        self._refunds = refunds
        self._seconds = seconds
        self._clock = clock
        self._resting: dict[str, _Rest] = {}
        self._news = anyio.Event()
        self._intake = anyio.CancelScope()
        self._failure: BaseException | None = None

    # ── one notification ─────────────────────────────────────────────────────────────────────────

    async def learn(self, refund: Refund) -> Refund:
        """See :meth:`.Book.learn` and :func:`lianlian_async.recording.learn`."""
        return await learn(self._refunds, refund)

    async def take(self, refund: Refund) -> tuple[Standing, Entry]:
        """See :meth:`.Book.take`."""
        return await self._take(refund, 2 * self._seconds, anyio.current_time() + self._seconds)

    async def keep(self, refund: Refund) -> Standing:
        """Write a final state down, durably, to be acted on by :meth:`work`. Raises as :meth:`take`.

        Raises ``RuntimeError`` after :meth:`work` failed: what nobody would act on is not to be acknowledged.
        """
        if self._failure is not None:
            raise RuntimeError("the inbox's worker has ended: open the NotificationEndpoint again") from self._failure
        standing, _ = await self._take(refund, _NO_LEASE, -math.inf)
        self._news.set()
        return standing

    async def _take(self, refund: Refund, lease: float, deadline: float) -> tuple[Standing, Entry]:
        standing, entry = await take(self._journal, _intent(refund, lease), self._clock, deadline)
        if standing is Standing.FINISHED:  # a process may have died between the two lines of finish
            await self._refunds.acted(entry.no_refund)
        return standing, entry

    async def finish(self, held: Entry, refund: Refund) -> None:
        """See :meth:`.Book.finish`."""
        done = Ending(state=State.DONE, record={"sta_refund": str(refund.sta_refund)})
        await self._journal.finish(held, done)
        await self._refunds.acted(held.no_refund)

    async def release(self, held: Entry) -> None:
        """See :meth:`.Book.release`."""
        await self._journal.release(held, self._clock())

    # ── all that were kept ───────────────────────────────────────────────────────────────────────

    async def keep_final(self, workers: int) -> None:
        """Keep every refund that is FINAL in the journal of the refunds, whoever learned it; ``workers`` at a time."""

        async def keep_one(entry: Entry) -> None:
            if entry.state is not State.FINAL:
                return
            try:
                money = RefundRequest.from_record(entry.fields).money_refund
                # An answer need not repeat what was asked for, as a notification does.
                await self.keep(attrs.evolve(answer(entry), no_refund=entry.no_refund, money_refund=money))
            except (InvalidRequest, RefundConflict) as error:
                logger.error("refund %s is final, but cannot be acted on: %s", entry.no_refund, error)  # noqa: TRY400 - no bug of ours

        await run_workers(self._refunds.pending(), keep_one, workers=workers, intake=anyio.CancelScope())

    async def work(self, workers: int, acted: Callable[[bool], object]) -> None:
        """Act on what is in the inbox, now and later, ``workers`` at a time, until :meth:`stop`.

        ``acted`` is called with whether it went well, each time.
        """

        async def attempt(entry: Entry) -> None:
            rest = self._resting[entry.no_refund]
            try:
                standing, well = await self._attempt(entry)
            except BaseException as error:
                if not is_failure(error):
                    raise
                logger.exception("refund %s: its notification cannot be acted on now", entry.no_refund)
                standing, well = Standing.UNRESOLVED, False
            if standing is Standing.LEASED:  # another worker is at it
                self._resting[entry.no_refund] = attrs.evolve(rest, until=anyio.current_time() + self._seconds)
            elif not well:
                pause = min(2.0**rest.failures, _LONGEST_REST)
                self._resting[entry.no_refund] = _Rest(min(rest.failures + 1, 16), anyio.current_time() + pause)
            else:
                del self._resting[entry.no_refund]
            if standing not in (Standing.LEASED, Standing.FINISHED):
                acted(well)
            self._news.set()

        await run_workers(self._due(workers), attempt, workers=workers, intake=self._intake)

    async def catch_up(self, workers: int, acted: Callable[[bool], object]) -> None:
        """Act, once, on what is in the inbox now: nobody else works on it."""

        async def attempt(entry: Entry) -> None:
            try:
                standing, well = await self._attempt(entry)
            except LianLianError:
                logger.exception("refund %s: its notification cannot be acted on now", entry.no_refund)
            else:
                if standing not in (Standing.LEASED, Standing.FINISHED):
                    acted(well)

        await run_workers(self._journal.pending(), attempt, workers=workers, intake=anyio.CancelScope())

    def stop(self) -> None:
        """Have :meth:`work` end once the handlers have that are running."""
        self._intake.cancel()

    def end(self, error: BaseException | None) -> None:
        """Note that the task of :meth:`work` has ended, in ``error`` if it failed."""
        if error is not None:
            self._failure = error
            logger.error("the inbox's worker has ended, no more notifications are taken", exc_info=error)

    async def _attempt(self, entry: Entry) -> tuple[Standing, bool]:
        refund = await self.learn(Refund.from_dict(entry.fields))
        standing, held = await self._take(refund, 2 * self._seconds, -math.inf)
        if standing in (Standing.LEASED, Standing.FINISHED):
            return standing, standing is Standing.FINISHED
        return standing, await act_on(refund, self, held, self._act, self._seconds)

    async def _due(self, workers: int) -> AsyncGenerator[Entry]:
        """What is to be acted on, each when it is time, without end."""
        has_kept_final = False
        while True:
            self._news = anyio.Event()
            began = anyio.current_time()
            try:
                if not has_kept_final:
                    await self.keep_final(workers)
                    has_kept_final = True
                async with aclosing(iterate(self._journal.pending())) as entries:
                    async for entry in entries:
                        rest = self._resting.get(entry.no_refund, _Rest(0, began))
                        if rest.until <= anyio.current_time():
                            self._resting[entry.no_refund] = _Rest(rest.failures)
                            yield entry
            except BaseException as error:
                if not is_failure(error):
                    raise
                logger.exception("the inbox cannot be read; trying again in %g s", _LOOK_EVERY)
            # Whose rest was over when this look began, and is still here, has left the inbox by another worker.
            self._resting = {number: rest for number, rest in self._resting.items() if rest.until > began}
            now = anyio.current_time()
            due = min((rest.until for rest in self._resting.values()), default=math.inf)
            with anyio.move_on_after(min(max(due - now, 0.0), _LOOK_EVERY)):
                await self._news.wait()


def _intent(refund: Refund, lease: float) -> Intent:
    # What identifies a final state comes first: a conflict names the first field that differs.
    identity = {
        "sta_refund": str(refund.sta_refund),
        "money_refund": str(refund.money_refund),
        "no_refund": str(refund.no_refund),
    }
    content = f"{refund.no_refund} {refund.sta_refund} {refund.money_refund}"
    return Intent(
        no_refund=str(refund.no_refund),
        digest=hashlib.sha256(content.encode()).hexdigest(),
        fields={**identity, **{name: text for name, text in refund.raw.items() if text}},
        body=b"",
        lease=lease,
    )
