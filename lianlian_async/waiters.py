"""Wait until a refund is final: told by its notification or found by asking, whichever comes first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Final

import anyio
import attrs

from .errors import (
    AnswerMismatch,
    GatewayUnavailable,
    LianLianError,
    MalformedMessage,
    RefundNotFinal,
    RefundNotFound,
    SignatureInvalid,
)
from .models import Refund, RefundQuery, RefundRequest

__all__ = ["Waiter", "Waiters"]

FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 300.0
"""Seconds. Every pause between two queries is twice as long as the one before: some twenty queries in an hour."""

_ASK_AGAIN: Final = (RefundNotFound, GatewayUnavailable, SignatureInvalid, AnswerMismatch, MalformedMessage)
"""What a query may meet that another one need not."""


@attrs.define(eq=False)
class Waiter:
    """One who waits for the final state of a refund of ``money_refund`` yuan (None: of any amount)."""

    money_refund: Decimal | None
    told: Refund | None = None
    """The final state, once a notification told it."""
    _asking: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)

    def hear(self, refund: Refund) -> None:
        """What a notification told: no more queries are needed."""
        if self.money_refund in (None, refund.money_refund):
            self.told = refund
            self._asking.cancel()

    async def until_final(
        self, refund: Refund, ask: Callable[[RefundQuery], Awaitable[Refund]], seconds: float
    ) -> Refund:
        """The final state of ``refund``, which was made; ``RefundNotFinal`` if that takes more than ``seconds``."""
        if refund.is_final:
            return refund
        query = refund.query()
        error: LianLianError | None = None
        pause = FIRST_PAUSE
        with anyio.move_on_after(seconds), self._asking:
            while True:
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                try:
                    refund, error = await ask(query), None
                except _ASK_AGAIN as problem:
                    error = problem
                if refund.is_final:
                    return refund
        if self.told is not None:
            return self.told
        raise RefundNotFinal(refund, last_error=None if error is None else str(error)) from error


class Waiters:
    """All who wait in one session."""

    def __init__(self) -> None:
        self._waiters: dict[str, list[Waiter]] = {}

    @contextmanager
    def listen(self, about: Refund | RefundRequest) -> Iterator[Waiter]:
        """A waiter who hears, as long as the block runs, what is told about a refund."""
        number, waiter = str(about.no_refund), Waiter(about.money_refund)
        waiters = self._waiters.setdefault(number, [])
        waiters.append(waiter)
        try:
            yield waiter
        finally:
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[number]

    def tell(self, refund: Refund) -> None:
        """Tell all who wait for ``refund`` that it is final."""
        for waiter in self._waiters.get(str(refund.no_refund), ()):
            waiter.hear(refund)
