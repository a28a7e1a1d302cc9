"""The session: one shared client, one signing thread, and the coroutines ``apply_refund`` and ``query_refund``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, Self, cast

import anyio
import anyio.lowlevel
import anyio.to_thread

from .clock import Clock, SessionClock, system_clock
from .errors import ConfigurationError, GatewayUnavailable, LianLianError, RefundOutcomeUnknown
from .exchange import Call, Reply
from .flight import Flights, Order
from .gateway_client import GatewayClient
from .journal import Journal, OpenRefunds
from .lifecycle import Lifecycle
from .merchant import Merchant
from .middleware import Middleware
from .models import Refund, RefundQuery, RefundRequest, expect
from .outcome import Outcome, Traffic
from .recording import learn
from .recovery import Resumed, resume
from .retry import Deadline, RetryPolicy
from .settings import check_integer, check_journal, check_type, positive_seconds
from .signature_watch import SignatureWatch
from .transport import AsyncBaseTransport, AsyncClient, HttpBackend, HttpSender, check_http
from .waiters import Waiters

__all__ = ["RefundSession"]


LONGEST_DEADLINE: Final = 86_400.0
"""Seconds that one call may take with a journal, which keeps its lease for twice as long."""


class RefundSession:
    """A merchant's connection to the refund gateway, for one event loop (asyncio or trio).

    ::

        async with RefundSession(merchant) as session:
            refund = await session.apply_refund(request)

    Args:
        merchant: who we are.
        client: an ``httpx.AsyncClient`` to use and not to close; it must allow ``max_connections``.
        transport: an httpx transport for the session's own client; not together with ``client``.
        http_backend: what the session's own client sends with, ``httpx`` or ``aiohttp``; by default what
            ``LIANLIAN_HTTP_BACKEND`` says, or else ``httpx``.
        retry: the default policy of every call.
        deadline: seconds for one whole call once it has its connection slot: signing, every attempt, every
            pause, every query. Waiting for the slot does not count, so ``asyncio.gather`` over thousands
            of calls simply works.
        max_connections: calls that run at the same time; more wait in order, and cheaply.
        warm_up: connections to open with the session, so that the first refunds need not wait for TCP and TLS: by one
            HEAD request each to ``endpoints.apply``. Those that nobody uses are closed after some seconds.
        middleware: the caller's own layers around every attempt, first one outermost
            (see :mod:`lianlian_async.middleware`).
        limiter: any async context manager, held around every attempt: a semaphore, or
            :class:`lianlian_async.middleware.RateLimit`. Waiting for it does not count against the deadline.
        journal: an open :class:`lianlian_async.journal.Journal`, not closed by the session. ``apply_refund`` is
            then re-entrant: every refund is on record before its first byte is sent. It belongs to this merchant and
            this apply endpoint from then on.
        query_first: query before a refund is sent that is new here: after a journal was lost or restored.
        clock: reads the wall clock and the boot clock; see :mod:`lianlian_async.clock`.

    Calls for one ``no_refund`` at the same time share one refund, and so do calls one after the other, as long as the
    first one left it unknown: the second one asks first. Without a journal that ends with the session.

    Closing waits for the calls that are running, which their deadlines bound; new ones, and those that still wait
    for a slot, are refused: nothing of theirs was sent.
    A session used before, after, twice, or from another event loop raises ``RuntimeError``.
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
        clock: Clock = system_clock,
    ) -> None:
        check_http(client, transport, http_backend)
        check_type("merchant", merchant, Merchant)
        check_type("retry", retry, RetryPolicy)
        check_journal(journal)
        check_integer("max_connections", max_connections, least=1)
        check_integer("warm_up", warm_up, least=0, most=max_connections, bound="max_connections")
        self.merchant = merchant
        self._client = client
        self._transport = transport
        self._http_backend = http_backend
        self._retry = retry
        self._deadline = _checked(deadline)
        self._max_connections = max_connections
        self._warm_up = warm_up
        self._middleware = tuple(middleware)
        self._limiter = limiter
        self._journal = journal
        self._open_refunds = OpenRefunds()
        self._query_first = query_first
        self._clock = SessionClock(clock)
        self._waiting = Waiters()
        self._life = Lifecycle("RefundSession", max_connections)
        self.unknown_reasons: Counter[str] = Counter()
        """How often :meth:`outcome_of` left a refund unknown, by reason: for summaries."""

    def __repr__(self) -> str:
        return f"<RefundSession {self.merchant.oid_partner} {self._life}>"

    @property
    def max_connections(self) -> int:
        """How many calls run at the same time."""
        return self._max_connections

    @property
    def journal(self) -> Journal | None:
        """The session's journal."""
        return self._journal

    @property
    def clock(self) -> Clock:
        """The session's clock."""
        return self._clock

    @property
    def signatures(self) -> SignatureWatch:
        """Whether the gateway's answers verify, for batches and workers: they stop early if not."""
        return self._gateway.signatures

    # ── opening and closing ──────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        with self._life.opening():
            if self._journal is not None and self._journal.is_open:  # else at the first refund
                await self._journal.bind(self.merchant.oid_partner, self.merchant.endpoints.apply)
            self._gateway = await GatewayClient.open(
                self.merchant,
                await HttpSender.open(
                    self._client,
                    self._transport,
                    self._max_connections,
                    backend=self._http_backend,
                    urls=(self.merchant.endpoints.apply, self.merchant.endpoints.query),
                ),
                budget=self._retry.budget,
                limiter=self._limiter,
                middleware=self._middleware,
                warm_up=self._warm_up,
                clock=self._clock,
            )
            self._flights = Flights(self._gateway, self._clock, self._life.slot)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._life.close()
        finally:
            with anyio.CancelScope(shield=True):
                await self._gateway.aclose()

    # ── the calls ────────────────────────────────────────────────────────────────────────────────

    async def apply_refund(
        self, request: RefundRequest, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Have a refund made, once, and say what became of it (LianLian's *Apply API*).

        Returns the gateway's signed record of this refund, which need not be final: look at ``sta_refund``.
        ``deadline`` (seconds) and ``retry`` override the session's.

        Raises:
            InvalidRequest: a field breaks the gateway's rules; nothing was sent.
            RefundNotSent: certainly never reached the gateway; safe to send again.
            RefundRejected: the gateway said no, for good.
            RefundConflict: the number stands for another refund; a person has to decide.
            RefundOutcomeUnknown: it may have been made; see :meth:`resolve`.
            JournalError: the journal failed; its ``said`` tells what became of the refund if it was sent.
        """
        return await self._apply(request, deadline=deadline, retry=retry)

    async def resolve(
        self, unknown: RefundOutcomeUnknown, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Find out what became of a refund that was left unknown, best at its ``ask_again_at``.

        Asks first. The same bytes are sent again only when the gateway's "no such record" may be believed
        (``RetryPolicy.not_found_grace``). Returns and raises what :meth:`apply_refund` does.
        """
        expect(unknown, RefundOutcomeUnknown, "unknown")
        return await self._apply(unknown.request, deadline=deadline, retry=retry, earlier=unknown)

    async def outcome_of(
        self,
        request: RefundRequest,
        *,
        deadline: float | None = None,
        retry: RetryPolicy | None = None,
        journal: Journal | None = None,
        earlier: RefundOutcomeUnknown | None = None,
        query_first: bool = False,
    ) -> Outcome:
        """What :meth:`apply_refund` returns or raises about a refund, as a value, with what it took.

        With ``earlier``, what :meth:`resolve` does. ``journal`` and ``query_first`` override the session's. The
        outcome of what is no ``RefundRequest`` has ``InvalidRequest`` as its error, and as its request what was given.
        """
        began = anyio.current_time()
        traffic = Traffic()
        refund: Refund | None = None
        error: LianLianError | None = None
        try:
            refund = await self._apply(
                request,
                deadline=deadline,
                retry=retry,
                journal=journal,
                earlier=earlier,
                query_first=query_first,
                traffic=traffic,
            )
        except ConfigurationError:  # it would meet every refund
            raise
        except LianLianError as problem:
            error = problem
            if isinstance(problem, RefundOutcomeUnknown):
                self.unknown_reasons[problem.reason] += 1
        return Outcome(
            request=request,
            refund=refund,
            error=error,
            attempts=traffic.attempts,
            queries=traffic.queries,
            seconds=anyio.current_time() - began,
        )

    async def query_refund(
        self, query: RefundQuery, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Ask for the gateway's record of a refund (LianLian's *Refund Status API*).

        Returns the signed record. ``deadline`` (seconds) and ``retry`` override the session's.

        Raises:
            RefundNotFound: the gateway has no such record at this moment.
            QueryRejected: the query was refused, which says nothing about the refund.
            SignatureInvalid, AnswerMismatch, MalformedMessage: the last answer was not usable.
            GatewayUnavailable: no usable answer in time.
        """
        expect(query, RefundQuery, "query")
        seconds, policy = self._given(deadline, retry)
        with self._life.in_use():
            async with self._life.slot():
                until = Deadline(anyio.current_time() + seconds)
                fields = self._gateway.protocol.query_fields(query)
                exchange = self._gateway.exchange(Call.QUERY, fields, await self._gateway.seal(fields), until, policy)
                reply = await self._gateway.send(exchange)
        if reply.refund is not None:
            return reply.refund
        raise _raised(reply)

    async def wait_refund(self, refund: Refund, *, deadline: float = 3600.0) -> Refund:
        """Wait until a refund that was made is final: success or failed.

        Its notification tells, where a ``NotificationEndpoint`` was given this session; until then the gateway is
        asked, first after 2 seconds, then after pauses that double up to 5 minutes. ``deadline`` is in seconds;
        LianLian notifies for an hour. It may take that long: no connection slot is held meanwhile.

        Raises:
            RefundNotFinal: not final at the deadline.
            QueryRejected: the query was refused, which says nothing about the refund.
            RefundConflict: the final state contradicts the session's journal.
        """
        expect(refund, Refund, "refund")
        with self._waiting.listen(refund) as waiter:
            return await waiter.until_final(refund, self._learn, _checked(deadline))

    async def apply_and_wait(
        self, request: RefundRequest, *, deadline: float = 3600.0, retry: RetryPolicy | None = None
    ) -> Refund:
        """Have a refund made, and wait until it is final: :meth:`apply_refund`, then :meth:`wait_refund`.

        A notification that comes before the answer counts, also in place of an answer that never comes.
        ``deadline`` (seconds) bounds the wait; until the refund is made, the session's own deadline does.
        Raises what these two raise.
        """
        seconds = _checked(deadline)
        expect(request, RefundRequest, "request")
        with self._waiting.listen(request) as waiter:
            try:
                refund = await self.apply_refund(request, retry=retry)
            except RefundOutcomeUnknown:
                if waiter.told is None:
                    raise
                return waiter.told
            return await waiter.until_final(refund, self._learn, seconds)

    def notified(self, refund: Refund) -> None:
        """Tell who waits in this session that a refund is final. A ``NotificationEndpoint`` does it."""
        self._waiting.tell(refund)

    async def _learn(self, query: RefundQuery) -> Refund:
        refund = await self.query_refund(query)
        return refund if self._journal is None else await learn(self._journal, refund)

    async def resume(self, *, concurrency: int | None = None) -> Resumed:
        """Find out about every refund that the session's journal holds as open; how many are known now.

        Unsettled ones are asked about first, as :meth:`apply_refund` does; accepted ones are queried for their final
        state. Run it when the service starts, and now and then; or ``NotificationEndpoint.sweep``, which calls it.
        ``concurrency`` is ``max_connections`` by default. Raises ``JournalError``.
        """
        if self._journal is None:
            raise ConfigurationError("resume: this session has no journal")
        workers = self._max_connections if concurrency is None else concurrency
        return await resume(self._journal, resolve=self.outcome_of, query=self.query_refund, workers=workers)

    # ── one refund ───────────────────────────────────────────────────────────────────────────────

    async def _apply(
        self,
        request: RefundRequest,
        *,
        deadline: float | None,
        retry: RetryPolicy | None,
        journal: Journal | None = None,
        earlier: RefundOutcomeUnknown | None = None,
        query_first: bool = False,
        traffic: Traffic | None = None,
    ) -> Refund:
        """Send and resolve; or resolve only, what an ``earlier`` call left unknown."""
        expect(request, RefundRequest, "request")
        if earlier is not None:
            expect(earlier, RefundOutcomeUnknown, "earlier")
        if earlier is not None and earlier.oid_partner != self.merchant.oid_partner:
            raise ConfigurationError(
                f"refund {earlier.no_refund} belongs to merchant {earlier.oid_partner}, "
                f"this session to {self.merchant.oid_partner}"
            )
        journal = journal or self._journal
        seconds, policy = self._given(deadline, retry)
        if journal is not None and seconds > LONGEST_DEADLINE:
            raise ConfigurationError(f"deadline: must be at most {LONGEST_DEADLINE:g} seconds with a journal")
        order = Order(
            request=request,
            journal=journal or self._open_refunds,
            policy=policy,
            seconds=seconds,
            earlier=earlier,
            query_first=query_first or self._query_first,
        )
        with self._life.in_use():
            return await self._flights.carry_out(order, traffic or Traffic())

    def _given(self, deadline: float | None, retry: RetryPolicy | None) -> tuple[float, RetryPolicy]:
        """A call's deadline in seconds, and its policy."""
        if retry is not None:
            check_type("retry", retry, RetryPolicy)
        return self._deadline if deadline is None else _checked(deadline), self._retry if retry is None else retry


def _checked(deadline: float) -> float:
    return positive_seconds("deadline", deadline)


def _raised(reply: Reply) -> LianLianError:
    """The error in which a query ends."""
    if isinstance(reply.error, GatewayUnavailable):
        reply.error.attempts = reply.attempts
    return cast("LianLianError", reply.error)  # a reply without a refund has one
