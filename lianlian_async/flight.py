"""Flights: concurrent calls of one session for the same refund and journal share one flight, which makes the refund.

A flight belongs to no single caller. A caller leaves the flight when it is cancelled, or at its deadline if another
caller's deadline is later; the other callers keep waiting. When the last caller leaves, the flight is cancelled.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime, timedelta
from functools import partial
from typing import Final

import anyio
import attrs

from . import wire
from .background import BackgroundTask
from .clock import Clock, Moment
from .errors import LianLianError, QueryRejected, RefundOutcomeUnknown, RefundRejected
from .exchange import Call, Exchange
from .gateway_client import GatewayClient
from .identity import check_request
from .journal import Entry, Intent, Journal, OpenRefunds, Standing
from .logs import NOBODY
from .models import Refund, RefundRequest
from .outcome import Traffic
from .recording import keep, recorded, recorded_refund, refusal, take
from .resolution import Case, WrongQueryService, matching, resolve
from .retry import Deadline, RetryPolicy

logger = logging.getLogger("lianlian_async")

LONGEST_LEASE: Final = 2 * 86_400.0
"""Seconds. A call without a journal may have an infinite deadline, but its lease must end."""

_READ_AGAIN: Final = 0.1
"""Seconds. For this time after its write to the journal, a call sends without reading the journal again."""

_CANARY_DAYS: Final = 80
"""Maximum age of the canary. The gateway rejects queries after 3 months (3005)."""


@attrs.frozen(kw_only=True)
class RefundCall:
    """The arguments of one call."""

    request: RefundRequest
    journal: Journal
    policy: RetryPolicy
    seconds: float
    """The call's time limit. The flight's waits for its connection slot and for the limiter do not count."""
    traffic: Traffic
    """Counts the requests of the flight that this call starts."""
    earlier: RefundOutcomeUnknown | None = None
    """The unknown outcome of an earlier call."""
    query_first: bool = False


@attrs.define(eq=False)
class Flights:
    """The flights of one open session."""

    _gateway: GatewayClient
    _clock: Clock
    _slot: Callable[[str], AbstractAsyncContextManager[None]]
    _open_refunds: OpenRefunds
    _flights: dict[str, Flight] = attrs.field(factory=dict, init=False)

    async def join(self, call: RefundCall) -> Refund:
        """Return the refund of the call's flight; start one if there is none."""
        number, leaves_at = call.request.no_refund, anyio.current_time() + call.seconds
        while (flight := self._flights.get(number)) is not None and (
            not flight.until.leaves_at  # the last caller has left, and so cancelled it
            or flight.call.journal is not call.journal  # it records nothing in this call's journal
        ):
            with anyio.CancelScope(deadline=leaves_at) as wait:
                await flight.task.join()
            if wait.cancelled_caught:
                flight.check_content(call.request)
                raise self._unknown(flight)
            self._forget(number, flight)
        now = anyio.current_time()
        if flight is not None:
            flight.check_content(call.request)
            scope = flight.until.add(leaves_at - now, now)
        else:
            # Added before the task starts, because an eager task runs at once (Python 3.12).
            until = _SharedDeadline(now)
            scope = until.add(leaves_at - now, now)
            flight = self._flights[number] = Flight(call, until, self._carry_out, self._unknown)
        try:
            return await flight.join(scope)
        finally:
            self._forget(number, flight)  # every caller does it: the first one may leave before the flight ends

    def _forget(self, number: str, flight: Flight) -> None:
        if flight.task.has_ended and self._flights.get(number) is flight:
            del self._flights[number]

    async def _carry_out(self, flight: Flight) -> Refund:
        """Make a refund, or resolve the unknown outcome of an earlier call, and record the outcome."""
        call, gateway, protocol = flight.call, self._gateway, self._gateway.protocol
        journal, earlier, number = call.journal, call.earlier, call.request.no_refund
        async with self._slot(number):
            flight.until.resume(anyio.current_time())
            await journal.bind(protocol.merchant.oid_partner, protocol.merchant.endpoints.apply)
            body = b"" if earlier is None else earlier.body
            fields = protocol.signed_fields(body) if body else protocol.apply_fields(call.request)
            if (refund := await recorded(journal, call.request)) is not None:
                return refund
            has_journal = journal is not self._open_refunds
            intent = Intent(
                no_refund=number,
                fields=call.request.to_dict(),
                body=body or await gateway.seal(fields),
                lease=min(2 * flight.until.left(anyio.current_time()), LONGEST_LEASE),
                grace=call.policy.not_found_grace,
            )
            listeners = gateway.listeners if has_journal else NOBODY
            standing, entry = await take(journal, intent, self._clock, flight.until.at, listeners)
            if standing is Standing.FINISHED:
                return recorded_refund(entry)
            if standing is Standing.LEASED:
                now = self._clock()
                until = entry.leased_until or now
                problem = "another call or worker holds the lease on this refund"
                raise self._not_begun(call, until, max(0.0, until.boot - now.boot), problem, entry.body)
            case = flight.case = self._open_case(flight, fields, standing, entry)
            if earlier is not None:
                case.take_over(earlier.moment, earlier.refused)
            if has_journal and (open_refund := await self._open_refunds.find(number)) is not None:
                case.take_over(open_refund.sent_at, _refused(open_refund))  # an earlier call used no journal
            return await keep(journal, entry, case, partial(resolve, case, gateway.send))

    def _open_case(self, flight: Flight, fields: Mapping[str, str], standing: Standing, entry: Entry) -> Case:
        """Return the case of a leased refund, with what its ``entry`` says about earlier calls."""
        call, has_lease = flight.call, partial(self._is_before, flight.last_send)
        if entry.leased_until is not None and call.journal is not self._open_refunds:
            flight.reads_at.at = anyio.current_time() + _READ_AGAIN
            flight.last_send.at = min(flight.last_send.at, entry.leased_until.boot)
        is_open = partial(self._is_open, call, flight.reads_at)
        apply = self._gateway.exchange(Call.APPLY, fields, entry.body, flight.until, call.policy)
        return Case(
            request=call.request,
            apply=attrs.evolve(apply, lease_holds=has_lease, is_open=is_open),
            make_query=partial(self._query_exchange, call, flight.until),
            clock=self._clock,
            sent_at=entry.sent_at,
            refused=_refused(entry),
            query_first=standing is Standing.QUERY_FIRST or call.query_first,
            before_resend=partial(self._before_resend, call.journal, entry, flight.reads_at),
            canary=partial(self._canary, call, flight.until),
            traffic=call.traffic,
            history=entry.history,
        )

    async def _before_resend(self, journal: Journal, entry: Entry, reads_at: Deadline, history: str) -> bytes:
        """Record that the request may be sent again; return its body, signed again: the key may have changed since."""
        body = await self._gateway.seal(self._gateway.protocol.signed_fields(entry.body))
        await journal.resend(attrs.evolve(entry, body=body), history)
        reads_at.at = anyio.current_time() + _READ_AGAIN
        return body

    async def _is_open(self, call: RefundCall, reads_at: Deadline) -> bool:
        """Return whether the journal has no outcome of the refund: during a wait, a notification may have arrived."""
        if anyio.current_time() < reads_at.at:
            return True
        entry = await call.journal.find(call.request.no_refund)
        return entry is None or entry.ending is None

    def _unknown(self, flight: Flight) -> RefundOutcomeUnknown:
        """Return a leaving caller's unknown outcome. The flight may go on, and send until its own deadline."""
        now, left = self._clock(), 0.0
        if not flight.task.has_ended:  # another process may rely on this moment, so nothing is sent after it
            left = min(max(0.0, flight.until.left(anyio.current_time())), LONGEST_LEASE)
            flight.last_send.at = min(flight.last_send.at, now.boot + left)
        if flight.case is not None:
            return flight.case.unknown(left)
        wait, problem = left + flight.call.policy.not_found_grace, "the call ended before the gateway answered"
        return self._not_begun(flight.call, now.after(left), wait, problem)

    def _not_begun(
        self, call: RefundCall, moment: Moment, wait: float, problem: str, body: bytes = b""
    ) -> RefundOutcomeUnknown:
        """Return the unknown outcome of a flight without a case: it did not get the refund's lease."""
        merchant = self._gateway.protocol.merchant
        return RefundOutcomeUnknown(
            request=call.request,
            oid_partner=merchant.oid_partner,
            apply_url=merchant.endpoints.apply,
            body=body,
            moment=moment,
            ask_again_at=self._clock().wall + timedelta(seconds=wait),
            last_error=problem,
        )

    def _is_before(self, end: Deadline) -> bool:
        return self._clock().boot < end.at

    async def _query_exchange(self, call: RefundCall, until: Deadline) -> Exchange:
        policy = attrs.evolve(call.policy, attempts=1_000_000)  # limited by the deadline and the budget
        return await self._gateway.query_exchange(call.request.query(), until, policy)

    async def _canary(self, call: RefundCall, until: Deadline) -> bool:
        """Query a refund that was made; for the result see :attr:`Case.canary`."""
        entry = choose_canary(await call.journal.canaries(), self._clock().wall, call.policy.not_found_grace)
        if entry is None:
            return False
        known = RefundRequest.from_record(entry.fields)
        reply = await self._gateway.send(await self._gateway.query_exchange(known.query(), until, call.policy))
        if isinstance(reply.error, QueryRejected) and reply.error.ret_code == "3005":
            return False
        wrong = reply.error
        if reply.refund is not None:
            try:
                matching(known, reply.refund)
            except LianLianError as error:
                wrong = error
        if wrong is not None:
            raise WrongQueryService(
                "the query service proves nothing, check the query URL: "  # the reason ends here: it names no refund
                f"it did not return refund {entry.no_refund}, which was made ({wrong})"
            )
        return True


