"""The inbox: final states that the gateway has notified, each of them acted on once, by one worker at a time."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import Final, TypeVar

import anyio
import attrs

from lianlian_async.flow import drain, iterate
from lianlian_async.journal import Ending, Entry, Intent, Journal, MemoryJournal, Standing, State
from lianlian_async.journal.operations import Begin, Operation
from lianlian_async.models import Refund
from lianlian_async.recording import learn, take

__all__ = ["Inbox", "RecentJournal"]

logger = logging.getLogger("lianlian_async")

T = TypeVar("T")

_NO_HOLD: Final = -60.0
"""Seconds: over already, by the clock of any worker."""
_LOOK_EVERY: Final = 30.0
"""Seconds between two looks at what other workers may have left behind."""
_LONGEST_REST: Final = 300.0
"""Seconds that a handler rests at most after it failed: one second the first time, twice as long each further time."""


class RecentJournal(MemoryJournal):
    """As many refunds as fit: the one that was asked for longest ago is forgotten first, unless somebody is at it."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    async def intend(self, intent: Intent, now: datetime) -> tuple[Standing, Entry]:
        """See :meth:`Journal.intend`."""
        return self._do(Begin(intent, now))  # at once: a task switch costs as much as half of a signature

    def _do(self, operation: Operation[T]) -> T:
        known = self._entries.pop(operation.no_refund, None)
        if known is not None:
            self._entries[operation.no_refund] = known  # the youngest now
        answer = super()._do(operation)
        if len(self._entries) > self._most:
            oldest = next((number for number, entry in self._entries.items() if entry.holder is None), None)
            if oldest is not None:
                del self._entries[oldest]
        return answer


@attrs.frozen
class _Rest:
    """A notification that is not to be acted on at present."""

    failures: int
    until: float = math.inf
    """The event loop's second; infinite while it is being acted on."""


class Inbox:
    """What was notified, in ``journal``, and the handler ``act``, which may take ``seconds`` for one refund.

    ``refunds`` is the journal of the refunds themselves, if there is one; ``now`` the wall clock.
    """

    def __init__(
        self,
        journal: Journal,
        act: Callable[[Refund], Awaitable[None]],
        *,
        refunds: Journal | None,
        seconds: float,
        now: Callable[[], datetime],
    ) -> None:
        self._journal = journal
        self._act = act
        self._refunds = refunds
        self._seconds = seconds
        self._now = now
        self._resting: dict[str, _Rest] = {}
        self._news = anyio.Event()
        self._intake = anyio.CancelScope()

    # ── one notification ─────────────────────────────────────────────────────────────────────────

    async def learn(self, refund: Refund) -> Refund:
        """See :func:`lianlian_async.recording.learn`."""
        return refund if self._refunds is None else await learn(self._refunds, refund)

    async def take(self, refund: Refund) -> tuple[Standing, Entry]:
        """Take hold of a final state to act on it, once whoever holds it lets go; HELD if that takes too long.

        Raises ``RefundConflict`` if another final state, or another amount, was notified before.
        """
        return await self._take(refund, 2 * self._seconds, anyio.current_time() + self._seconds)

    async def keep(self, refund: Refund) -> Standing:
        """Write a final state down, durably, to be acted on by :meth:`work`. Raises as :meth:`take`."""
        standing, _ = await self._take(refund, _NO_HOLD, -math.inf)
        self._news.set()
        return standing

    async def _take(self, refund: Refund, hold: float, deadline: float) -> tuple[Standing, Entry]:
        def intent(now: datetime) -> Intent:
            return _intent(refund, now + timedelta(seconds=hold))

        return await take(self._journal, intent, self._now, deadline)

    async def act_on(self, entry: Entry, refund: Refund) -> bool:
        """Have the handler act on what :meth:`take` gave; whether it did. If not, the next delivery finds it free."""
        try:
            with anyio.fail_after(self._seconds):
                await self._act(refund)
        except Exception:
            logger.exception("refund %s: its notification was not acted on, it will be tried again", entry.no_refund)
            await self._journal.release(entry, self._now())
            return False
        except BaseException:
            await self._journal.release(entry, self._now())
            raise
        done = Ending(state=State.DONE, record={"sta_refund": str(refund.sta_refund)})
        await self._journal.settle(entry.no_refund, done)
        return True

    # ── all that were kept ───────────────────────────────────────────────────────────────────────

    async def work(self, workers: int, acted: Callable[[bool], object]) -> None:
        """Act on what is in the inbox, now and later, ``workers`` at a time, until :meth:`stop`.

        ``acted`` is called with whether it went well, each time.
        """

        async def attempt(entry: Entry) -> None:
            rest = self._resting[entry.no_refund]
            try:
                standing, well = await self._attempt(entry)
            except Exception:
                logger.exception("refund %s: its notification cannot be acted on now", entry.no_refund)
                standing, well = Standing.UNSETTLED, False
            if standing is Standing.HELD:  # another worker is at it
                self._resting[entry.no_refund] = attrs.evolve(rest, until=anyio.current_time() + self._seconds)
            elif not well:
                pause = min(2.0**rest.failures, _LONGEST_REST)
                self._resting[entry.no_refund] = _Rest(min(rest.failures + 1, 16), anyio.current_time() + pause)
            else:
                del self._resting[entry.no_refund]
            if standing in (Standing.NEW, Standing.UNSETTLED):
                acted(well)
            self._news.set()

        await drain(self._due(), attempt, workers=workers, intake=self._intake)

    def stop(self) -> None:
        """Have :meth:`work` end once the handlers have that are running."""
        self._intake.cancel()

    async def _attempt(self, entry: Entry) -> tuple[Standing, bool]:
        refund = await self.learn(Refund.from_dict(entry.fields))
        standing, held = await self._take(refund, 2 * self._seconds, -math.inf)
        if standing in (Standing.HELD, Standing.SETTLED):
            return standing, standing is Standing.SETTLED
        return standing, await self.act_on(held, refund)

    async def _due(self) -> AsyncGenerator[Entry]:
        """What is to be acted on, each when it is time, without end."""
        while True:
            self._news = anyio.Event()
            began = anyio.current_time()
            try:
                async with aclosing(iterate(self._journal.pending())) as entries:
                    async for entry in entries:
                        rest = self._resting.get(entry.no_refund, _Rest(0, began))
                        if rest.until <= anyio.current_time():
                            self._resting[entry.no_refund] = _Rest(rest.failures)
                            yield entry
            except Exception:
                logger.exception("the inbox cannot be read; trying again in %g s", _LOOK_EVERY)
            # Whose rest was over when this look began, and is still here, has left the inbox by another worker.
            self._resting = {number: rest for number, rest in self._resting.items() if rest.until > began}
            now = anyio.current_time()
            due = min((rest.until for rest in self._resting.values()), default=math.inf)
            with anyio.move_on_after(min(max(due - now, 0.0), _LOOK_EVERY)):
                await self._news.wait()


def _intent(refund: Refund, held_until: datetime) -> Intent:
    # What identifies a final state comes first: a conflict names the first field that differs.
    identity = {name: refund.raw[name] for name in ("sta_refund", "money_refund")}
    content = f"{refund.no_refund} {refund.sta_refund} {refund.money_refund}"
    return Intent(
        no_refund=str(refund.no_refund),
        digest=hashlib.sha256(content.encode()).hexdigest(),
        fields={**identity, **refund.raw},
        body=b"",
        held_until=held_until,
    )
