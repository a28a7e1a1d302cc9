"""From the first send to certain knowledge: apply → ask → made, rejected, not sent or unknown.

What decides is the table :data:`NEXT_STEP` and :meth:`Case.absence_is_believed`; the rest only waits.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from enum import Enum
from typing import Final

import anyio
import attrs

from .errors import LianLianError, RefundConflict, RefundOutcomeUnknown
from .exchange import Exchange, Known
from .middleware import Next, pause
from .models import Refund, RefundRequest
from .outcome import Tally
from .retry import Bucket

__all__ = ["NEXT_STEP", "Case", "Step", "matching", "settle"]

logger = logging.getLogger("lianlian_async")


_LONGEST_WAIT: Final = 90 * 86_400.0
"""Seconds: a question may not span over 3 months (3005), so that later than this nothing could be learned."""


class Step(Enum):
    """What to do after an apply call."""

    RETURN = "answer with the record"
    RAISE = "raise what is certain"
    ASK = "query before anything else"


NEXT_STEP: Final[dict[tuple[Known, bool], Step]] = {
    # (what this attempt taught, may an earlier one have arrived?)
    (Known.NOT_SENT, False): Step.RAISE,
    (Known.NOT_SENT, True): Step.ASK,
    (Known.FOUND, False): Step.RETURN,
    (Known.FOUND, True): Step.RETURN,
    (Known.REJECTED, False): Step.RAISE,
    (Known.REJECTED, True): Step.ASK,  # 5007 may mean that the earlier attempt worked
    (Known.EXISTS, False): Step.ASK,
    (Known.EXISTS, True): Step.ASK,
    (Known.UNCERTAIN, False): Step.ASK,
    (Known.UNCERTAIN, True): Step.ASK,
}
"""The decision table. What was not sent has by then been repeated as far as policy and deadline allow."""


@attrs.define(kw_only=True)
class Case:
    """One refund whose outcome is open, and what is known of it so far. Times are the event loop's seconds."""

    request: RefundRequest
    apply: Exchange
    question: Callable[[], Awaitable[Exchange]]
    """Makes the query exchange when it is first needed: most refunds never need it, and it costs a signature."""
    epoch: datetime
    """The wall-clock time of the event loop's zero second."""
    sent_at: float | None = None
    """When an attempt may last have arrived; None: none may have."""
    tally: Tally = attrs.field(factory=Tally)
    rejection: LianLianError | None = None
    """A "no" to the last attempt, to be believed once an earlier attempt is known not to have worked."""
    retry_after: float | None = None
    apply_error: LianLianError | None = None
    query_error: LianLianError | None = None

    def was_sent(self, at: datetime) -> None:
        """Take over from an earlier call or process, of which an attempt may have arrived until ``at``."""
        earlier = min((at - self.epoch).total_seconds(), anyio.current_time())
        self.sent_at = earlier if self.sent_at is None else max(earlier, self.sent_at)

    def absence_is_believed(self, asked_at: float) -> bool:
        """Whether "no such record", asked for at ``asked_at``, proves that no attempt was carried out."""
        return self.sent_at is None or asked_at - self.sent_at >= self.apply.policy.absence_grace

    def unknown(self) -> RefundOutcomeUnknown:
        """The honest end: all that is needed to ask again."""
        now = anyio.current_time()
        sent_at = now if self.sent_at is None else self.sent_at
        policy = self.apply.policy
        ask_again_at = max(sent_at + policy.absence_grace, now + max(policy.maximum, self.retry_after or 0.0))
        ask_again_at = min(ask_again_at, now + _LONGEST_WAIT)
        error = RefundOutcomeUnknown(
            request=self.request,
            question=self.request.query(),
            oid_partner=self.apply.asked["oid_partner"],
            body=self.apply.body,
            attempts=self.tally.attempts,
            questions=self.tally.questions,
            sent_at=self.epoch + timedelta(seconds=sent_at),
            ask_again_at=self.epoch + timedelta(seconds=ask_again_at),
            last_error="; then ".join(str(error) for error in (self.apply_error, self.query_error) if error),
        )
        error.__cause__ = self.query_error or self.apply_error
        return error


async def settle(case: Case, send: Next, bucket: Bucket) -> Refund:
    """Carry ``case`` to its end; ``send`` is the session's onion, ``bucket`` its retry budget.

    Raises ``RefundNotSent``, ``RefundRejected``, ``RefundConflict`` or ``RefundOutcomeUnknown``.
    """
    try:
        # What was left unknown is asked about first; a new refund is sent first.
        refund = await _apply(case, send) if case.sent_at is None else None
        resends = case.apply.policy.attempts - 1
        while refund is None:
            refund = await _ask(case, send, bucket)
            if refund is None:
                if case.rejection is not None:
                    raise case.rejection
                if not resends:
                    raise case.unknown()
                resends -= 1
                refund = await _apply(case, send)
    except anyio.get_cancelled_exc_class():
        logger.warning("refund %s: cancelled, it may have been made; ask before sending it again", _number(case))
        raise
    return refund


async def _apply(case: Case, send: Next) -> Refund | None:
    """One send (repeated only while certainly not sent). The record, or None: it has to be asked about."""
    reply = await send(case.apply)
    case.tally.attempts += reply.attempts
    case.apply_error, case.retry_after = reply.error, reply.retry_after
    step = NEXT_STEP[reply.known, case.sent_at is not None]
    if step is Step.RETURN:
        return reply.refund
    if step is Step.RAISE and reply.error is not None:
        raise reply.error
    case.rejection = reply.error if reply.known is Known.REJECTED else None
    if reply.known in (Known.EXISTS, Known.UNCERTAIN):
        case.sent_at = anyio.current_time()
    logger.info("refund %s: %s; asking", _number(case), reply.error)
    return None


async def _ask(case: Case, send: Next, bucket: Bucket) -> Refund | None:
    """Query until there is a record, or None: certainly not made. Raises what is left unknown at the deadline."""
    query = await case.question()
    if case.retry_after and not await pause(query, bucket, 0, case.retry_after):
        raise case.unknown()
    questions = 0
    while True:
        asked_at = anyio.current_time()
        reply = await send(query)
        case.tally.questions += reply.attempts
        case.query_error, case.retry_after = reply.error, reply.retry_after
        if reply.refund is not None:
            return matching(case.request, reply.refund)
        if reply.known is not Known.NOT_FOUND:  # asked as long as it was worth it, or refused
            break
        if case.absence_is_believed(asked_at):
            return None
        if not await pause(query, bucket, questions, reply.retry_after):
            break
        questions += 1
    raise case.unknown()


def matching(request: RefundRequest, found: Refund) -> Refund:
    """``found``, unless our number stands for another refund: then ``RefundConflict`` is raised.

    What the gateway's record leaves out cannot contradict.
    """
    for field, ours, theirs in (
        ("money_refund", request.money_refund, found.money_refund),
        ("dt_refund", request.dt_refund, found.dt_refund),
    ):
        text = found.raw.get(field)
        if text and theirs != ours:
            raise RefundConflict(request.no_refund, field=field, ours=request.to_dict()[field], theirs=text)
    return found


def _number(case: Case) -> str:
    return case.request.no_refund