def choose_canary(canaries: Sequence[Entry], now: datetime, grace: float) -> Entry | None:
    """Return the canary: the refund to query in order to check the query service, or None if none is suitable.

    It is the newest of ``canaries`` (see :meth:`.journal.Journal.canaries`) that was sent at least ``grace`` seconds
    ago, because LianLian may show newer ones late. If all are newer, it is the oldest one.
    """
    first = wire.format_timestamp(now - timedelta(days=_CANARY_DAYS))
    usable = [entry for entry in canaries if entry.fields["dt_refund"] >= first]
    until = now - timedelta(seconds=grace)
    shown = (entry for entry in usable if entry.sent_at is not None and entry.sent_at.wall <= until)
    return next(shown, usable[-1] if usable else None)


def _refused(entry: Entry) -> RefundRejected | None:
    return None if entry.refused is None else refusal(entry.no_refund, entry.refused)


class _SharedDeadline(Deadline):
    """The latest deadline of a flight's callers. A caller with an earlier deadline leaves at its own."""

    def __init__(self, now: float) -> None:
        super().__init__(now)
        self.paused_at = now  # until the flight gets its connection slot
        self.leaves_at = dict[anyio.CancelScope, float]()
        """By the scope in which a caller waits: its deadline."""

    def add(self, seconds: float, now: float) -> anyio.CancelScope:
        """Add a caller whose time limit is ``seconds``. Return its scope, in which it must then wait."""
        scope = anyio.CancelScope()
        self.leaves_at[scope] = min(now, self.paused_at) + seconds
        self.at = max(self.at, self.leaves_at[scope])
        self._set_scopes()
        return scope

    def pause(self, now: float) -> None:
        super().pause(now)
        self._set_scopes()

    def resume(self, now: float) -> None:
        for scope in self.leaves_at:
            self.leaves_at[scope] += max(0.0, now - self.paused_at)
        super().resume(now)
        self._set_scopes()

    def _set_scopes(self) -> None:
        """Set when callers leave: never during a pause; callers with the latest deadline only when the flight ends."""
        for scope, leaves_at in self.leaves_at.items():
            leaves = self.paused_at == math.inf and leaves_at < self.at
            scope.deadline = leaves_at if leaves else math.inf


