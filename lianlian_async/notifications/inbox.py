"""The inbox: a journal of final refunds. One caller at a time calls the handler for a refund, until a call succeeds.

To *act on* a refund means to call the handler for it. :class:`RecentRefunds` is the inbox of an endpoint that has no
journal.
"""

import json
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import cached_property
from typing import Final, TypeVar

import anyio
import attrs

from lianlian_async.background import BackgroundTask, is_failure
from lianlian_async.clock import Clock
from lianlian_async.errors import InvalidRequest, RefundConflict
from lianlian_async.journal import Ending, Entry, Intent, Journal, MemoryJournal, Standing, State
from lianlian_async.journal.operations import Operation
from lianlian_async.models import Refund, RefundRequest
from lianlian_async.recording import learn, recorded_refund, take
from lianlian_async.worker_pool import iterate, run_workers

E = TypeVar("E", bound=Entry | None)

logger = logging.getLogger("lianlian_async")

_NO_LEASE: Final = -60.0
"""A negative lease: expired at once, even with clock skew between workers."""
_SCAN_EVERY: Final = 30.0
"""Maximum seconds between two scans for entries that other workers added or did not finish."""
_LONGEST_BACKOFF: Final = 300.0
"""Seconds. The backoffs double from one second up to this."""
MOST_RECENT: Final = 10_000
"""Maximum number of refunds that :class:`RecentRefunds` remembers, unless more of them have a lease."""


class RecentRefunds(MemoryJournal):
    """The latest ``MOST_RECENT`` refunds of one endpoint, and older ones for which the handler runs."""

    async def record(self, operation: Operation[E]) -> E:
        """Record ``operation``, and remove the oldest entries beyond ``MOST_RECENT`` that have no lease."""
        answer = await super().record(operation)
        self._entries[operation.no_refund] = self._entries.pop(operation.no_refund)  # move it to the end
        while len(self._entries) > MOST_RECENT:
            idle = (number for number, entry in self._entries.items() if entry.leased_until is None)
            if (oldest := next(idle, None)) is None:
                break
            del self._entries[oldest]
        return answer


class NoJournal(MemoryJournal):
    """The journal of an endpoint that has none: it has no refunds, and its inbox is :class:`RecentRefunds`."""

    @cached_property
    def _inbox(self) -> MemoryJournal:
        return RecentRefunds()


