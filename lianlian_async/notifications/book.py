"""A book records final refunds and completed handler calls; one caller at a time may call the handler for a refund.

To *act on* a refund means to call the handler for it. :class:`MemoryBook` is the book of an endpoint without a journal.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from decimal import Decimal
from itertools import islice
from typing import Final, Generic, TypeVar

import anyio
import attrs

from lianlian_async.background import is_failure
from lianlian_async.errors import RefundConflict
from lianlian_async.journal import Standing
from lianlian_async.models import Refund, RefundStatus

__all__ = ["Book", "MemoryBook"]

logger = logging.getLogger("lianlian_async")

Held = TypeVar("Held")

MOST_RECENT: Final = 10_000
"""The number of refunds that a :class:`MemoryBook` remembers."""


@attrs.define(eq=False, kw_only=True)
class Book(Generic[Held]):
    """The final refunds of an endpoint; ``act`` calls its handler."""

    act: Callable[[Refund], Awaitable[None]]
    seconds: float
    """Time limit of one handler call, and of the wait for another caller's handler call."""

    @abstractmethod
    async def take(self, refund: Refund) -> tuple[Standing, Held]:
        """Take the lease on a final refund before acting on it; wait while another caller has the lease.

        LEASED: another caller still has the lease. FINISHED: the handler has returned. After any other result, the
        caller must call :meth:`act_on`. Raises ``RefundConflict`` if an earlier notification had another final state or
        amount.
        """

    async def act_on(self, refund: Refund, held: Held) -> bool:
        """Run the handler for a refund that :meth:`take` took, and record or log the result.

        Returns whether the handler succeeded. Raises cancellation and ``JournalError``.
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
            await self._release(held)
            if not is_handled:
                raise
            return False
        await self._finish(held, refund)
        return True

    @abstractmethod
    async def _finish(self, held: Held, refund: Refund) -> None:
        """Record that the handler has returned."""

    @abstractmethod
    async def _release(self, held: Held) -> None:
        """Release the lease: the next delivery calls the handler again."""


@attrs.define(eq=False)
class _Notified:
    """A final refund from a notification."""

    no_refund: str | None
    sta_refund: RefundStatus | None
    money_refund: Decimal | None
    is_held: bool = False
    is_done: bool = False
    """Whether the handler has returned."""
    waiting: int = 0
    """Number of callers that wait for the release."""
    released: anyio.Event | None = None
    """Exists while callers wait for the release."""


@attrs.define(eq=False, kw_only=True)
class MemoryBook(Book[_Notified]):
    """The latest ``MOST_RECENT`` refunds of this process; leased and awaited refunds are never removed."""

    _known: dict[str | None, _Notified] = attrs.field(factory=dict, init=False)
    """Ordered from the least to the most recently used."""

    async def take(self, refund: Refund) -> tuple[Standing, _Notified]:
        """See :meth:`Book.take`."""
        known = self._find(refund)
        if known.is_held:
            known.waiting += 1
            try:
                with anyio.move_on_after(self.seconds):
                    while known.is_held:
                        known.released = known.released or anyio.Event()
                        await known.released.wait()
            finally:
                known.waiting -= 1
        if known.is_held:
            return Standing.LEASED, known
        if known.is_done:
            return Standing.FINISHED, known
        known.is_held = True
        return Standing.NEW, known

    async def _finish(self, held: _Notified, refund: Refund) -> None:
        held.is_done = True
        await self._release(held)

    async def _release(self, held: _Notified) -> None:
        held.is_held = False
        if held.released is not None:
            held.released.set()
            held.released = None
        self._known[held.no_refund] = self._known.pop(held.no_refund)
        if (excess := len(self._known) - MOST_RECENT) > 0:
            idle = (number for number, each in self._known.items() if not each.is_held and not each.waiting)
            for number in list(islice(idle, excess)):
                del self._known[number]

    def _find(self, refund: Refund) -> _Notified:
        number = refund.no_refund
        known = self._known.pop(number, None) or _Notified(number, refund.sta_refund, refund.money_refund)
        self._known[number] = known
        for name in ("sta_refund", "money_refund"):
            earlier, later = getattr(known, name), getattr(refund, name)
            if earlier != later:
                raise RefundConflict(str(number), field=name, ours=str(later), theirs=str(earlier))
        return known