@attrs.define(eq=False)
class Flight:
    """A background task that makes one refund."""

    call: RefundCall
    until: _SharedDeadline
    _carry_out: Callable[[Flight], Awaitable[Refund]]
    _unknown: Callable[[Flight], RefundOutcomeUnknown]
    last_send: Deadline = attrs.field(factory=lambda: Deadline(math.inf), init=False)
    """On the boot clock: the end of the lease, or an earlier time, told to a leaving caller. Later, nothing is sent."""
    reads_at: Deadline = attrs.field(factory=lambda: Deadline(math.inf), init=False)
    """From this time on, the journal is read again before each send. On the event loop's clock."""
    case: Case | None = attrs.field(default=None, init=False)
    _refund: Refund | None = attrs.field(default=None, init=False)
    _error: BaseException | None = attrs.field(default=None, init=False)
    _is_raised: bool = attrs.field(default=False, init=False)
    task: BackgroundTask = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.task = BackgroundTask(self._run)

    def check_content(self, request: RefundRequest) -> None:
        """Raise ``RefundConflict`` if ``request`` differs from this flight's request in more than ``notify_url``."""
        check_request(request.no_refund, request.to_dict(), self.call.request.to_dict())

    async def join(self, scope: anyio.CancelScope) -> Refund:
        """Wait until the flight ends, or until the caller's deadline. Each caller gets an exception of its own."""
        try:
            with scope:
                await self.task.join()
        except anyio.get_cancelled_exc_class():
            if self.case is not None:
                number = self.call.request.no_refund
                logger.warning("refund %s: cancelled, but it may have been made; query before sending it again", number)
            raise
        finally:
            del self.until.leaves_at[scope]
            if not self.until.leaves_at:
                await self.task.aclose()
        if self._refund is not None:
            return self._refund
        raise self._own_error()

    def _own_error(self) -> BaseException:
        error = self._error
        if error is None or isinstance(error, anyio.get_cancelled_exc_class()):
            return self._unknown(self)
        # Already raised by another caller: with each raise, the traceback of a shared exception would grow. The copy of
        # another library's exception may fail.
        if self._is_raised and isinstance(error, LianLianError):
            cause = error.__cause__ or error
            error = copy.copy(error)
            error.__cause__ = cause
        self._is_raised = True
        return error

    async def _run(self) -> None:
        try:
            self._refund = await self._carry_out(self)
        except BaseException as error:  # noqa: BLE001 - raised in the callers
            self._error = error
