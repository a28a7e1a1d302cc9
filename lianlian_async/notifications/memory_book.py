"""Where there is no journal: the last refunds that this process was notified of, each acted on once."""

from __future__ import annotations

from decimal import Decimal
from itertools import islice

import anyio
import attrs

from lianlian_async.errors import RefundConflict
from lianlian_async.journal import Standing
from lianlian_async.models import Refund, RefundStatus

__all__ = ["MemoryBook"]


@attrs.define(eq=False)
class Notified:
    """A final state that was notified."""

    no_refund: str | None
    sta_refund: RefundStatus | None
    money_refund: Decimal | None
    is_held: bool = False
    is_done: bool = False
    """Whether it was acted on."""
    waiting: int = 0
    """How many wait until it is let go."""
    let_go: anyio.Event | None = None
    """Set when that happens, if anybody waits for it."""


class MemoryBook:
    """A :class:`~.acting.Book` of the last refunds, ``most`` of them, and of all that are held or waited for.

    Whoever finds one held waits for it, up to ``seconds``.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._known: dict[str | None, Notified] = {}
        """The one of which nothing was heard for longest comes first."""

    async def learn(self, refund: Refund) -> Refund:
        """See :meth:`.Book.learn`: nothing is on record."""
        return refund

    async def take(self, refund: Refund) -> tuple[Standing, Notified]:
        """See :meth:`.Book.take`."""
        known = self._find(refund)
        if known.is_held:
            await self._until_let_go(known)
        if known.is_held:
            return Standing.LEASED, known
        if known.is_done:
            return Standing.FINISHED, known
        known.is_held = True
        return Standing.NEW, known

    async def finish(self, held: Notified, refund: Refund) -> None:
        """See :meth:`.Book.finish`."""
        held.is_done = True
        self._let_go(held)

    async def release(self, held: Notified) -> None:
        """See :meth:`.Book.release`."""
        self._let_go(held)

    def _find(self, refund: Refund) -> Notified:
        number = refund.no_refund
        known = self._known.pop(number, None)
        if known is None:
            known = self._known[number] = Notified(number, refund.sta_refund, refund.money_refund)
            return known
        self._known[number] = known
        for name in ("sta_refund", "money_refund"):
            earlier, later = getattr(known, name), getattr(refund, name)
            if earlier != later:
                raise RefundConflict(str(number), field=name, ours=str(later), theirs=str(earlier))
        return known

    async def _until_let_go(self, known: Notified) -> None:
        known.waiting += 1
        try:
            with anyio.move_on_after(self._seconds):
                while known.is_held:
                    known.let_go = known.let_go or anyio.Event()
                    await known.let_go.wait()
        finally:
            known.waiting -= 1

    def _let_go(self, known: Notified) -> None:
        known.is_held = False
        if known.let_go is not None:
            known.let_go.set()
            known.let_go = None
        self._known[known.no_refund] = self._known.pop(known.no_refund)
        if (excess := len(self._known) - self._most) > 0:
            idle = (number for number, each in self._known.items() if not each.is_held and not each.waiting)
            for number in list(islice(idle, excess)):
                del self._known[number]
