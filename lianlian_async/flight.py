"""Flights: concurrent calls of one session for the same refund share one flight, which makes the refund once.

A flight belongs to no caller. A caller leaves it when it is cancelled or at its deadline; the others stay, and the last
caller to leave cancels the flight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from functools import partial
from typing import Final

import anyio
import attrs

from .background import BackgroundTask
from .clock import Clock, Moment
from .errors import LianLianError, QueryRejected, RefundOutcomeUnknown
from .events import Paused
from .exchange import Call, Exchange
from .gateway_client import GatewayClient
from .identity import request_conflict
from .journal import Journal, OpenRefunds, Standing
from .logs import NOBODY
from .models import Refund, RefundRequest
from .outcome import Traffic
from .recording import Recording, answer, refusal
from .resolution import Case, matching, resolve
from .retry import Deadline, RetryPolicy

LONGEST_LEASE: Final = 2 * 86_400.0
"""Seconds."""

_CANARY_DAYS: Final = 80
"""Maximum age of the canary: a refund that was made, queried to check the query service. The gateway rejects queries
after 3 months (3005)."""


@attrs.frozen(kw_only=True)
class Order:
    """The arguments of one call."""

    request: RefundRequest
    journal: Journal
    policy: RetryPolicy
    seconds: float
    """The call's deadline, counted from the moment when its flight gets a connection slot."""
    earlier: RefundOutcomeUnknown | None = None
    """The unknown outcome of an earlier call."""
    query_first: bool = False


class Flights:
    """The flights of one open session."""

    def __init__(
        self, line: GatewayClient, clock: Clock, slot: Callable[..., AbstractAsyncContextManager[None]]
    ) -> None:
        self._gateway = line
        self._clock = clock
        self._slot = slot
        self._under_way: dict[str, Flight] = {}

    async def carry_out(self, order: Order, traffic: Traffic) -> Refund:
        """Join the flight of this refund, or start one; return its refund.

        ``traffic`` counts the requests of a new flight. Raises as :meth:`RefundSession.apply_refund`, and
        ``RefundConflict`` if the request differs from the request of the flight.
        """
        number, counted = order.request.no_refund, Traffic()
        while (flight := self._under_way.get(number)) is not None and flight.is_left:
            await flight.task.join()
            self._forget(number, flight)
        if flight is not None:
            flight.check_content(order.request)
        else:
            flight, counted = Flight(order, self._fly, self._unknown), traffic
            self._under_way[number] = flight
        try:
            return await flight.join(order.seconds)
        finally:
            self._forget(number, flight)  # the caller that started it may have left earlier
            counted.attempts, counted.queries = flight.traffic.attempts, flight.traffic.queries

    def _forget(self, number: str, flight: Flight) -> None:
        if flight.task.has_ended and self._under_way.get(number) is flight:
            del self._under_way[number]

    async def _fly(self, flight: Flight) -> Refund:
        """Send and resolve a refund, or only resolve the unknown outcome of an earlier call, and record it."""
        order, line = flight.order, self._gateway
        number, listeners = order.request.no_refund, line.listeners
        async with self._slot(partial(listeners.span, Paused, no_refund=number, cause="slot", seconds=None)):
            flight.take_off(anyio.current_time())
            await order.journal.bind(line.protocol.merchant.oid_partner, line.protocol.merchant.endpoints.apply)
            earlier = order.earlier
            if earlier is None or not earlier.body:
                fields, body = line.protocol.apply_fields(order.request), None
            else:
                fields, body = line.protocol.signed_fields(earlier.body), earlier.body
            recording = Recording(journal=order.journal, request=order.request, fields=fields, clock=self._clock)
            if (resolved := await recording.look()) is not None:
                return resolved
            if body is None:
                body = await line.seal(fields)
            lease = min(2 * flight.until.left(anyio.current_time()), LONGEST_LEASE)
            listeners = NOBODY if isinstance(order.journal, OpenRefunds) else listeners
            standing, entry = await recording.claim(body, lease, flight.until.at, listeners)
            if standing is Standing.FINISHED:
                return answer(entry)
            apply = line.exchange(Call.APPLY, fields, entry.body, flight.until, order.policy)
            if not isinstance(order.journal, OpenRefunds) and entry.leased_until is not None:
                apply = attrs.evolve(apply, lease_holds=partial(self._is_before, entry.leased_until))
            case = flight.case = Case(
                request=order.request,
                apply=apply,
                make_query=partial(self._query_exchange, order.request, apply),
                clock=self._clock,
                sent_at=entry.sent_at,
                refused=None if entry.refused is None else refusal(entry.no_refund, entry.refused),
                ask_first=standing is Standing.ASK_FIRST or order.query_first,
                before_resend=lambda: order.journal.resend(entry, case.history),
                canary=partial(self._canary, order.journal, apply),
                traffic=flight.traffic,
                history=entry.history,
            )
            if earlier is not None:
                _take_over(case, earlier)
            return await recording.keep(entry, partial(resolve, case, line.send, line.retries_left), case)

    def _unknown(self, flight: Flight) -> RefundOutcomeUnknown:
        """Return the unknown outcome for a caller that leaves before the end of the flight."""
        if flight.case is not None:
            return flight.case.unknown()
        now, order = self._clock(), flight.order
        return RefundOutcomeUnknown(
            request=order.request,
            oid_partner=self._gateway.protocol.merchant.oid_partner,
            moment=now,
            ask_again_at=now.wall + timedelta(seconds=order.policy.not_found_grace),
            last_error="the call ended before the gateway answered",
        )

    def _is_before(self, moment: Moment) -> bool:
        return self._clock().boot < moment.boot

    async def _query_exchange(self, request: RefundRequest, apply: Exchange) -> Exchange:
        # The deadline bounds the queries, not their number.
        policy = attrs.evolve(apply.policy, attempts=1_000_000)
        fields = self._gateway.protocol.query_fields(request.query())
        return self._gateway.exchange(Call.QUERY, fields, await self._gateway.seal(fields), apply.deadline, policy)

    async def _canary(self, journal: Journal, apply: Exchange) -> LianLianError | bool:
        entry = await journal.latest_made()
        if entry is None:
            return False
        known = RefundRequest.from_record(entry.fields)
        if self._clock().wall - known.dt_refund > timedelta(days=_CANARY_DAYS):
            return False
        query = attrs.evolve(await self._query_exchange(known, apply), policy=apply.policy)
        reply = await self._gateway.send(query)
        if isinstance(reply.error, QueryRejected) and reply.error.ret_code == "3005":
            return False
        if reply.refund is None:
            return LianLianError(
                f"the query service does not know refund {entry.no_refund}, which was made ({reply.error}), so its "
                "answers about other refunds prove nothing; check the query URL"
            )
        try:
            matching(known, reply.refund)
        except LianLianError as error:
            return error
        return True


