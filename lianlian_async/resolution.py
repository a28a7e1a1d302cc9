"""Resolve one refund: apply, query, and return or raise its outcome (made, rejected, not sent, conflict or unknown).

:data:`NEXT_STEP` decides after each apply attempt. :class:`Case` decides whether a record, or the answer "no such
record", proves an outcome. The functions send, query and wait.
"""

import math
from collections.abc import Awaitable, Callable
from datetime import timedelta
from enum import Enum
from typing import Final, cast

import anyio
import attrs

from .clock import Clock, Moment, elapsed, latest
from .codes import CodeClass, explain
from .errors import AnswerMismatch, LianLianError, RefundConflict, RefundOutcomeUnknown, RefundRejected
from .exchange import Call, Exchange, Finding, Reply
from .identity import check_identity, has_whole_identity
from .journal.base import added
from .middleware import Next, backoff
from .models import Refund, RefundRecord, RefundRequest
from .outcome import Traffic, unknown_reason
from .retry import LONGEST_RETRY_AFTER

_SHOWN_SOON: Final = timedelta(seconds=60)
"""A call whose first query starts within this time after the last send continues to query after "no such record"."""

_LONGEST_WAIT: Final = 90 * 86_400.0
"""Seconds: the longest time until ``ask_again_at``. After 3 months the gateway rejects a query (3005)."""


class Step(Enum):
    """What to do after an apply attempt."""

    RETURN = "return the record"
    RAISE = "raise the error: the outcome is certain"
    QUERY = "query before anything else"


NEXT_STEP: Final[dict[Finding, tuple[Step, Step]]] = {
    # finding of this attempt: (no earlier attempt may have arrived, one may have)
    Finding.NOT_SENT: (Step.RAISE, Step.QUERY),
    Finding.FOUND: (Step.RETURN, Step.RETURN),
    Finding.REJECTED: (Step.RAISE, Step.QUERY),  # 5007 may mean that the earlier attempt worked
    Finding.CONFLICT: (Step.RAISE, Step.RAISE),
    Finding.EXISTS: (Step.QUERY, Step.QUERY),
    Finding.UNCERTAIN: (Step.QUERY, Step.QUERY),
}
"""The decision table. ``retry`` has already repeated sends that did not arrive, within policy and deadline."""


