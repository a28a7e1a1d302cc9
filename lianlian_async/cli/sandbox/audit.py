"""The audit of ``lianlian demo``: compare the library's outcomes with the books of the gateway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import attrs

from lianlian_async.cli.exit_codes import INTERRUPTED, MADE, NOT_SENT, REJECTED, UNKNOWN, ExitOutcome
from lianlian_async.models import RefundRequest

from .process import Books

_TIMES_MADE: Final = {MADE: (1,), UNKNOWN: (0, 1), INTERRUPTED: (0, 1)}
"""How many times the gateway may have made a refund with this outcome; with any other outcome: never."""


class Count(NamedTuple):
    """The number of refunds with one outcome, and how many times the gateway made them."""

    word: str
    refunds: int
    times_made: int


@attrs.frozen
class Audit:
    """The outcome of each ``no_refund`` that was begun, compared with the gateway's ``books``."""

    requests: Sequence[RefundRequest]
    outcomes: Mapping[str, ExitOutcome]
    books: Books

    def made_twice(self) -> int:
        """Return how many refunds were made more than once."""
        return sum(times > 1 for times in self.books.times_made.values())

    def disagreements(self) -> list[str]:
        """Return the refunds whose outcome or amount differs from the books."""
        return [request.no_refund for request in self.requests if not self._agrees(request)]

    def _agrees(self, request: RefundRequest) -> bool:
        times = self.books.times_made.get(request.no_refund, 0)
        allowed = _TIMES_MADE.get(self.outcomes.get(request.no_refund, NOT_SENT), (0,))
        moved = self.books.money_moved.get(request.no_refund, 0)
        return times in allowed and moved == times * request.money_refund

    def counts(self) -> list[Count]:
        """Return a count for made, rejected, not sent, unknown and every other outcome that occurred."""
        refunds = Counter({MADE: 0, REJECTED: 0, NOT_SENT: 0, UNKNOWN: 0})
        times_made: Counter[ExitOutcome] = Counter()
        for no_refund, outcome in self.outcomes.items():
            refunds[outcome] += 1
            times_made[outcome] += self.books.times_made.get(no_refund, 0)
        return [Count(outcome.word, number, times_made[outcome]) for outcome, number in refunds.items()]

    def unknown(self) -> dict[str, int]:
        """Return how many times each unknown refund was made."""
        unknown = (no_refund for no_refund, outcome in self.outcomes.items() if outcome == UNKNOWN)
        return {no_refund: self.books.times_made.get(no_refund, 0) for no_refund in unknown}