@attrs.define(eq=False, kw_only=True)
class Inbox:
    """Calls the handler for the final refunds in ``journal``; one caller at a time acts on each refund."""

    journal: Journal
    """The inbox's own journal, of final refunds."""
    refunds: Journal
    """The journal of the refunds themselves."""
    act: Callable[[Refund], Awaitable[None]]
    """Calls the handler."""
    seconds: float
    """Time limit of one handler call; the lease lasts twice as long."""
    count: Callable[[bool], object]
    """Called each time :meth:`work` or :meth:`catch_up` has tried to handle an entry; True: the handler succeeded."""
    workers: int
    clock: Clock
    _backoffs: dict[str, tuple[int, float]] = attrs.field(factory=dict, init=False)
    """By ``no_refund``: the number of failures in a row, and the earliest time of the next try (event loop's clock;
    infinite during a try)."""
    _arrived: anyio.Event = attrs.field(factory=anyio.Event, init=False)
    _intake: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)

    async def take(self, refund: Refund, *, wait: float = 0.0) -> tuple[Standing, Entry]:
        """Take the lease on a final refund before acting on it; wait up to ``wait`` seconds for another caller.

        LEASED: another caller still has the lease. FINISHED: the handler has returned. After any other result, the
        caller must call :meth:`act_on`. Raises ``JournalError`` if the journal fails, and ``RefundConflict`` if the
        inbox has the refund with another final state or amount.
        """
        return await self._take(refund, 2 * self.seconds, wait)

    async def keep(self, refund: Refund) -> Standing:
        """Record a final refund durably, for :meth:`work`. Raises the same errors as :meth:`take`."""
        standing, _ = await self._take(refund, _NO_LEASE, 0.0)
        self._arrived.set()
        return standing

    async def _take(self, refund: Refund, lease: float, wait: float) -> tuple[Standing, Entry]:
        standing, entry = await take(self.journal, _intent(refund, lease), self.clock, anyio.current_time() + wait)
        if standing is Standing.FINISHED:  # a process may have died between the two writes of act_on
            await self.refunds.acted(entry.no_refund, self.clock())
        return standing, entry

    async def act_on(self, refund: Refund, leased: Entry) -> bool:
        """Run the handler for a refund, and record or log the result. ``leased``: the entry from :meth:`take`.

        Returns whether the handler succeeded. Raises ``JournalError`` if the journal fails.
        """
        try:
            with anyio.move_on_after(self.seconds) as scope:
                await self.act(refund)
            if scope.cancelled_caught:
                raise TimeoutError(f"the handler took more than {self.seconds:g} s")
        except BaseException as error:
            is_handled = is_failure(error)
            if is_handled:
                logger.exception("refund %s: the handler failed; it will be called again", refund.no_refund)
            await self.journal.release(leased, self.clock())  # so that the handler can be called again
            if not is_handled:
                raise
            return False
        await self.journal.finish(leased, Ending(state=State.DONE, record={"sta_refund": str(refund.sta_refund)}))
        await self.refunds.acted(leased.no_refund, self.clock())
        return True

    async def keep_final(self) -> None:
        """Copy every refund in state FINAL from the journal ``refunds`` into the inbox."""

        async def keep_one(entry: Entry) -> None:
            if entry.state is not State.FINAL:
                return
            try:
                money = RefundRequest.from_record(entry.fields).money_refund
                # An answer may omit the number and the amount.
                await self.keep(attrs.evolve(recorded_refund(entry), no_refund=entry.no_refund, money_refund=money))
            except (InvalidRequest, RefundConflict) as error:
                logger.error("refund %s is final, but the handler cannot be called: %s", entry.no_refund, error)  # noqa: TRY400 - no bug

        await run_workers(self.refunds.pending(), keep_one, workers=self.workers, intake=anyio.CancelScope())

    async def work(self) -> None:
        """Act on all present and future open entries of the inbox."""

        async def attempt(entry: Entry) -> None:
            failures, _ = self._backoffs[entry.no_refund]
            if await self._attempt(entry):
                del self._backoffs[entry.no_refund]
            else:
                pause = min(2.0**failures, _LONGEST_BACKOFF)
                self._backoffs[entry.no_refund] = min(failures + 1, 16), anyio.current_time() + pause
            self._arrived.set()

        await run_workers(self._due(), attempt, workers=self.workers, intake=self._intake)

    async def catch_up(self) -> None:
        """Try once to act on every open entry of the inbox. For an endpoint that does not run :meth:`work`."""
        await run_workers(self.journal.pending(), self._attempt, workers=self.workers, intake=anyio.CancelScope())

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[BackgroundTask]:
        """Run :meth:`work` in the background; at the end, wait until the running handlers have finished."""
        task = BackgroundTask(self.work, _log_end)
        try:
            yield task
        finally:
            self._intake.cancel()
            try:
                await task.join()
            finally:
                await task.aclose()

    async def _attempt(self, entry: Entry) -> bool:
        """Act on ``entry``; return whether this or an earlier handler call succeeded."""
        succeeded = False
        try:
            refund = await learn(self.refunds, Refund.from_dict(json.loads(entry.body)), self.clock(), "notification")
            standing, leased = await self.take(refund)
            if standing in (Standing.LEASED, Standing.FINISHED):
                return standing is Standing.FINISHED
            succeeded = await self.act_on(refund, leased)
        except BaseException as error:
            if not is_failure(error):
                raise
            logger.exception("refund %s stays in the inbox: this attempt to handle it failed", entry.no_refund)
        self.count(succeeded)
        return succeeded

    async def _due(self) -> AsyncGenerator[Entry]:
        """Yield each open entry when the handler may be called for it, in an endless loop."""
        has_kept_final = False
        while True:
            self._arrived = anyio.Event()
            began = anyio.current_time()
            try:
                if not has_kept_final:
                    await self.keep_final()
                    has_kept_final = True
                async with aclosing(iterate(self.journal.pending())) as entries:
                    async for entry in entries:
                        failures, until = self._backoffs.get(entry.no_refund, (0, began))
                        if until <= anyio.current_time():
                            self._backoffs[entry.no_refund] = failures, math.inf
                            yield entry
            except BaseException as error:
                if not is_failure(error):
                    raise
                logger.exception("the inbox cannot be read; trying again within %g s", _SCAN_EVERY)
            # Drop expired backoffs that this scan did not renew: another worker finished the entry, or the scan failed.
            self._backoffs = {number: each for number, each in self._backoffs.items() if each[1] > began}
            due = min((until for _, until in self._backoffs.values()), default=math.inf)
            with anyio.move_on_after(min(max(due - anyio.current_time(), 0.0), _SCAN_EVERY)):
                await self._arrived.wait()


def _log_end(error: BaseException | None) -> None:
    if error is not None:
        logger.error("the inbox's worker has failed: open the endpoint again to accept notifications", exc_info=error)


def _intent(refund: Refund, lease: float) -> Intent:
    # The state comes first, because a conflict names the first field that differs.
    identity = {name: str(getattr(refund, name)) for name in ("sta_refund", "money_refund", "no_refund")}
    content = {**identity, **{name: text for name, text in refund.raw.items() if text}}
    number, body = identity["no_refund"], json.dumps(content).encode()
    return Intent(no_refund=number, fields=identity, body=body, lease=lease, grace=None)