@attrs.define(kw_only=True)
class Case:
    """One refund whose outcome is open, with the evidence so far."""

    request: RefundRequest
    apply: Exchange
    make_query: Callable[[], Awaitable[Exchange]]
    """Creates the query exchange. Called only if a query is needed, because its signature takes time."""
    clock: Clock
    sent_at: Moment | None = None
    """The latest time at which an attempt may have arrived. None: no attempt can have made the refund."""
    refused: RefundRejected | None = None
    """The last answer *duplicate* or *in progress*. None: there is no such answer, or an attempt may have succeeded."""
    query_first: bool = False
    """Whether to query before the first send: the caller wants it, or the journal may have lost an attempt."""
    before_resend: Callable[[str], Awaitable[bytes]]
    """Records in the journal that the request may be sent again, and returns its body; its argument is ``history``."""
    canary: Callable[[], Awaitable[bool]]
    """Queries the canary, a refund that was made. True: found; False: there is no suitable one. Else raises
    :class:`WrongQueryService`."""
    traffic: Traffic = attrs.field(factory=Traffic)
    history: str = ""
    rejection: LianLianError | None = None
    """The rejection of the last attempt. It is raised after a query has proved that no earlier attempt succeeded."""
    retry_after: float | None = None
    """Seconds that the last answer asked to wait."""
    apply_error: LianLianError | None = None
    query_error: LianLianError | None = None

    def add_fact(self, what: str, result: str = "") -> None:
        """Add a fact to ``history``, which the journal records with the outcome."""
        self.history = added(self.history, self.clock(), what, result)

    def not_found_is_believed(self, asked_at: Moment) -> bool:
        """Return whether "no such record", queried at ``asked_at``, proves that no attempt was carried out."""
        if self.sent_at is None:
            return True
        # The time from the query to its answer does not count. The gateway's time at the query is computed from the
        # clock after the answer, because this answer may be the first one with a Date header.
        asked_at = attrs.evolve(asked_at, gateway=None).dated(self.clock())
        seconds = elapsed(self.sent_at, asked_at)
        if seconds is None:  # not measurable: the grace starts at this query; the journal keeps this moment
            self.sent_at = asked_at
            return False
        return seconds >= self.apply.policy.not_found_grace

    def grace_left(self, sent_at: Moment, now: Moment) -> float:
        """Return the seconds until "no such record" can be believed."""
        return self.apply.policy.not_found_grace - (elapsed(sent_at, now) or 0.0)

    def take_over(self, sent_at: Moment | None, refused: RefundRejected | None) -> None:
        """Add the evidence of an earlier call, which may have used another journal or machine."""
        if self.sent_at is None:
            self.sent_at, self.refused = sent_at, refused
        else:
            self.sent_at = latest(self.sent_at, sent_at or self.sent_at, self.clock())
            self.refused = self.refused and refused

    def doubt(self, refund: RefundRecord) -> LianLianError | None:
        """Return why the record ``refund`` does not prove that this refund was made; None: it does.

        Raises ``RefundConflict`` if it is the record of another refund.
        """
        try:
            matching(self.request, refund)
        except AnswerMismatch as mismatch:
            return mismatch
        return doubt(refund, may_have_worked=self.sent_at is not None and self.refused is None)

    @property
    def is_duplicate(self) -> bool:
        """Whether the last answer was *duplicate*, and no attempt can have made the refund."""
        return self.refused is not None and explain(self.refused.ret_code).kind is not CodeClass.IN_PROGRESS

    def next_step(self, finding: Finding) -> Step:
        """Return the step after an apply attempt with this ``finding``."""
        if finding is not Finding.NOT_SENT and not self.apply.lease_holds():  # another worker may have sent it
            self.sent_at, self.refused = self.clock(), None
        return NEXT_STEP[finding][self.sent_at is not None]

    def take_in(self, reply: Reply) -> None:
        """Add the evidence of an apply attempt whose next step is a query."""
        self.rejection = reply.error if reply.finding is Finding.REJECTED else None
        if reply.finding in (Finding.EXISTS, Finding.UNCERTAIN):
            only_refused = self.sent_at is None or self.refused is not None
            self.refused = reply.error if only_refused and isinstance(reply.error, RefundRejected) else None
            self.sent_at = self.clock()

    def unknown(self, seconds_left: float = 0.0) -> RefundOutcomeUnknown:
        """Return the unknown outcome; ``seconds_left``: how long the flight may still send for its other callers."""
        now = self.clock()
        sent_at = now.after(seconds_left) if seconds_left else (self.sent_at or now).dated(now)
        policy = self.apply.policy
        wait = max(self.grace_left(sent_at, now), policy.maximum, min(self.retry_after or 0.0, LONGEST_RETRY_AFTER))
        problems = self.apply_error, self.query_error
        error = RefundOutcomeUnknown(
            request=self.request,
            oid_partner=self.apply.asked["oid_partner"],
            apply_url=self.apply.url,
            body=self.apply.body,
            attempts=self.traffic.attempts,
            queries=self.traffic.queries,
            moment=sent_at,
            ask_again_at=now.wall + timedelta(seconds=min(wait, _LONGEST_WAIT)),
            last_error="; then ".join(dict.fromkeys(str(each) for each in problems if each)) or "no answer yet",
            refused=None if seconds_left else self.refused,
            reason=unknown_reason(*problems),
        )
        error.__cause__ = self.query_error or self.apply_error
        exchanges = (each.last_exchange for each in (self.query_error, self.apply_error) if each is not None)
        error.last_exchange = next(filter(None, exchanges), None)
        return error


async def resolve(case: Case, send: Next) -> Refund:
    """Return the refund, or raise its outcome; ``send`` is the middleware chain."""
    try:
        # A new refund is sent first; a refund that may have been sent is queried first.
        is_new = case.sent_at is None and not case.query_first
        refund = await _apply(case, send) if is_new else None
        sends_left = case.apply.policy.attempts - is_new
        while refund is None:
            refund = await _query(case, send)
            if refund is None:
                _raise_proved(case)
                if not sends_left:
                    raise case.unknown()
                sends_left -= 1
                if case.sent_at is not None:
                    case.add_fact("resend")
                    case.apply = attrs.evolve(case.apply, body=await case.before_resend(case.history))
                refund = await _apply(case, send)
    except (Exception, anyio.get_cancelled_exc_class()) as error:
        if isinstance(error, LianLianError) or anyio.current_effective_deadline() == -math.inf:
            raise
        # This call was not cancelled: a lower layer raised the error.
        case.query_error = LianLianError(f"interrupted by {type(error).__name__}")
        raise case.unknown() from error
    return refund


