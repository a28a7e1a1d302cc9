"""When to try again, and how long to wait first: pure values, with time and randomness as arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import attrs

from .errors import ConfigurationError
from .settings import check_type, is_number

__all__ = ["Deadline", "RetryBudget", "RetryPolicy", "TokenBucket"]

LONGEST_ATTEMPT: Final = 10.0
"""Seconds that one attempt may take at most, however much time is left."""

SHORTEST_ATTEMPT: Final = 0.01
"""Seconds below which what is left is not worth another attempt."""


@attrs.frozen(kw_only=True)
class RetryBudget:
    """How many retries one session may spend: bursts of ``capacity``, then ``per_second`` on the long run.

    It keeps a gateway in trouble from being buried under the retries of a thousand calls. A retry that finds
    the budget empty is not made: the call ends with what is known.
    """

    capacity: float = 500.0
    per_second: float = 50.0

    def __attrs_post_init__(self) -> None:
        numbers = is_number(self.capacity) and is_number(self.per_second)
        if not (numbers and self.capacity >= 1 and self.per_second >= 0):
            raise ConfigurationError("RetryBudget: capacity must be at least 1, per_second at least 0")


@attrs.define
class TokenBucket:
    """The state of a :class:`RetryBudget`: what is left of it at a moment (seconds of a steady clock)."""

    budget: RetryBudget
    _tokens: float = attrs.field(default=attrs.Factory(lambda self: self.budget.capacity, takes_self=True), init=False)
    _at: float = attrs.field(default=math.inf, init=False)  # no time has passed before the first take

    def take(self, now: float) -> bool:
        """Spend one retry, if the budget has one."""
        refilled = self._tokens + self.budget.per_second * max(0.0, now - self._at)
        self._tokens = min(self.budget.capacity, refilled)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@attrs.frozen
class RetryPolicy:
    """How a call tries again.

    Pauses are drawn evenly between 0 and ``initial`` × ``multiplier`` ** n seconds (full jitter), at most
    ``maximum``. ``attempts`` bounds the sends of one call that certainly did not arrive, and the queries of
    one ``query_refund``; a refund that may have been made is asked about until the call's deadline.
    """

    attempts: int = 4
    """Sends at most (≥ 1) in one call."""
    initial: float = 0.5
    """Seconds: the upper bound of the first pause."""
    maximum: float = 8.0
    """Seconds: the upper bound of every pause."""
    multiplier: float = 2.0
    budget: RetryBudget = RetryBudget()
    """What all calls of one session may spend on retries together."""
    not_found_grace: float = 900.0
    """Seconds after the last attempt that may have arrived before "no such record" is believed.

    Until then the outcome is unknown and nothing is sent again. LianLian recommends to ask 15 minutes after
    applying; lower it only where the gateway is known to deduplicate ``no_refund``.
    """
    retry_after_maximum: float = 60.0
    """Seconds: a server's Retry-After is honoured up to this much."""

    def __attrs_post_init__(self) -> None:
        check_type("RetryPolicy: budget", self.budget, RetryBudget)
        numbers = ("attempts", "initial", "maximum", "multiplier", "not_found_grace", "retry_after_maximum")
        broken = [f"{name} must be a number" for name in numbers if not is_number(getattr(self, name))]
        rules: dict[str, Callable[[], bool]] = {
            "attempts must be an integer of at least 1": lambda: isinstance(self.attempts, int) and self.attempts >= 1,
            "initial must be more than 0": lambda: self.initial > 0,
            "maximum must be finite and at least initial": lambda: self.initial <= self.maximum < math.inf,
            "multiplier must be from 1 to 1000": lambda: 1 <= self.multiplier <= 1000,  # its 64th power is a float
            "not_found_grace must be at least 0": lambda: self.not_found_grace >= 0,
            "retry_after_maximum must be at least 0": lambda: self.retry_after_maximum >= 0,
        }
        broken = broken or [rule for rule, holds in rules.items() if not holds()]
        if broken:
            raise ConfigurationError("RetryPolicy: " + "; ".join(broken))

    def pause(self, retries: int, random: float, retry_after: float | None = None) -> float:
        """Seconds to wait before the next attempt.

        ``retries`` made already (0 for the first), ``random`` in [0, 1), ``retry_after`` as the server asked.
        """
        ceiling = min(self.maximum, self.initial * self.multiplier ** min(retries, 64))
        return max(random * ceiling, min(retry_after or 0.0, self.retry_after_maximum))


@attrs.define
class Deadline:
    """When a call has to end, on the same steady clock as ``now``."""

    at: float

    def left(self, now: float) -> float:
        """Seconds left (negative: over)."""
        return self.at - now

    def attempt(self, now: float) -> float:
        """Seconds that the next attempt may take: half of what is left, so that there is always time to ask.

        0.0 when too little is left for another attempt.
        """
        share = min(self.left(now) / 2, LONGEST_ATTEMPT)
        return share if share >= SHORTEST_ATTEMPT else 0.0

    def extend(self, seconds: float) -> None:
        """Waiting for a permit of the caller's own rate limit does not count."""
        self.at += seconds
