"""The demo's audit: what the library said about each refund, beside what the gateway's books say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import attrs

from lianlian_async.cli.exit_codes import INTERRUPTED, MADE, NOT_SENT, REJECTED, UNKNOWN, ExitOutcome
from lianlian_async.models import RefundRequest

from .process import Books

__all__ = ["Audit", "Count"]

_MAY_BE_MADE: Final = {MADE: (1,), UNKNOWN: (0, 1), INTERRUPTED: (0, 1)}
"""How many times the books may hold a refund that ended in this way; one that ended in any other way: not at all."""


class Count(NamedTuple):
    """How many refunds ended in one way, and how many times the gateway carried them out."""

    word: str
    refunds: int
    carried_out: int


@attrs.frozen
class Audit:
    """How each ``no_refund`` that was begun ended for the client, against the gateway's ``books``."""

    requests: Sequence[RefundRequest]
    endings: Mapping[str, ExitOutcome]
    books: Books

    def _times_made(self, no_refund: str) -> int:
        return self.books.times_made.get(no_refund, 0)

    def made_twice(self) -> int:
        """How many refunds were carried out more than once."""
        return sum(times > 1 for times in self.books.times_made.values())

    def disagreements(self) -> list[str]:
        """The refunds that ended otherwise than the books say, or for which other money moved than was asked for."""
        return [request.no_refund for request in self.requests if not self._agrees(request)]

    def _agrees(self, request: RefundRequest) -> bool:
        times = self._times_made(request.no_refund)
        allowed = _MAY_BE_MADE.get(self.endings.get(request.no_refund, NOT_SENT), (0,))
        moved = self.books.money_moved.get(request.no_refund, 0)
        return times in allowed and moved == times * request.money_refund

    def counts(self) -> list[Count]:
        """The usual endings, and those that occurred besides."""
        refunds = Counter({MADE: 0, REJECTED: 0, NOT_SENT: 0, UNKNOWN: 0})
        carried_out: Counter[ExitOutcome] = Counter()
        for no_refund, ending in self.endings.items():
            refunds[ending] += 1
            carried_out[ending] += self._times_made(no_refund)
        return [Count(ending.word, number, carried_out[ending]) for ending, number in refunds.items()]

    def unknown(self) -> dict[str, int]:
        """How many times each refund was carried out that was left unknown."""
        return {
            no_refund: self._times_made(no_refund) for no_refund, ending in self.endings.items() if ending == UNKNOWN
        }
