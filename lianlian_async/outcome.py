"""What became of one request, and what traffic it caused, as values: for batches, which raise for no single refund."""

from __future__ import annotations

import attrs

from .errors import LianLianError
from .models import Refund, RefundRequest

__all__ = ["Outcome", "Tally"]


@attrs.define
class Tally:
    """How much traffic one refund has caused so far."""

    attempts: int = 0
    """Sends, those that certainly did not arrive included."""
    questions: int = 0
    """Queries."""


@attrs.frozen(kw_only=True)
class Outcome:
    """One request and what became of it: a ``refund`` or an ``error``, never both, never neither.

    Where a batch asked once more about what was unknown, the figures are those of both calls together.
    """

    request: RefundRequest
    refund: Refund | None
    error: LianLianError | None
    attempts: int
    """Sends; 0 where the journal knew the answer."""
    questions: int
    """Queries."""
    seconds: float
    """From the beginning of the call, its wait for a connection slot included, to its end."""
