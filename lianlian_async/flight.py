"""Flights: all calls of one session for one refund share one, which is on record and belongs to no caller.

A caller that is cancelled, or whose deadline is over, leaves the flight to the others; the last one that leaves
takes it down. So the same request, three times at once, is one refund.
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
from .exchange import Call, Exchange
from .gateway_client import GatewayClient
from .identity import request_conflict
from .journal import Journal, OpenRefunds, Standing
from .models import Refund, RefundRequest
from .outcome import Traffic
from .recording import Recording, answer, refusal
from .resolution import Case, matching, resolve
from .retry import Deadline, RetryPolicy

__all__ = ["Flight", "Flights", "Order"]

LONGEST_LEASE: Final = 2 * 86_400.0
"""Seconds."""

_CANARY_DAYS: Final = 80
"""A canary is younger than that: a query may not span over 3 months (3005)."""


@attrs.frozen(kw_only=True)
class Order:
    """What a call asks for."""

    request: RefundRequest
    journal: Journal
    policy: RetryPolicy
    seconds: float
    """The call's deadline, from the moment when its flight gets a connection slot."""
    earlier: RefundOutcomeUnknown | None = None
    """What an earlier call left unknown."""
    query_first: bool = False


class Flights:
    """The flights of one open session."""

    def __init__(
        self, line: GatewayClient, clock: Clock, slot: Callable[[], AbstractAsyncContextManager[None]]
    ) -> None:
        self._gateway = line
        self._clock = clock
        self._slot = slot
        self._under_way: dict[str, Flight] = {}

    async def carry_out(self, order: Order, traffic: Traffic) -> Refund:
        """Have ``order`` carried out, by a flight that is under way for this refund or by a new one.

        ``traffic`` counts what a new one sends. Raises what :meth:`RefundSession.apply_refund` does, and
        ``RefundConflict`` for other content than the flight's.
        """
        number = order.request.no_refund
        while (flight := self._under_way.get(number)) is not None and flight.is_left:
            await flight.wait()
            self._forget(number, flight)
        if flight is not None:
            flight.check_content(order.request)
            counted = Traffic()
        else:
            flight, counted = Flight(order, self._fly, self._unknown), traffic
            self._under_way[number] = flight
        try:
            return await flight.join(order.seconds)
        finally:
            self._forget(number, flight)  # whoever leaves last: the caller that began it may have left earlier
            counted.attempts, counted.queries = flight.traffic.attempts, flight.traffic.queries

    def _forget(self, number: str, flight: Flight) -> None:
        if flight.has_ended and self._under_way.get(number) is flight:
            del self._under_way[number]

    async def _fly(self, flight: Flight) -> Refund:
        """Send and resolve; or resolve only, what an earlier call left unknown; on record."""
        order, line = flight.order, self._gateway
        async with self._slot():
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
            standing, entry = await recording.claim(body, lease, flight.until.at)
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
                before_resend=partial(order.journal.resend, entry),
                canary=partial(self._canary, order.journal, apply),
                traffic=flight.traffic,
            )
            if earlier is not None:
                _take_over(case, earlier)
            return await recording.keep(entry, partial(resolve, case, line.send, line.retries_left), case.unknown)

    def _unknown(self, flight: Flight) -> RefundOutcomeUnknown:
        """What a caller is told who leaves before the flight has ended."""
        if flight.case is not None:
            return flight.case.unknown()
        now, order = self._clock(), flight.order
        return RefundOutcomeUnknown(
            request=order.request,
            oid_partner=self._gateway.protocol.merchant.oid_partner,
            body=b"",
            attempts=0,
            queries=0,
            moment=now,
            ask_again_at=now.wall + timedelta(seconds=order.policy.not_found_grace),
            last_error="the call ended before the gateway answered",
        )

    def _is_before(self, moment: Moment) -> bool:
        return self._clock().boot < moment.boot

    async def _query_exchange(self, request: RefundRequest, apply: Exchange) -> Exchange:
        # A resolution asks until its deadline, however often that is.
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
                f"the query service does not know refund {entry.no_refund}, which was made ({reply.error}): "
                "its answers about others prove nothing; check the query URL"
            )
        try:
            matching(known, reply.refund)
        except LianLianError as error:
            return error
        return True


