"""``RefundSession``: makes, queries and awaits the refunds of one merchant."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from time import perf_counter
from typing import Any, Final, Self, cast

import anyio
import attrs

from . import errors
from .clock import Clock, SessionClock, system_clock
from .events import CallBegan, CallEnded, Listener, Paused
from .flight import Flights, RefundCall
from .gateway_client import GatewayClient
from .identity import check_request
from .journal import Journal, OpenRefunds
from .lifecycle import Lifecycle
from .logs import Listeners, set_up_from_environment
from .merchant import Merchant
from .middleware import Middleware
from .models import Record, Refund, RefundQuery, RefundRecord, RefundRequest, expect
from .outcome import Outcome, Traffic
from .recording import learn
from .recovery import Resumed, resume
from .resolution import doubt
from .retry import Deadline, RetryPolicy
from .settings import check_integer, check_journal, check_seconds, check_type
from .signature_watch import SignatureWatch
from .transport import AsyncBaseTransport, AsyncClient, HttpBackend, HttpSender, check_http
from .waiters import Waiters

LONGEST_DEADLINE: Final = 86_400.0
"""Seconds: the longest deadline of a call with a journal. Its lease lasts up to twice as long, even after a crash."""

_checked: Final = partial(check_seconds, "deadline", most=math.inf)


class RefundSession:
    """Makes, queries and awaits the refunds of one merchant, on one event loop (asyncio or trio).

    ::

        async with RefundSession(merchant) as session:
            refund = await session.apply_refund(request)

    Args:
        merchant: the merchant's number, keys and endpoints.
        client: an httpx or httpx2 ``AsyncClient`` that allows ``max_connections``; the session does not close it. A
            layer over httpx's own transport that repeats a request that may have arrived gets an error.
        transport: a transport of httpx or httpx2; the session closes it. Excludes ``client`` and ``http_backend``.
        http_backend: ``httpx`` or ``aiohttp``; default: ``LIANLIAN_HTTP_BACKEND``, else ``httpx``. Excludes ``client``.
        retry: the default policy of the calls.
        deadline: seconds for one whole call, with all its attempts, pauses and queries. Waiting for a connection slot
            does not count, so you may start thousands of calls with ``asyncio.gather``.
        max_connections: number of connection slots. Each call that sends holds one; further calls wait in order.
        warm_up: number of connections to open with the session, by one HEAD request each to ``endpoints.apply``. Then
            the first refunds need not wait for TCP and TLS. Unused connections are closed after some seconds.
        middleware: your layers around every attempt, outermost first (see :mod:`lianlian_async.middleware`).
        limiter: any async context manager, entered around every attempt: a semaphore, or
            :class:`lianlian_async.middleware.RateLimit`. Waiting for it does not count against the deadline. But with
            a journal, no refund is sent after a wait of twice the deadline: an unsent one raises ``RefundNotSent``.
        journal: an open :class:`lianlian_async.journal.Journal`; the session does not close it. Every refund is
            recorded before its first byte is sent, so ``apply_refund`` may be repeated after a crash. A journal
            belongs to the merchant and the apply endpoint of the first session that uses it.
        query_first: query every refund that is new in the journal before it is sent. Set it after a journal was lost
            or restored, and wait for ``not_found_grace`` after the last send: the gateway may show a refund late.
        listeners: functions that are called with each event of :mod:`lianlian_async.events`, for metrics and traces.
        clock: reads the wall clock and the boot clock; see :mod:`lianlian_async.clock`.

    Concurrent calls for one ``no_refund`` make one refund, with the ``retry`` of the first call. If a call left the
    refund unknown, the next call queries first. For a refund that was made, a repeated call returns it and sends
    nothing. Without a journal, this holds only within one session, and only for its last 1,000 refunds that were made.

    Closing waits for running calls, up to their deadlines. New calls, and calls that wait for a slot, send nothing and
    raise ``RuntimeError``. So do calls outside ``async with`` or on another event loop, and an ``async with`` while the
    session is open. A closed session may be opened again, also on another event loop.
    """

    def __init__(
        self,
        merchant: Merchant,
        *,
        client: AsyncClient | None = None,
        transport: AsyncBaseTransport | None = None,
        http_backend: HttpBackend | None = None,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        deadline: float = 30.0,
        max_connections: int = 20,
        warm_up: int = 0,
        middleware: Sequence[Middleware] = (),
        limiter: AbstractAsyncContextManager[Any] | None = None,
        journal: Journal | None = None,
        query_first: bool = False,
        listeners: Sequence[Listener] = (),
        clock: Clock = system_clock,
    ) -> None:
        check_http(client, transport, http_backend)
        check_type("merchant", merchant, Merchant)
        check_type("retry", retry, RetryPolicy)
        check_type("middleware", middleware, Sequence)
        for layer in middleware:
            check_type("middleware", layer, Callable)  # type: ignore[arg-type]  # mypy accepts no abstract class
        check_type("limiter", limiter, AbstractAsyncContextManager | None)
        check_journal(journal)
        check_integer("max_connections", max_connections, least=1)
        check_integer("warm_up", warm_up, least=0, most=max_connections, bound="max_connections")
        self.merchant = merchant
        self._retry = retry
        self._deadline = _checked(deadline)
        self.max_connections = max_connections
        self.journal = journal
        self._open_refunds = OpenRefunds()
        self._query_first = query_first
        self.clock = SessionClock(clock)
        set_up_from_environment()
        self.listeners = Listeners(listeners, timer=perf_counter, is_logged=True)
        self._waiters = Waiters()
        self._life = Lifecycle(max_connections)
        self.unknown_reasons: Counter[str] = Counter()
        """Number of unknown outcomes of :meth:`outcome_of`, by reason."""
        urls = merchant.endpoints.apply, merchant.endpoints.query
        self._open_sender = partial(
            HttpSender.open, client, transport, max_connections, backend=http_backend, urls=urls
        )
        self._open_gateway = partial(
            GatewayClient.open,
            merchant,
            budget=retry.budget,
            limiter=limiter,
            middleware=tuple(middleware),
            warm_up=warm_up,
            clock=self.clock,
            listeners=self.listeners,
        )

    def __repr__(self) -> str:
        return f"<RefundSession {self.merchant.oid_partner} {self._life}>"

    @property
    def signatures(self) -> SignatureWatch:
        """Records whether the gateway's answers have valid signatures. If not, batches and workers stop early."""
        self._life.check_open()
        return self._gateway.signatures

    async def __aenter__(self) -> Self:
        with self._life.opening():
            if self.journal is not None and self.journal.is_open:  # else each refund binds it
                await self.journal.bind(self.merchant.oid_partner, self.merchant.endpoints.apply)
            self._gateway = await self._open_gateway(await self._open_sender())
            self._flights = Flights(self._gateway, self.clock, self._slot, self._open_refunds)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        try:
            await self._life.close()
        finally:
            with anyio.CancelScope(shield=True):
                await self._gateway.aclose()

    async def apply_refund(
        self, request: RefundRequest, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Make a refund once and return its outcome (LianLian's *Apply API*).

        Returns the record, whose status (``sta_refund``) may still change. ``deadline`` (seconds) and ``retry``
        override those of the session.

        Raises:
            InvalidRequest: a field breaks the gateway's rules; nothing was sent.
            RefundNotSent: no apply request of this call reached the gateway; it is safe to send the refund again.
            ConfigurationError: a setting, such as a proxy, prevents every send; nothing was sent.
            RefundRejected: the gateway rejected the refund.
            RefundConflict: the number belongs to another refund; a person has to decide.
            RefundOutcomeUnknown: the refund may have been made; see :meth:`resolve`.
            JournalError: the journal failed; ``said`` is the refund's outcome if the refund may have been sent.
        """
        return await self._apply(request, deadline, retry, Traffic())

    async def resolve(
        self, unknown: errors.RefundOutcomeUnknown, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Resolve a refund whose outcome is unknown. Call it at ``unknown.ask_again_at`` or later.

        Queries first. Signs and sends the refund again only if the gateway still has no record after
        ``RetryPolicy.not_found_grace``. Returns and raises as :meth:`apply_refund`.
        """
        expect(unknown, errors.RefundOutcomeUnknown, "unknown")
        return await self._apply(unknown.request, deadline, retry, Traffic(), earlier=unknown)

    async def outcome_of(
        self,
        request: RefundRequest,
        *,
        deadline: float | None = None,
        retry: RetryPolicy | None = None,
        journal: Journal | None = None,
        earlier: errors.RefundOutcomeUnknown | None = None,
        query_first: bool = False,
    ) -> Outcome:
        """Return the result of :meth:`apply_refund` as a value; with ``earlier``, the result of :meth:`resolve`.

        ``journal`` overrides the session's journal. ``query_first`` queries first even if the session does not. A
        ``request`` that is not a ``RefundRequest`` gives an outcome with ``InvalidRequest`` as its error. Of
        ``LianLianError``, this method raises only ``ConfigurationError``: further refunds would probably fail, too.
        """
        began = anyio.current_time()
        traffic = Traffic()
        refund = error = None
        try:
            refund = await self._apply(
                request, deadline, retry, traffic, journal=journal, earlier=earlier, query_first=query_first
            )
        except errors.ConfigurationError:
            raise
        except errors.LianLianError as problem:
            error = problem
            if isinstance(problem, errors.RefundOutcomeUnknown):
                self.unknown_reasons[problem.reason] += 1
        seconds = anyio.current_time() - began
        return Outcome(request=request, refund=refund, error=error, seconds=seconds, **attrs.asdict(traffic))

    async def query_refund(
        self, query: RefundQuery, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> RefundRecord:
        """Query the gateway's record of a refund (LianLian's *Refund Status API*).

        Returns the signed record: a ``Refund`` if its number and amount are known. ``deadline`` (seconds) and ``retry``
        override those of the session.

        Raises:
            RefundNotFound: the gateway has no such record at this moment.
            QueryRejected: the gateway rejected the query, which says nothing about the refund.
            RefundConflict: the record has another ``dt_refund`` than the query.
            SignatureInvalid, AnswerMismatch, MalformedMessage: the last answer cannot be used.
            GatewayUnavailable: the gateway gave no usable answer in time.
            ConfigurationError: a setting, such as a proxy, prevents every query.
        """
        expect(query, RefundQuery, "query")
        seconds, policy = self._given(deadline, retry)
        traffic = Traffic()
        with self._life.in_use():
            call = self._query(query, seconds, policy, traffic)
            return await self._observed("query_refund", query.no_refund, call, traffic)

    async def _query(self, query: RefundQuery, seconds: float, policy: RetryPolicy, traffic: Traffic) -> RefundRecord:
        async with self._slot(query.no_refund):
            until = Deadline(anyio.current_time() + seconds)
            reply = await self._gateway.send(await self._gateway.query_exchange(query, until, policy))
        traffic.queries = reply.attempts
        if reply.refund is not None:
            return reply.refund
        raise errors.misconfigured(reply.error) or cast("errors.LianLianError", reply.error)  # set if refund is None

    async def wait_refund(
        self, refund: Record, *, deadline: float = 3600.0, retry: RetryPolicy | None = None
    ) -> Record:
        """Wait until a refund that was made is final: success or failed.

        The notification ends the wait if a ``NotificationEndpoint`` was created with this session. Until then the
        gateway is queried, first after 2 seconds; each later pause is twice as long, at most 5 minutes. ``deadline`` is
        in seconds: LianLian repeats a notification for an hour. ``retry`` overrides the session's policy for each
        query. The wait holds a connection slot only during a query.

        Raises:
            RefundNotFinal: the refund is not final at the deadline, or when the session was closed during the wait.
            QueryRejected: the gateway rejected the query, which says nothing about the refund.
            InvalidRequest, ConfigurationError: no query can be sent: ``dt_refund`` is unknown, or a setting is wrong.
            RefundConflict: a record differs from ``refund`` or contradicts the session's journal.
            JournalError: the journal failed; ``said`` is the last known ``refund``.
        """
        expect(refund, RefundRecord, "refund")
        self._life.check_open()
        with self._waiters.listen(refund) as waiter:
            seconds, policy = self._given(deadline, retry)
            return await waiter.until_final(refund, partial(self._learn, policy), seconds)

    async def apply_and_wait(
        self, request: RefundRequest, *, deadline: float = 3600.0, retry: RetryPolicy | None = None
    ) -> Refund:
        """Make a refund and wait until it is final: :meth:`apply_refund`, then :meth:`wait_refund`.

        A notification counts even if the answer arrives later, is a rejection, or never arrives. ``deadline`` (seconds)
        limits the wait; the session's deadline limits :meth:`apply_refund`. Raises the errors of both methods.
        """
        seconds, policy = self._given(deadline, retry)
        expect(request, RefundRequest, "request")
        with self._waiters.listen(request) as waiter:
            try:
                refund = await self.apply_refund(request, retry=policy)
            except (errors.RefundNotSent, errors.RefundRejected, errors.RefundOutcomeUnknown) as error:
                made = waiter.notified
                may_have_worked = isinstance(error, errors.RefundOutcomeUnknown) and error.refused is None
                if made is None or doubt(made, may_have_worked=may_have_worked) is not None:
                    raise
                return made
            return await waiter.until_final(refund, partial(self._learn, policy), seconds)

    def notified(self, refund: Refund) -> None:
        """End the calls that wait for ``refund``, which is final. ``NotificationEndpoint`` calls this."""
        self._waiters.notify(refund)

    async def _learn(self, policy: RetryPolicy, query: RefundQuery) -> RefundRecord:
        refund = await self.query_refund(query, retry=policy)
        return refund if self.journal is None else await learn(self.journal, refund, self.clock())

    async def resume(
        self, *, concurrency: int | None = None, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Resumed:
        """Resolve every refund of the journal that may have been sent; query accepted ones for their final state.

        Call it when the service starts, and then regularly; or call ``NotificationEndpoint.sweep``, which includes it.
        ``concurrency`` is half of ``max_connections`` by default, so that other calls still get a connection.
        ``deadline`` (seconds for each refund) and ``retry`` override those of the session. Raises ``JournalError``, and
        ``ConfigurationError`` without a journal, for a wrong argument, or if a setting prevents every send.
        """
        if self.journal is None:
            raise errors.ConfigurationError("resume: this session has no journal")
        self._life.check_open()  # even if no refund is open: find a forgotten `async with` at once
        half = (self.max_connections + 1) // 2
        workers = half if concurrency is None else check_integer("concurrency", concurrency, least=1)
        seconds, policy = self._given(deadline, retry)
        resolve = partial(self.outcome_of, deadline=seconds, retry=policy)
        query = partial(self.query_refund, deadline=seconds, retry=policy)
        return await resume(self.journal, resolve=resolve, query=query, workers=workers, clock=self.clock)

    async def _apply(
        self,
        request: RefundRequest,
        deadline: float | None,
        retry: RetryPolicy | None,
        traffic: Traffic,
        *,
        journal: Journal | None = None,
        earlier: errors.RefundOutcomeUnknown | None = None,
        query_first: bool = False,
    ) -> Refund:
        expect(request, RefundRequest, "request")
        if earlier is not None:
            expect(earlier, errors.RefundOutcomeUnknown, "earlier")
            # Without this check, the body of another refund would be sent, although nobody has queried that refund.
            check_request(request.no_refund, request.to_dict(), earlier.request.to_dict())
            theirs = f"{earlier.oid_partner} at {earlier.apply_url}"
            ours = f"{self.merchant.oid_partner} at {self.merchant.endpoints.apply}"
            if theirs != ours:
                raise errors.ConfigurationError(
                    f"refund {earlier.no_refund} belongs to merchant {theirs}, this session to {ours}: resolve it in a "
                    "session of the same merchant and endpoint"
                )
        check_journal(journal)
        journal = self.journal if journal is None else journal  # not `or`: a journal with a length may be false
        seconds, policy = self._given(deadline, retry)
        if journal is not None and seconds > LONGEST_DEADLINE:
            raise errors.ConfigurationError(f"deadline: must be at most {LONGEST_DEADLINE:g} seconds with a journal")
        call = RefundCall(
            request=request,
            journal=self._open_refunds if journal is None else journal,
            policy=policy,
            seconds=seconds,
            traffic=traffic,
            earlier=earlier,
            query_first=query_first or self._query_first,
        )
        name = "apply_refund" if earlier is None else "resolve"
        try:
            with self._life.in_use():
                return await self._observed(name, request.no_refund, self._flights.join(call), traffic)
        except errors.RefundNotSent as error:
            raise errors.misconfigured(error) or error from error.__cause__

    def _slot(self, number: str | None) -> AbstractAsyncContextManager[None]:
        """Return a context manager that holds a connection slot, and reports the wait for it to the listeners."""
        return self._life.slot(partial(self.listeners.span, Paused, no_refund=number, cause="slot", seconds=None))

    async def _observed(self, name: str, number: str | None, call: Awaitable[Record], traffic: Traffic) -> Record:
        """Await ``call`` and report its beginning and its end to the listeners."""
        listeners, began = self.listeners, self.listeners.timer()

        def tell(outcome: str, result: RefundRecord | BaseException, error: str | None = None) -> None:
            fields = {field: getattr(result, field, None) for field in ("ret_code", "sta_refund", "reason")}
            seconds = listeners.timer() - began
            fields |= {"no_refund": number, "call": name, "seconds": seconds, **attrs.asdict(traffic)}
            listeners.tell(CallEnded, outcome=outcome, error=error, **fields)

        with listeners.span(CallBegan, no_refund=number, call=name):
            try:
                refund = await call
            except BaseException as error:
                tell(type(error).__name__ if isinstance(error, Exception) else "cancelled", error, str(error) or None)
                raise
            if listeners.want(logging.INFO):
                tell("found" if name == "query_refund" else "made", refund)
            return refund

    def _given(self, deadline: float | None, retry: RetryPolicy | None) -> tuple[float, RetryPolicy]:
        """Return a call's deadline in seconds and its policy: the arguments, or else those of the session."""
        if retry is not None:
            check_type("retry", retry, RetryPolicy)
        return self._deadline if deadline is None else _checked(deadline), self._retry if retry is None else retry
