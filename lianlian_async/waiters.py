"""Wait until a notification or a query reports that a refund is final."""

import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, cast

import anyio
import attrs

from . import errors
from .identity import check_identity
from .models import Record, Refund, RefundQuery, RefundRecord, RefundRequest
from .resolution import IncompleteRecord

logger = logging.getLogger("lianlian_async")

FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 300.0
"""Seconds. The pauses between queries double up to this: about twenty queries in the first hour."""

_TRANSIENT: Final = (
    errors.RefundNotFound,
    errors.GatewayUnavailable,
    errors.SignatureInvalid,
    errors.AnswerMismatch,
    errors.MalformedMessage,
    IncompleteRecord,
)
"""Errors of a query after which the next query may succeed."""


@attrs.define(eq=False)
class Waiter:
    """A call that waits for the final state of a refund."""

    identity: Mapping[str, str]
    """The known wire fields of the refund, for :func:`check_identity`."""
    notified: Refund | None = None
    """The final state from a notification."""
    _queries: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)

    def notify(self, refund: Refund) -> None:
        """Accept the final state from a notification of this refund, and stop the queries."""
        try:
            check_identity(self.identity, refund.identity())
        except (errors.AnswerMismatch, errors.RefundConflict) as error:
            logger.warning("the call that waits for refund %s ignores a notification: %s", refund.no_refund, error)
            return
        self.notified = refund
        self._queries.cancel()

    async def until_final(
        self, refund: Record, send: Callable[[RefundQuery], Awaitable[RefundRecord]], seconds: float
    ) -> Record:
        """Return the final state of ``refund``; ``send`` sends a query. Raises ``RefundNotFinal`` after ``seconds``."""
        if refund.is_final:
            return refund
        query, known = refund.query(), refund.identity()
        error: errors.LianLianError | None = None
        pause = FIRST_PAUSE
        with anyio.move_on_after(seconds), self._queries:
            while True:
                await anyio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                try:
                    found = await send(query)
                    check_identity(known, found.raw)
                    refund, error = cast("Record", found.completed(known)), None
                except _TRANSIENT as problem:
                    error = problem
                except errors.JournalError as problem:
                    problem.said = refund
                    raise
                except RuntimeError as problem:  # the session was closed during the wait
                    raise errors.RefundNotFinal(refund, last_error=str(problem)) from problem
                if refund.is_final:
                    return refund
        if self.notified is not None:
            return cast("Record", self.notified)
        raise errors.RefundNotFinal(refund, last_error=None if error is None else str(error)) from error


class Waiters:
    """The calls of one session that wait for a final state."""

    def __init__(self) -> None:
        self._waiters: dict[str, list[Waiter]] = {}

    @contextmanager
    def listen(self, about: RefundRecord | RefundRequest) -> Iterator[Waiter]:
        """Register a waiter for a refund's final state during the ``with`` block."""
        identity = about.to_dict() if isinstance(about, RefundRequest) else about.identity()
        number, waiter = str(about.no_refund), Waiter(identity)
        waiters = self._waiters.setdefault(number, [])
        waiters.append(waiter)
        try:
            yield waiter
        finally:
            waiters.remove(waiter)
            if not waiters:
                del self._waiters[number]

    def notify(self, refund: Refund) -> None:
        """Pass the final state to all calls that wait for it."""
        for waiter in self._waiters.get(str(refund.no_refund), ()):
            waiter.notify(refund)