def _raise_proved(case: Case) -> None:
    """Return if the request may be sent after a believed "no such record"; else raise the outcome."""
    if case.sent_at is None:
        return
    if not case.apply.lease_holds():
        case.query_error = LianLianError("the lease has ended: another worker may have sent this refund")
        raise case.unknown()
    if case.rejection is not None:
        raise case.rejection
    if case.refused is not None and case.is_duplicate:
        raise case.refused


async def _apply(case: Case, send: Next) -> Refund | None:
    """Send once (``retry`` repeats only sends that did not arrive). Return the record; None: query next."""
    try:
        reply = await send(attrs.evolve(case.apply, attempt=case.traffic.attempts + 1))
    except BaseException:  # the request may have been sent
        case.sent_at, case.refused = case.clock(), None
        case.add_fact(Call.APPLY, "interrupted")
        raise
    case.traffic.attempts += reply.attempts
    case.add_fact(Call.APPLY, _result(reply))
    case.apply_error, case.retry_after = reply.error, reply.retry_after
    step = case.next_step(reply.finding)
    if step is Step.RETURN:
        return cast("Refund", reply.refund)  # the request supplies what the answer lacks
    if step is Step.RAISE and reply.error is not None:
        raise reply.error
    case.take_in(reply)
    return None


async def _query(case: Case, send: Next) -> Refund | None:
    """Query until there is a proof. Return the record; None: the refund was certainly not made."""
    query = await case.make_query()
    if case.retry_after and not await backoff(query, 0, case.retry_after):
        raise case.unknown()
    # The wall clock is enough, because no send depends on it.
    is_recent = case.sent_at is None or case.clock().wall - case.sent_at.wall < _SHOWN_SOON
    queries, is_canary_found = 0, False
    while True:
        asked_at = case.clock()
        reply = await send(attrs.evolve(query, attempt=case.traffic.queries + 1))
        case.traffic.queries += reply.attempts
        case.add_fact(Call.QUERY, _result(reply))
        case.query_error, case.retry_after = reply.error, reply.retry_after
        if reply.refund is not None:
            case.query_error = case.doubt(reply.refund)
            if case.query_error is None:
                return matching(case.request, reply.refund)
        elif isinstance(reply.error, RefundConflict):
            raise reply.error
        elif reply.finding is not Finding.NOT_FOUND:  # the retries are used up, or the query was rejected
            break
        if case.not_found_is_believed(asked_at):
            if reply.refund is not None and not case.is_duplicate:  # one of our attempts may have made this record
                break
            try:
                if is_canary_found or not await case.canary():
                    return None
            except WrongQueryService as error:
                case.query_error = error
                break
            is_canary_found = True
            continue  # query once more: the query service may have been repaired just before the canary's answer
        grace_left = case.grace_left(case.sent_at or asked_at, case.clock())
        # If this call cannot send again, more queries would probably find nothing either.
        is_hopeless = not is_recent and grace_left > query.deadline.left(anyio.current_time())
        if is_hopeless or not await backoff(query, queries, reply.retry_after):
            break
        queries += 1
    raise case.unknown()


class WrongQueryService(LianLianError):
    """The query service did not return a refund that was made, so its "no such record" proves nothing."""


class IncompleteRecord(LianLianError):
    """A verified record or notification lacks a field without which it proves nothing."""


def doubt(record: RefundRecord, *, may_have_worked: bool) -> IncompleteRecord | None:
    """Return why ``record``, which must match the request, does not prove that the refund was made; None: it does.

    If no attempt can have made the refund, the number may belong to another refund: then only a record with the whole
    identity is a proof.
    """
    if may_have_worked or has_whole_identity(record.raw):
        return None
    return IncompleteRecord("the record found lacks dt_refund or money_refund: it may belong to another refund")


def matching(request: RefundRequest, found: RefundRecord) -> Refund:
    """Return ``found``, completed from ``request``. Raises ``RefundConflict`` and ``AnswerMismatch``."""
    fields = request.to_dict()
    try:
        check_identity(fields, found.raw)
    except LianLianError as error:
        error.last_exchange = found.last_exchange
        raise
    return cast("Refund", found.completed(fields))  # the request has number and amount


def _result(reply: Reply) -> str:
    """Return the ``result`` of the ``Fact`` about a reply."""
    if reply.refund is not None:
        return f"sta_refund {reply.refund.sta_refund or '-'}"
    if isinstance(reply.error, RefundConflict):
        return "another refund"
    result: str = getattr(reply.error, "ret_code", None) or unknown_reason(reply.error, None)
    return f"not sent: {result}" if reply.finding is Finding.NOT_SENT else result
