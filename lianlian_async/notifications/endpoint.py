"""Notifications: raw bytes in, an acknowledgement out, and a handler that is called once for each final refund.

*Inline*, the default: the handler runs, then the notification is acknowledged. If the handler fails or takes too
long, it is not, and LianLian's next delivery (2 minutes later, 30 at most) calls the handler again.

*Inbox* (``inbox=True``): the notification is written to the journal and acknowledged; the handler runs behind it,
again after growing pauses until it succeeds, over restarts too.

In both modes the handler is called again only if it has not returned, or if the process or the journal died
between its return and the line in the journal that says so. A journal that several processes share makes that
hold for all of them; without a journal it holds for one process and the refunds that it remembers.

From the first time that an endpoint opens with a journal on, whatever that journal learns to be final is acted on, also
where no notification told it: a process that asked, or an operator's command. Until the handler has returned, it is
FINAL there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias, cast

import anyio

from lianlian_async import asgi
from lianlian_async.background import BackgroundTask
from lianlian_async.clock import Clock, system_clock
from lianlian_async.errors import (
    AnswerMismatch,
    ConfigurationError,
    LianLianError,
    MalformedMessage,
    RefundConflict,
    SignatureInvalid,
)
from lianlian_async.journal import Journal, Standing
from lianlian_async.merchant import Merchant
from lianlian_async.models import Refund
from lianlian_async.recovery import Resumed
from lianlian_async.rsa_worker import RsaWorker
from lianlian_async.session import RefundSession
from lianlian_async.settings import check_integer, check_journal, check_type, positive_seconds
from lianlian_async.worker_pool import checked

from .allow_list import AllowList
from .completion import IncompleteNotification, check_state, complete
from .dispatch import Book, act_on
from .inbox import Inbox
from .memory_book import MemoryBook
from .responses import ACKS, NOT_HERE, ONLY_POST, Ack, Verdict

__all__ = ["Ack", "NotificationEndpoint", "Verdict"]

logger = logging.getLogger("lianlian_async")

Headers: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]

MAX_NOTIFICATION_BYTES: Final = 64 * 1024
_HOW_TO_OPEN: Final = (
    "use the NotificationEndpoint in `async with`, or have the server run its lifespan (uvicorn: --lifespan on)"
)

_REFUSED: Final[Mapping[type[LianLianError], Verdict]] = {
    MalformedMessage: Verdict.MALFORMED,
    SignatureInvalid: Verdict.UNVERIFIED,
    AnswerMismatch: Verdict.FOREIGN,
    RefundConflict: Verdict.CONTRADICTORY,
    IncompleteNotification: Verdict.INCOMPLETE,
}


class _Ready(NamedTuple):
    """What exists from the first notification on."""

    rsa: RsaWorker
    book: Inbox | MemoryBook


class _Worker(NamedTuple):
    """What exists behind an inbox as long as the endpoint is open."""

    inbox: Inbox
    task: BackgroundTask


class NotificationEndpoint:
    """Receives LianLian's notifications for one merchant, in one event loop (asyncio or trio).

    ::

        endpoint = NotificationEndpoint(merchant, on_refund, journal=journal)
        ack = await endpoint.handle(body, headers)      # or serve it: the object is an ASGI application

    ``async with endpoint`` loads the keys before the first notification comes, opens a journal that is not open yet
    (and closes it again), and runs the inbox; the lifespan of an ASGI server does it too. In *inline* mode with an open
    journal, or with none, it may be left out.

    Args:
        merchant: who we are; what others are notified of is refused.
        on_refund: a coroutine function, called with the ``Refund`` whose ``sta_refund`` is final. It should commit
            its work before it returns, and bear to be called again if it did not return.
        journal: best the session's own. What it knows about a refund must match, and it learns the
            final state. One handler for a journal: it is called once for all processes. Without a journal, the last
            ``remember`` refunds of this process are known.
        session: told of final states, so that ``wait_refund`` returns at once; asks for what a notification leaves out;
            needed by ``confirm``.
        confirm: ask the gateway before the handler runs, since a notification bears neither time nor nonce.
        inbox: acknowledge first, act behind it; needs a journal.
        body_seconds: how long a request's body may take to arrive where the endpoint itself reads it; then 408.
        handler_seconds: what confirming and ``on_refund`` may take together. LianLian waits 5 seconds for an answer;
            an inbox's handlers may take longer.
        allow_from: networks that notifications are taken from; empty: all. LianLian's published lists differ by
            page and age, so there is no default.
        trusted_proxies: networks whose X-Forwarded-For is believed; ``"unix"`` for your proxy on a Unix socket, if the
            server listens on nothing else.
        path: the only path that is served as an ASGI application; None: every path.
        concurrency: handlers that run at the same time behind an inbox.
        remember: see ``journal``.
        clock: reads the wall clock and the boot clock, for leases in the journal.

    Raises ``ConfigurationError`` for settings that do not go together.
    """

    def __init__(
        self,
        merchant: Merchant,
        on_refund: Callable[[Refund], Awaitable[object]],
        *,
        journal: Journal | None = None,
        session: RefundSession | None = None,
        confirm: bool = False,
        inbox: bool = False,
        body_seconds: float = 5.0,
        handler_seconds: float = 4.0,
        allow_from: Iterable[str] = (),
        trusted_proxies: Iterable[str] = (),
        path: str | None = None,
        concurrency: int = 8,
        remember: int = 10_000,
        clock: Clock = system_clock,
    ) -> None:
        check_type("merchant", merchant, Merchant)
        check_type("on_refund", on_refund, Callable)  # type: ignore[arg-type]
        check_journal(journal)
        check_type("session", session, RefundSession | None)
        check_integer("remember", remember, least=0)
        if confirm and session is None:
            raise ConfigurationError("confirm: needs a session to ask with")
        if inbox and journal is None:
            raise ConfigurationError("inbox: needs a journal to keep notifications in")
        for name, seconds in (("body_seconds", body_seconds), ("handler_seconds", handler_seconds)):
            positive_seconds(name, seconds)
        self.merchant = merchant
        self.counts: Counter[str] = Counter()
        """Deliveries by their :class:`Verdict`; behind an inbox and in a sweep, calls of the handler as *acted* and
        *failed*."""
        self._on_refund = on_refund
        self._journal = journal
        self._session = session
        self._confirm = confirm
        self._is_inbox = inbox
        self._body_seconds = body_seconds
        self._seconds = handler_seconds
        self._allow_list = AllowList.read(allow_from, trusted_proxies)
        self._path = path
        self._concurrency = checked(concurrency)
        self._recent = MemoryBook(remember, handler_seconds)
        self._clock = clock
        self._ready: _Ready | None = None
        self._turn = anyio.Lock()
        self._worker: _Worker | None = None
        self._resources: AsyncExitStack | None = None
        """What ``async with`` opened."""

    def __repr__(self) -> str:
        return f"<NotificationEndpoint {self.merchant.oid_partner}>"

    # ── opening and closing ──────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        if self._resources is not None:
            raise RuntimeError("this NotificationEndpoint is in use already")
        async with AsyncExitStack() as resources:
            if self._journal is not None and not self._journal.is_open:
                await resources.enter_async_context(self._journal)
            ready = await self._open()
            self._resources = resources.pop_all()
        if self._is_inbox:
            inbox = cast("Inbox", ready.book)  # there is a journal
            work = partial(inbox.work, self._concurrency, self._count_act)
            self._worker = _Worker(inbox, BackgroundTask(work, inbox.end))
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ready = None
        worker, self._worker = self._worker, None
        resources, self._resources = self._resources, None
        async with cast("AsyncExitStack", resources):  # it was entered
            if worker is not None:
                worker.inbox.stop()
                try:
                    await worker.task.join()
                finally:
                    await worker.task.aclose()

    async def _open(self) -> _Ready:
        async with self._turn:
            if self._ready is None:
                if self._journal is not None and not self._journal.is_open:
                    raise RuntimeError(f"{self._journal!r} is not open: {_HOW_TO_OPEN}")
                book = self._recent if self._journal is None else await self._inbox_beside(self._journal)
                self._ready = _Ready(await RsaWorker.open(self.merchant), book)
            return self._ready

    async def _inbox_beside(self, journal: Journal) -> Inbox:
        await journal.begin_acting()
        return Inbox(await journal.inbox(), self._act, refunds=journal, seconds=self._seconds, clock=self._clock)

    # ── one delivery ─────────────────────────────────────────────────────────────────────────────

    async def handle(self, body: bytes, headers: Headers, *, client: str | None = None) -> Ack:
        """Act on the notification in ``body``, and return the answer to it.

        ``body`` is the raw bytes of the request's body, ``headers`` any mapping, or pairs. ``client`` is the address
        that the request came from; with ``allow_from`` it is needed. Raises only cancellation, and ``TypeError`` for
        arguments of another kind: a body that a framework has decoded already.
        """
        if not self._admits(headers, client):
            return self._answer(Verdict.NOT_ADMITTED)
        return await self._handle(body)

    async def handle_stream(
        self, read: Callable[[int], Awaitable[bytes]], headers: Headers, *, client: str | None = None
    ) -> Ack:
        """Read a body that is still arriving, and :meth:`handle` it; answer 408 if it takes too long.

        ``read(limit)`` returns the body, or the beginning of a longer one: more than ``limit`` bytes. It is not called
        for a client that is not on the allow-list. Raises what ``read`` raises, and cancellation.
        """
        if not self._admits(headers, client):
            return self._answer(Verdict.NOT_ADMITTED)
        with anyio.move_on_after(self._body_seconds) as scope:
            body = await read(MAX_NOTIFICATION_BYTES)
        if scope.cancelled_caught:
            logger.warning("notification refused: its body did not arrive within %g s", self._body_seconds)
            return self._answer(Verdict.TOO_SLOW)
        return await self._handle(body)

    async def _handle(self, body: bytes) -> Ack:
        if not isinstance(body, bytes | bytearray):
            raise TypeError(f"body: give the raw bytes of the body, not {type(body).__name__}; the endpoint decodes it")
        try:
            verdict = await self._judge(body)
        except tuple(_REFUSED) as error:
            verdict = _REFUSED[type(error)]
            level = logging.ERROR if verdict is Verdict.CONTRADICTORY else logging.WARNING
            logger.log(level, "notification refused as %s: %s", verdict, error)
        except Exception:
            verdict = Verdict.FAILED
            logger.exception("notification not taken")
        return self._answer(verdict)

    def _answer(self, verdict: Verdict) -> Ack:
        self.counts[verdict] += 1
        return ACKS[verdict]

    def _admits(self, headers: Headers, client: str | None) -> bool:
        if not self._allow_list.allow_from:
            return True
        is_admitted, address = self._allow_list.judge(client, _header(headers, "x-forwarded-for"))
        if not is_admitted:
            logger.warning("notification refused: %s is not on the allow-list", address)
        return is_admitted

    async def _judge(self, body: bytes) -> Verdict:
        if len(body) > MAX_NOTIFICATION_BYTES:
            logger.warning("notification refused: longer than %d bytes", MAX_NOTIFICATION_BYTES)
            return Verdict.TOO_BIG
        rsa, book = self._ready or await self._open()
        told = await rsa.check(rsa.protocol.read_notification, body)
        refund = await book.learn(await complete(told, self._session, self._journal, self._seconds))
        if not refund.is_final:
            return Verdict.NOT_FINAL
        return await (self._keep(refund) if self._is_inbox else self._act_once(book, refund))

    async def _keep(self, refund: Refund) -> Verdict:
        if self._worker is None:
            raise RuntimeError(f"the inbox is not open: {_HOW_TO_OPEN}")
        standing = await self._worker.inbox.keep(refund)
        self._tell(refund)
        return Verdict.KEPT if standing is Standing.NEW else Verdict.DUPLICATE

    async def _act_once(self, book: Book[Any], refund: Refund) -> Verdict:
        standing, held = await book.take(refund)
        self._tell(refund)
        if standing is Standing.FINISHED:
            return Verdict.DUPLICATE
        if standing is Standing.LEASED:
            return Verdict.BUSY
        well = await act_on(refund, book, held, self._act, self._seconds)
        return Verdict.ACTED if well else Verdict.FAILED

    # ── what never came ──────────────────────────────────────────────────────────────────────────

    async def sweep(self, *, concurrency: int | None = None) -> Resumed:
        """Find out about all that is open, as ``RefundSession.resume`` does, and act on what is final by now.

        LianLian gives up after 30 deliveries, within an hour. Run this when the service starts, and every quarter of an
        hour or so: a refund whose notification never came is asked about; one that was found final by other means, or
        that the handler failed to act on, is given to it. Each is acted on once, whoever tells of it first.

        Returns what ``resume`` found; :attr:`counts` tells of the handler. ``concurrency`` is the session's
        ``max_connections`` by default. Needs a journal, and a session on it. Raises ``ConfigurationError`` without
        them, and ``JournalError``.
        """
        if self._journal is None or self._session is None:
            raise ConfigurationError("sweep: needs a journal, and a session to ask with")
        book = cast("Inbox", (await self._open()).book)  # there is a journal
        resumed = await self._session.resume(concurrency=concurrency)
        await book.keep_final(self._concurrency)
        if not self._is_inbox:  # else they are being worked on all the time
            await book.catch_up(self._concurrency, self._count_act)
        return resumed

    def _tell(self, refund: Refund) -> None:
        if self._session is not None:
            self._session.notified(refund)

    async def _act(self, refund: Refund) -> None:
        if self._confirm and self._session is not None:
            check_state(refund, await self._session.query_refund(refund.query()))
        await self._on_refund(refund)

    def _count_act(self, well: bool) -> None:
        self.counts[Verdict.ACTED if well else Verdict.FAILED] += 1

    # ── ASGI ─────────────────────────────────────────────────────────────────────────────────────

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve one connection as ASGI 3 has it: HTTP requests and the server's lifespan."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, self)
        elif scope["type"] == "http":
            ack = await self._serve(scope, receive)
            headers = dict(ack.headers)
            if ack.status != 200 and scope.get("http_version", "1.1").startswith("1"):
                headers["connection"] = "close"  # a request that was not read to its end would keep it open
            await asgi.respond(send, ack.status, headers, ack.body)
        else:
            await send({"type": "websocket.close"})

    async def _serve(self, scope: Mapping[str, Any], receive: asgi.Receive) -> Ack:
        # Where the endpoint is mounted in another application, the path begins with the place of the mount.
        if self._path is not None and scope["path"].removeprefix(scope.get("root_path", "")) != self._path:
            return NOT_HERE
        if scope["method"] != "POST":
            return ONLY_POST
        client = scope.get("client")
        return await self.handle_stream(
            lambda limit: asgi.read(receive, limit), asgi.headers(scope), client=client and client[0]
        )


def _header(headers: Headers, name: str) -> str:
    try:
        pairs: Iterable[tuple[str, str]] = headers.items() if hasattr(headers, "items") else headers
        return ",".join([text for key, text in pairs if str.lower(key) == name])
    except (TypeError, ValueError):
        raise TypeError("headers: give a mapping of texts, or pairs of texts") from None
