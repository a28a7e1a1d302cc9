"""Retry policy, retry budget and deadline. This module reads no clock: time and randomness are arguments."""

import math
from typing import Final

import attrs

from .errors import ConfigurationError
from .settings import check_integer, check_seconds, check_type, is_number

LONGEST_ATTEMPT: Final = 10.0
"""Seconds: the longest time that one attempt may take."""

SHORTEST_ATTEMPT: Final = 0.01
"""Seconds: the shortest timeout of an attempt; if less is left for it, no attempt is made."""

LONGEST_RETRY_AFTER: Final = 60.0
"""Seconds: the upper bound of a server's Retry-After."""


@attrs.frozen(kw_only=True)
class RetryBudget:
    """The limit for all retries of one session together: a token bucket of ``capacity``, refilled at ``per_second``.

    It protects an overloaded gateway from the retries of a thousand calls. While it is empty, a call ends instead of
    retrying.
    """

    capacity: float = 500.0
    per_second: float = 50.0

    def __attrs_post_init__(self) -> None:
        numbers = is_number(self.capacity) and is_number(self.per_second)
        if not (numbers and self.capacity >= 1 and self.per_second >= 0):
            raise ConfigurationError("RetryBudget: capacity must be at least 1, per_second at least 0")


class TokenBucket:
    """The retries left in a :class:`RetryBudget`."""

    def __init__(self, budget: RetryBudget) -> None:
        self._budget = budget
        self._tokens = budget.capacity
        self._at = math.inf  # so that the first take adds no tokens

    def take(self, now: float) -> bool:
        """Take one retry at ``now`` (seconds of a monotonic clock) and return True; return False if none is left."""
        refilled = self._tokens + self._budget.per_second * max(0.0, now - self._at)
        self._tokens = min(self._budget.capacity, refilled)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@attrs.frozen
class RetryPolicy:
    """The retry policy of a call.

    The pause after ``n`` retries is random (full jitter): from 0 to ``initial`` × ``multiplier`` ** n seconds, at most
    ``maximum``. ``attempts`` does not limit the queries about a refund that may have been made. If its last send was
    more than a minute ago, one "no such record" ends the call, unless the grace ends before the deadline.
    """

    attempts: int = 4
    """Maximum number (≥ 1): of successive sends that certainly did not arrive, of sends in one call that may have
    arrived, and of queries in one ``query_refund``."""
    initial: float = 0.5
    """Seconds: the upper bound of the first pause."""
    maximum: float = 8.0
    """Seconds: the upper bound of every pause; only a server's Retry-After may be longer (at most 60 s)."""
    multiplier: float = 2.0
    """The factor by which the upper bound grows with each retry."""
    budget: RetryBudget = RetryBudget()
    """The retry budget of the session, shared by all its calls. In the policy of a single call, it is ignored."""
    not_found_grace: float = 900.0
    """Seconds after the last attempt that may have arrived, until "no such record" is believed.

    Until then nothing is sent again. LianLian recommends querying 15 minutes after an apply call. Choose a shorter time
    only for a gateway that is known to deduplicate ``no_refund``.
    """

    def __attrs_post_init__(self) -> None:
        check_type("RetryPolicy: budget", self.budget, RetryBudget)
        check_integer("RetryPolicy: attempts", self.attempts, least=1)
        check_seconds("RetryPolicy: initial", self.initial)
        check_seconds("RetryPolicy: maximum", self.maximum, least=self.initial)
        check_seconds("RetryPolicy: not_found_grace", self.not_found_grace, least=0)
        if not is_number(self.multiplier) or not 1 <= self.multiplier <= 1000:  # 1000**64 fits a float
            raise ConfigurationError(f"RetryPolicy: multiplier: must be from 1 to 1000, is {self.multiplier!r}")

    def pause(self, retries: int, random: float, retry_after: float | None = None) -> float:
        """Return the seconds to wait before the next attempt.

        ``retries``: the number of retries so far. ``random``: from 0 to 1. ``retry_after``: seconds (Retry-After).
        """
        ceiling = min(self.maximum, self.initial * self.multiplier ** min(retries, 64))
        return max(random * ceiling, min(retry_after or 0.0, LONGEST_RETRY_AFTER))


class Deadline:
    """The time ``at`` at which a call must end, in seconds of the monotonic clock that ``now`` comes from."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.paused_at = math.inf

    def left(self, now: float) -> float:
        """Return the seconds left; negative after the deadline."""
        return self.at - min(now, self.paused_at)

    def attempt(self, now: float) -> float:
        """Return the next attempt's timeout: half of the time left, so that a query can follow; 0.0: too little."""
        share = min(self.left(now) / 2, LONGEST_ATTEMPT)
        return share if share >= SHORTEST_ATTEMPT else 0.0

    def pause(self, now: float) -> None:
        """Begin a wait that does not count, for a connection slot or for the user's limiter."""
        self.paused_at = now

    def resume(self, now: float) -> None:
        """Move the deadline by the time since :meth:`pause`; do nothing without a pause."""
        self.at += max(0.0, now - self.paused_at)
        self.paused_at = math.inf