def _take_over(case: Case, earlier: RefundOutcomeUnknown) -> None:
    """Let ``case`` know what an earlier call left, which this journal need not know."""
    if case.sent_at is None:
        case.sent_at, case.refused = earlier.moment, earlier.refused
    else:
        case.told_at = earlier.moment
        case.refused = case.refused and earlier.refused


@attrs.define(eq=False)
class _Caller:
    seconds: float
    """What it gives the refund, from the moment when the flight gets its connection slot."""
    scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)
    leaves_at: float = attrs.field(default=math.inf, init=False)
    """Its deadline (event loop's clock)."""


class Flight:
    """One refund under way, in a task of its own."""

    def __init__(
        self,
        order: Order,
        fly: Callable[[Flight], Awaitable[Refund]],
        unknown: Callable[[Flight], RefundOutcomeUnknown],
    ) -> None:
        self.order = order
        self.until = Deadline(math.inf)
        """The deadline of the caller that waits longest."""
        self.traffic = Traffic()
        self.case: Case | None = None
        self._fly = fly
        self._unknown = unknown
        self._callers: list[_Caller] = []
        self._refund: Refund | None = None
        self._error: BaseException | None = None
        self._is_left = False
        self._is_raised = False
        self._task = BackgroundTask(self._run)

    @property
    def has_ended(self) -> bool:
        """Whether no more will come of it."""
        return self._task.has_ended

    @property
    def is_left(self) -> bool:
        """Whether its last caller has left before it ended: it is being taken down."""
        return self._is_left

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._task.join()

    def check_content(self, request: RefundRequest) -> None:
        """Raise ``RefundConflict`` if ``request`` is another refund under the same number."""
        ours, theirs = request.to_dict(), self.order.request.to_dict()
        ours["notify_url"] = theirs["notify_url"] = ""
        if (conflict := request_conflict(request.no_refund, ours, theirs)) is not None:
            raise conflict

    def take_off(self, now: float) -> None:
        """Let the callers' deadlines begin: the flight has its connection slot (event loop's clock)."""
        for caller in self._callers:
            caller.leaves_at = now + caller.seconds
        self._bound(max((caller.leaves_at for caller in self._callers), default=now))

    def _bound(self, until: float) -> None:
        """Let the flight end ``until`` then, and the callers that do not wait so long at their own deadline."""
        self.until.at = until
        for caller in self._callers:
            caller.scope.deadline = caller.leaves_at if caller.leaves_at < until else math.inf

    async def join(self, seconds: float) -> Refund:
        """Wait for the end of the flight, as long as the caller's deadline allows. Raises an error of its own."""
        caller = _Caller(seconds)
        self._callers.append(caller)
        if self.until.at < math.inf:
            caller.leaves_at = anyio.current_time() + seconds
            self._bound(max(self.until.at, caller.leaves_at))
        try:
            with caller.scope:
                await self._task.join()
        finally:
            self._callers.remove(caller)
            if not self._callers:
                self._is_left = not self.has_ended
                await self._task.aclose()
        if self._refund is not None:
            return self._refund
        raise self._own_error()

    def _own_error(self) -> BaseException:
        error = self._error
        if error is None or isinstance(error, anyio.get_cancelled_exc_class()):
            return self._unknown(self)
        if self._is_raised:  # in another task: one exception would grow with each
            error = copy.copy(error)
            error.__cause__ = self._error
        self._is_raised = True
        return error

    async def _run(self) -> None:
        try:
            self._refund = await self._fly(self)
        except BaseException as error:  # noqa: BLE001 - it is raised where the flight is awaited
            self._error = error
