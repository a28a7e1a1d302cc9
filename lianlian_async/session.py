"""The session: one shared client, one signing thread, and the coroutines ``apply_refund`` and ``query_refund``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Self, cast

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs

from .errors import ConfigurationError, GatewayUnavailable, LianLianError, RefundOutcomeUnknown
from .exchange import Call, Exchange, Reply
from .journal import Journal, Standing
from .line import Line
from .merchant import Merchant
from .middleware import Middleware
from .models import Refund, RefundQuery, RefundRequest
from .outcome import Outcome, Tally
from .recording import Recording, Resumed, answer, learn, resume
from .retry import Deadline, RetryPolicy
from .settlement import Case, settle
from .transport import AsyncBaseTransport, AsyncClient, Transport
from .waiting import Waiting

__all__ = ["RefundSession"]


_utc_now = partial(datetime.now, UTC)


class _State(Enum):
    NEW = "not open: use it in `async with`"
    OPENING = "still opening"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


class RefundSession:
    """A merchant's connection to the refund gateway, for one event loop (asyncio or trio).

    ::

        async with RefundSession(merchant) as session:
            refund = await session.apply_refund(request)

    Args:
        merchant: who we are.
        client: an ``httpx.AsyncClient`` to use and not to close; it must allow ``max_connections``.
        transport: an httpx transport for the session's own client; not together with ``client``.
        retry: the default policy of every call.
        deadline: seconds for one whole call once it has its connection slot: signing, every attempt, every
            pause, every question. Waiting for the slot does not count, so ``asyncio.gather`` over thousands
            of calls simply works.
        max_connections: calls that run at the same time; more wait in order, and cheaply.
        warm_up: connections to open with the session, so that the first refunds need not wait for TCP and TLS: by one
            HEAD request each to ``endpoints.apply``. Those that nobody uses are closed after some seconds.
        middleware: the caller's own layers around every attempt, first one outermost
            (see :mod:`lianlian_async.middleware`).
        limiter: any async context manager, held around every attempt: a semaphore, or
            :class:`lianlian_async.middleware.RateLimit`. Waiting for it does not count against the deadline.
        journal: an open :class:`lianlian_async.journal.Journal`, not closed by the session. ``apply_refund`` is
            then re-entrant: every refund is on record before its first byte is sent.
        now: the wall clock (aware datetimes), for the moments that errors name.

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
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        deadline: float = 30.0,
        max_connections: int = 20,
        warm_up: int = 0,
        middleware: Sequence[Middleware] = (),
        limiter: AbstractAsyncContextManager[Any] | None = None,
        journal: Journal | None = None,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        if client is not None and transport is not None:
            raise ConfigurationError("client and transport: give one of them, a client has its transport already")
        if not isinstance(max_connections, int) or max_connections < 1:
            raise ConfigurationError(f"max_connections: must be an integer of at least 1, is {max_connections!r}")
        if not isinstance(warm_up, int) or not 0 <= warm_up <= max_connections:
            raise ConfigurationError(f"warm_up: must be an integer from 0 to max_connections, is {warm_up!r}")
        self.merchant = merchant
        self._client = client
        self._transport = transport
        self._retry = retry
        self._deadline = _checked(deadline)
        self._max_connections = max_connections
        self._warm_up = warm_up
        self._middleware = tuple(middleware)
        self._limiter = limiter
        self._journal = journal
        self._now = now
        self._waiting = Waiting()
        self._state = _State.NEW
        self._running = 0
        self._idle = anyio.Event()

    def __repr__(self) -> str:
        return f"<RefundSession {self.merchant.oid_partner} {self._state.name.lower()}>"

    @property
    def max_connections(self) -> int:
        """How many calls run at the same time."""
        return self._max_connections

    def now(self) -> datetime:
        """The session's wall clock."""
        return self._now()

    # ── opening and closing ──────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        if self._state is not _State.NEW:
            raise RuntimeError(
                f"this RefundSession is {self._state.value} already: make a new one for each `async with`"
            )
        self._state = _State.OPENING
        try:
            self._event_loop = anyio.lowlevel.current_token()
            self._slots = anyio.Semaphore(self._max_connections, fast_acquire=True)
            self._line = await Line.open(
                self.merchant,
                await Transport.open(self._client, self._transport, self._max_connections),
                budget=self._retry.budget,
                limiter=self._limiter,
                middleware=self._middleware,
                warm_up=self._warm_up,
            )
        except BaseException:
            self._state = _State.CLOSED
            raise
        self._state = _State.OPEN
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._state = _State.CLOSING
        try:
            while self._running:
                self._idle = anyio.Event()
                await self._idle.wait()
        finally:
            self._state = _State.CLOSED
            with anyio.CancelScope(shield=True):
                await self._line.aclose()

    @asynccontextmanager
    async def _call(
        self, deadline: float | None, retry: RetryPolicy | None
    ) -> AsyncGenerator[tuple[Deadline, RetryPolicy]]:
        """One call of the user's: a slot, from which its deadline counts, and its policy."""
        if self._state is not _State.OPEN:
            raise RuntimeError(f"this RefundSession is {self._state.value}")
        if anyio.lowlevel.current_token() != self._event_loop:
            raise RuntimeError("this RefundSession belongs to another event loop: open one in each loop")
        seconds = self._deadline if deadline is None else _checked(deadline)
        self._running += 1
        try:
            async with self._slots:
                if self._state is not _State.OPEN:  # it was closed while this call waited: nothing is begun any more
                    raise RuntimeError(f"this RefundSession is {self._state.value}")
                yield Deadline(anyio.current_time() + seconds), self._retry if retry is None else retry
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

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
            RefundConflict: the number stands for another refund.
            RefundOutcomeUnknown: it may have been made; see :meth:`settle`.
        """
        return await self._apply(request, journal=self._journal, deadline=deadline, retry=retry)

    async def settle(
        self, unknown: RefundOutcomeUnknown, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Find out what became of a refund that was left unknown, best at its ``ask_again_at``.

        Asks first. The same bytes are sent again only when the gateway's "no such record" may be believed
        (``RetryPolicy.absence_grace``). Returns and raises what :meth:`apply_refund` does.
        """
        return await self._apply(
            unknown.request, journal=self._journal, deadline=deadline, retry=retry, earlier=unknown
        )

    async def outcome_of(
        self,
        request: RefundRequest,
        *,
        deadline: float | None = None,
        retry: RetryPolicy | None = None,
        journal: Journal | None = None,
        earlier: RefundOutcomeUnknown | None = None,
    ) -> Outcome:
        """What :meth:`apply_refund` returns or raises about a refund, as a value, with what it took.

        With ``earlier``, what :meth:`settle` does. ``journal`` overrides the session's.
        """
        began = anyio.current_time()
        tally = Tally()
        refund: Refund | None = None
        error: LianLianError | None = None
        try:
            refund = await self._apply(
                request,
                journal=self._journal if journal is None else journal,
                deadline=deadline,
                retry=retry,
                earlier=earlier,
                tally=tally,
            )
        except LianLianError as problem:
            error = problem
        return Outcome(
            request=request,
            refund=refund,
            error=error,
            attempts=tally.attempts,
            questions=tally.questions,
            seconds=anyio.current_time() - began,
        )

    async def query_refund(
        self, query: RefundQuery, *, deadline: float | None = None, retry: RetryPolicy | None = None
    ) -> Refund:
        """Ask for the gateway's record of a refund (LianLian's *Refund Status API*).

        Returns the signed record. ``deadline`` (seconds) and ``retry`` override the session's.

        Raises:
            RefundNotFound: the gateway has no such record at this moment.
            QueryRejected: the question was refused, which says nothing about the refund.
            SignatureInvalid, AnswerMismatch, MalformedMessage: the last answer was not usable.
            GatewayUnavailable: no usable answer in time.
        """
        async with self._call(deadline, retry) as (until, policy):
            fields = self._line.protocol.query_fields(query)
            exchange = self._line.exchange(Call.QUERY, fields, await self._line.seal(fields), until, policy)
            reply = await self._line.send(exchange)
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
            QueryRejected: the question was refused, which says nothing about the refund.
            RefundConflict: the final state contradicts the session's journal.
        """
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

    async def resume(
        self, *, concurrency: int | None = None, on_final: Callable[[Refund], Awaitable[bool]] | None = None
    ) -> Resumed:
        """Find out about every refund that the session's journal holds as open; how many are known now.

        Unsettled ones are asked about first, as :meth:`apply_refund` does; accepted ones are queried for their final
        state. Run it when the service starts, and now and then; or ``NotificationEndpoint.sweep``, which calls it.
        ``concurrency`` is ``max_connections`` by default. ``on_final`` is called with each refund that is found final;
        an accepted one stays open if it does not return True. Raises ``JournalError``.
        """
        if self._journal is None:
            raise ConfigurationError("resume: this session has no journal")
        workers = self._max_connections if concurrency is None else concurrency
        return await resume(
            self._journal, settle=self.outcome_of, query=self.query_refund, workers=workers, on_final=on_final
        )

    # ── one refund ───────────────────────────────────────────────────────────────────────────────

    async def _apply(
        self,
        request: RefundRequest,
        *,
        journal: Journal | None,
        deadline: float | None,
        retry: RetryPolicy | None,
        earlier: RefundOutcomeUnknown | None = None,
        tally: Tally | None = None,
    ) -> Refund:
        """Send and settle; or settle only, what an ``earlier`` call left unknown; on record, with a journal."""
        if earlier is not None and earlier.oid_partner != self.merchant.oid_partner:
            raise ConfigurationError(
                f"refund {earlier.no_refund} belongs to merchant {earlier.oid_partner}, "
                f"this session to {self.merchant.oid_partner}"
            )
        async with self._call(deadline, retry) as (until, policy):
            protocol = self._line.protocol
            fields = protocol.apply_fields(request) if earlier is None else protocol.signed_fields(earlier.body)
            recording = None
            if journal is not None:
                recording = Recording(journal=journal, request=request, fields=fields, now=self._now)
                if (settled := await recording.look()) is not None:
                    return settled
            body = await self._line.seal(fields) if earlier is None else earlier.body
            case = self._open_case(request, self._line.exchange(Call.APPLY, fields, body, until, policy), tally)
            if earlier is not None:
                case.was_sent(earlier.sent_at)
            if recording is not None:
                return await self._settle_on_record(case, recording)
            return await settle(case, self._line.send, self._line.bucket)

    async def _settle_on_record(self, case: Case, recording: Recording) -> Refund:
        now, until = anyio.current_time(), case.apply.deadline.at
        hold = 2 * (until - now)
        send_before = now + hold
        standing, entry = await recording.claim(case.apply.body, hold, until)
        if standing is Standing.SETTLED:
            return answer(entry)
        case.apply = attrs.evolve(
            case.apply,
            body=entry.body,
            send_before=send_before,
            lease_holds=lambda: anyio.current_time() < send_before,
        )
        if entry.sent_at is not None:
            case.was_sent(entry.sent_at)
        return await recording.keep(entry, partial(settle, case, self._line.send, self._line.bucket))

    def _open_case(self, request: RefundRequest, apply: Exchange, tally: Tally | None) -> Case:
        async def question() -> Exchange:
            # A settlement asks until its deadline, however often that is.
            policy = attrs.evolve(apply.policy, attempts=1_000_000)
            fields = self._line.protocol.query_fields(request.query())
            return self._line.exchange(Call.QUERY, fields, await self._line.seal(fields), apply.deadline, policy)

        epoch = self._now() - timedelta(seconds=anyio.current_time())
        return Case(request=request, apply=apply, question=question, epoch=epoch, tally=tally or Tally())


def _checked(deadline: float) -> float:
    if not deadline > 0:
        raise ConfigurationError(f"deadline: must be more than 0 seconds, is {deadline}")
    return deadline


def _raised(reply: Reply) -> LianLianError:
    """The error in which a query ends."""
    if isinstance(reply.error, GatewayUnavailable):
        reply.error.attempts = reply.attempts
    return cast("LianLianError", reply.error)  # a reply without a refund has one
