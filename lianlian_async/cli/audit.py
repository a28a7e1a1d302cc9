"""The demo's audit: what the library said about each refund, beside what the gateway's books say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import attrs

from lianlian_async.models import RefundRequest

from .outcomes import INTERRUPTED, MADE
from .remote import Books

__all__ = ["Audit", "Count"]

_MAY_BE_MADE: Final = {MADE.word: (1,), "unknown": (0, 1), INTERRUPTED.word: (0, 1)}
"""How many times the books may hold a refund that ended in this way; one that ended in any other way: not at all."""


class Count(NamedTuple):
    """How many refunds ended in one way, and how many times the gateway carried them out."""

    outcome: str
    refunds: int
    carried_out: int


@attrs.frozen
class Audit:
    """``outcomes`` (a word for each ``no_refund`` that was begun) against ``books``."""

    requests: Sequence[RefundRequest]
    outcomes: Mapping[str, str]
    books: Books

    def _times_made(self, no_refund: str) -> int:
        return self.books.times_made.get(no_refund, 0)

    def made_twice(self) -> int:
        """How many refunds were carried out more than once."""
        return sum(times > 1 for times in self.books.times_made.values())

    def disagreements(self) -> list[str]:
        """The refunds whose outcome is not what the books say, or for which other money moved than was asked for."""
        return [request.no_refund for request in self.requests if not self._agrees(request)]

    def _agrees(self, request: RefundRequest) -> bool:
        times = self._times_made(request.no_refund)
        outcome = self.outcomes.get(request.no_refund, "")
        moved = self.books.money_moved.get(request.no_refund, 0)
        return times in _MAY_BE_MADE.get(outcome, (0,)) and moved == times * request.money_refund

    def counts(self) -> list[Count]:
        """The usual outcomes, and those that occurred besides."""
        refunds = Counter({MADE.word: 0, "rejected": 0, "not sent": 0, "unknown": 0})
        carried_out: Counter[str] = Counter()
        for no_refund, outcome in self.outcomes.items():
            refunds[outcome] += 1
            carried_out[outcome] += self._times_made(no_refund)
        return [Count(outcome, number, carried_out[outcome]) for outcome, number in refunds.items()]

    def unknown(self) -> dict[str, int]:
        """How many times each refund was made whose outcome was left unknown."""
        return {
            no_refund: self._times_made(no_refund)
            for no_refund, outcome in self.outcomes.items()
            if outcome == "unknown"
        }