def _take_over(case: Case, earlier: RefundOutcomeUnknown) -> None:
    """Add the evidence of an earlier call, which may have used another journal."""
    if case.sent_at is None:
        case.sent_at, case.refused = earlier.moment, earlier.refused
    else:
        case.told_at = earlier.moment
        case.refused = case.refused and earlier.refused


@attrs.define(eq=False)
class _Caller:
    seconds: float
    """The caller's deadline, counted from the moment when the flight gets its connection slot."""
    scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)
    leaves_at: float = attrs.field(default=math.inf, init=False)
    """The deadline on the event loop's clock."""


class Flight:
    """One refund under way, in a background task."""

    def __init__(
        self,
        order: Order,
        fly: Callable[[Flight], Awaitable[Refund]],
        unknown: Callable[[Flight], RefundOutcomeUnknown],
    ) -> None:
        self.order = order
        self.until = Deadline(math.inf)
        """The latest deadline of all callers."""
        self.traffic = Traffic()
        self.case: Case | None = None
        self._fly = fly
        self._unknown = unknown
        self._callers: list[_Caller] = []
        self._refund: Refund | None = None
        self._error: BaseException | None = None
        self._is_raised = False
        self.is_left = False
        """Whether the last caller has left before the end of the flight, which cancels the flight."""
        self.task = BackgroundTask(self._run)

    def check_content(self, request: RefundRequest) -> None:
        """Raise ``RefundConflict`` if ``request`` differs from this flight's."""
        ours, theirs = request.to_dict(), self.order.request.to_dict()
        ours["notify_url"] = theirs["notify_url"] = ""
        if (conflict := request_conflict(request.no_refund, ours, theirs)) is not None:
            raise conflict

    def take_off(self, now: float) -> None:
        """Start the callers' deadlines, because the flight has got its connection slot."""
        for caller in self._callers:
            caller.leaves_at = now + caller.seconds
        self._bound(max((caller.leaves_at for caller in self._callers), default=now))

    def _bound(self, until: float) -> None:
        """Set the deadline of the flight and of each caller that leaves before it (event loop's clock)."""
        self.until.at = until
        for caller in self._callers:
            caller.scope.deadline = caller.leaves_at if caller.leaves_at < until else math.inf

    async def join(self, seconds: float) -> Refund:
        """Wait for the end of the flight, up to the caller's deadline. Each caller gets its own exception."""
        caller = _Caller(seconds)
        self._callers.append(caller)
        if self.until.at < math.inf:
            caller.leaves_at = anyio.current_time() + seconds
            self._bound(max(self.until.at, caller.leaves_at))
        try:
            with caller.scope:
                await self.task.join()
        finally:
            self._callers.remove(caller)
            if not self._callers:
                self.is_left = not self.task.has_ended
                await self.task.aclose()
        if self._refund is not None:
            return self._refund
        raise self._own_error()

    def _own_error(self) -> BaseException:
        error = self._error
        if error is None or isinstance(error, anyio.get_cancelled_exc_class()):
            return self._unknown(self)
        if self._is_raised:  # in another task: with each raise the traceback of a shared exception would grow
            cause = error.__cause__ or error
            error = copy.copy(error)
            error.__cause__ = cause
        self._is_raised = True
        return error

    async def _run(self) -> None:
        try:
            self._refund = await self._fly(self)
        except BaseException as error:  # noqa: BLE001 - raised in the callers
            self._error = error
