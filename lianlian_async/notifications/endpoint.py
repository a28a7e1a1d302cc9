"""Receive LianLian's notifications: verify, acknowledge, and call the handler for each final refund.

*Inline*, the default: the handler runs, then the notification is acknowledged. If the handler fails or takes too long,
LianLian delivers the notification again after 2 minutes (at most 30 times), and the handler is called again.

*Inbox* (``inbox=True``): the notification is recorded in the journal and acknowledged. The handler runs in the
background and is retried with exponential backoff until it succeeds, also after a restart.

In both modes the handler is called again only if it did not return in time, or if the process or the journal failed
before the return was recorded. This holds for all processes that share the journal; without a journal, for the latest
10,000 refunds of this endpoint. Once an endpoint uses a journal, each refund that becomes final, also without a
notification, stays in state FINAL in the journal until the handler has returned for it.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from inspect import isawaitable
from time import perf_counter
from typing import Any, Final, Self, TypeAlias, cast

import anyio

from lianlian_async import asgi, errors
from lianlian_async.background import BackgroundTask
from lianlian_async.clock import Clock, system_clock
from lianlian_async.events import ActedOn, Listener, Notified
from lianlian_async.journal import Journal, Standing
from lianlian_async.logs import Listeners
from lianlian_async.merchant import Merchant
from lianlian_async.models import Refund
from lianlian_async.recording import learn
from lianlian_async.recovery import Resumed
from lianlian_async.resolution import IncompleteRecord
from lianlian_async.rsa_worker import RsaWorker
from lianlian_async.session import RefundSession
from lianlian_async.settings import check_integer, check_journal, check_seconds, check_type
from lianlian_async.wire import MAX_MESSAGE_BYTES

from .allow_list import judge, networks
from .completion import check_same, complete
from .inbox import Inbox, NoJournal
from .responses import ACKS, NOT_HERE, ONLY_POST, Ack, Verdict

logger = logging.getLogger("lianlian_async")

Headers: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]

_HOW_TO_OPEN: Final = "use the NotificationEndpoint in `async with`, or the server's lifespan (uvicorn: --lifespan on)"

_REFUSED: Final[Mapping[type[errors.LianLianError], Verdict]] = {
    errors.MalformedMessage: Verdict.MALFORMED,
    errors.SignatureInvalid: Verdict.UNVERIFIED,
    errors.AnswerMismatch: Verdict.FOREIGN,
    errors.RefundConflict: Verdict.CONTRADICTORY,
    IncompleteRecord: Verdict.INCOMPLETE,
}


class NotificationEndpoint:
    """Receives LianLian's notifications for one merchant, in one event loop (asyncio or trio).

    ::

        endpoint = NotificationEndpoint(merchant, on_refund, journal=journal)
        ack = await endpoint.handle(body, headers)      # or serve it: the object is an ASGI application

    ``async with endpoint`` loads the keys, opens the journal if it is closed (and closes it at the end), and runs the
    inbox. The lifespan of an ASGI server does the same. In *inline* mode, ``async with`` is optional if the journal is
    already open or there is none.

    Args:
        merchant: the merchant of this service; notifications for other merchants are refused.
        on_refund: the handler, a coroutine function that is called with a ``Refund`` whose ``sta_refund`` is final. It
            should commit its work before it returns. It must be idempotent: it is called again after an exception, a
            timeout or a crash.
        journal: by default the session's journal. The endpoint records each refund's state in it, and refuses a
            notification that contradicts the recorded state. Use only one handler per journal: after a process has
            handled a refund, no other process that shares the journal does.
        session: its ``wait_refund`` calls are woken, and fields that a notification omits are queried through it.
            ``confirm`` and :meth:`sweep` require it.
        confirm: query the gateway before a handler call, unless a statement or a person decided the outcome. A
            notification contains neither a nonce nor the time of its sending, so it may be an old one.
        inbox: acknowledge first and call the handler in the background; requires a journal.
        body_seconds: time limit for reading a request body; after it, the response is 408.
        handler_seconds: time limit for confirming and ``on_refund`` together. LianLian waits 5 seconds for a response;
            with ``inbox``, the limit may be longer.
        allow_from: networks that may send notifications; empty: all. There is no default, because the lists on
            LianLian's pages differ.
        trusted_proxies: networks whose X-Forwarded-For is trusted; ``"unix"`` for a proxy on a Unix socket, if the
            server listens on nothing else.
        path: the only path that the ASGI application serves; None: every path.
        concurrency: maximum number of concurrent handler calls of the inbox and of :meth:`sweep`.
        listeners: see ``RefundSession``; by default the session's listeners.
        clock: reads the wall clock and the boot clock, for leases in the journal.

    Raises ``ConfigurationError`` for invalid settings, and for settings that contradict each other.
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
        listeners: Sequence[Listener] = (),
        clock: Clock = system_clock,
    ) -> None:
        check_type("merchant", merchant, Merchant)
        check_type("on_refund", on_refund, Callable)  # type: ignore[arg-type]
        check_journal(journal)
        check_type("session", session, RefundSession | None)
        if session is not None:
            if session.merchant.oid_partner != merchant.oid_partner:
                raise errors.ConfigurationError("session: must belong to the endpoint's merchant")
            journal = session.journal if journal is None else journal
        if confirm and session is None:
            raise errors.ConfigurationError("confirm=True requires session=…, to query the gateway")
        if inbox and journal is None:
            raise errors.ConfigurationError("inbox=True requires a journal, its own or the session's")
        if path is not None and not path.startswith("/"):
            raise errors.ConfigurationError(f"path: must begin with a slash, is {path!r}")
        self.merchant = merchant
        self.counts: Counter[str] = Counter()
        """Number of notifications by :class:`Verdict`. Tries of the inbox and of :meth:`sweep` to call the handler are
        counted, too, as *acted* or *failed*."""
        self._on_refund = on_refund
        self._journal = NoJournal() if journal is None else journal
        self._session = session
        self._confirm = confirm
        self._is_inbox = inbox
        self._body_seconds = check_seconds("body_seconds", body_seconds)
        self._seconds = check_seconds("handler_seconds", handler_seconds)
        self._allow_from = networks("allow_from", allow_from)
        proxies = list(trusted_proxies)
        self._trusts_unix = "unix" in proxies
        self._trusted_proxies = networks("trusted_proxies", (text for text in proxies if text != "unix"))
        self._path = path
        self._concurrency = check_integer("concurrency", concurrency, least=1)
        self._clock = clock
        own = Listeners(listeners, timer=perf_counter, is_logged=True)
        self._listeners = own if listeners or session is None else session.listeners
        self._ready: tuple[RsaWorker, Inbox] | None = None
        self._open_lock = anyio.Lock(fast_acquire=True)
        self._worker: BackgroundTask | None = None
        self._resources: AsyncExitStack | None = None
        """Everything that ``async with`` opened."""

    def __repr__(self) -> str:
        return f"<NotificationEndpoint {self.merchant.oid_partner}>"

    async def __aenter__(self) -> Self:
        if self._resources is not None:
            raise RuntimeError("this NotificationEndpoint is already open: enter it only once at a time")
        self._ready = None  # a notification that arrived outside of `async with` may have opened an earlier inbox
        async with AsyncExitStack() as resources:
            if not self._journal.is_open:
                await resources.enter_async_context(self._journal)
            _, inbox = await self._open()
            if self._is_inbox:
                self._worker = await resources.enter_async_context(inbox.worker())
            self._resources = resources.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        resources, self._resources = self._resources, None
        self._ready = self._worker = None
        await cast("AsyncExitStack", resources).aclose()  # it was entered

    async def _open(self) -> tuple[RsaWorker, Inbox]:
        async with self._open_lock:
            # In inline mode, the journal may have been closed, and opened again: its inbox is then a new one.
            if self._ready is None or not (self._is_inbox or self._ready[1].journal.is_open):
                if not self._journal.is_open:
                    raise RuntimeError(f"{self._journal!r} is not open: {_HOW_TO_OPEN}")
                owner = self.merchant.oid_partner, self.merchant.endpoints.apply
                await self._journal.bind(*owner)
                await self._journal.begin_acting()
                journal = await self._journal.inbox()
                await journal.bind(*owner)  # the inbox may remain from a deleted journal, such as a rehearsal's
                inbox = Inbox(
                    journal=journal,
                    refunds=self._journal,
                    act=self._act,
                    count=lambda succeeded: self.counts.update([Verdict.ACTED if succeeded else Verdict.FAILED]),
                    seconds=self._seconds,
                    workers=self._concurrency,
                    clock=self._clock,
                )
                self._ready = await RsaWorker.open(self.merchant), inbox
            return self._ready

    async def handle(self, body: bytes, headers: Headers, *, client: str | None = None) -> Ack:
        """Handle the notification in ``body`` and return the response.

        ``body`` is the raw bytes of the request's body, ``headers`` any mapping or pairs. ``client`` is the peer's
        address, for ``allow_from``. Every ``Exception`` becomes a response, except one about an argument of a wrong
        type, such as a ``TypeError`` for a body that a framework has decoded.
        """
        if not self._admits(headers, client):
            return self._answer(Verdict.NOT_ADMITTED)
        return await self._handle(body)

    async def handle_stream(
        self, read: Callable[[int], Awaitable[bytes]], headers: Headers, *, client: str | None = None
    ) -> Ack:
        """Read a body within ``body_seconds`` and :meth:`handle` it; respond 408 if reading takes longer.

        ``read(limit)`` returns the whole body, or at least its first ``limit + 1`` bytes if it is longer than
        ``limit``. It is not called for a client outside ``allow_from``. Exceptions of ``read`` are not caught.
        """
        if not self._admits(headers, client):
            return self._answer(Verdict.NOT_ADMITTED)
        with anyio.move_on_after(self._body_seconds) as scope:
            body = await read(MAX_MESSAGE_BYTES)
        if scope.cancelled_caught:
            logger.warning("notification refused: its body did not arrive within %g s", self._body_seconds)
            return self._answer(Verdict.TOO_SLOW)
        return await self._handle(body)

    async def _handle(self, body: bytes) -> Ack:
        if not isinstance(body, bytes | bytearray):
            raise TypeError(f"body: must be the raw bytes of the request body, not {type(body).__name__}")
        began, about = self._listeners.timer(), list[str | None]()
        try:
            verdict = await self._judge(body, about)
        except tuple(_REFUSED) as error:
            verdict = _REFUSED[type(error)]
            level = logging.ERROR if verdict is Verdict.CONTRADICTORY else logging.WARNING
            logger.log(level, "notification refused as %s: %s", verdict, error)
        except Exception:
            verdict = Verdict.FAILED
            logger.exception("notification not acknowledged, so LianLian delivers it again (at most 30 times)")
        return self._answer(verdict, self._listeners.timer() - began, *about)

    def _answer(self, verdict: Verdict, seconds: float = 0.0, no_refund: str | None = None) -> Ack:
        self.counts[verdict] += 1
        self._listeners.tell(Notified, no_refund=no_refund, verdict=str(verdict), seconds=seconds)
        return ACKS[verdict]

    def _admits(self, headers: Headers, client: str | None) -> bool:
        if not self._allow_from:
            return True
        forwarded_for, proxies = _header(headers, "x-forwarded-for"), self._trusted_proxies
        is_admitted, address = judge(client, forwarded_for, self._allow_from, proxies, trusts_unix=self._trusts_unix)
        if not is_admitted:
            logger.warning("notification refused: %s is not on the allow-list", address)
        return is_admitted

    async def _judge(self, body: bytes, about: list[str | None]) -> Verdict:
        """Return the verdict; append the ``no_refund`` to ``about`` once the signature is verified."""
        if len(body) > MAX_MESSAGE_BYTES:
            logger.warning("notification refused: longer than %d bytes", MAX_MESSAGE_BYTES)
            return Verdict.TOO_BIG
        rsa, inbox = await self._open()
        record = await rsa.check(rsa.protocol.read_notification, body)
        about.append(record.no_refund)
        refund = await complete(record, self._session, self._journal, self._seconds)
        refund = await learn(self._journal, refund, self._clock(), "notification")
        if not refund.is_final:
            return Verdict.NOT_FINAL
        self._check_inbox()
        if self._is_inbox:
            standing = await inbox.keep(refund)
        else:
            standing, leased = await inbox.take(refund, wait=self._seconds)
        if self._session is not None:
            self._session.notified(refund)
        if self._is_inbox:
            return Verdict.KEPT if standing is Standing.NEW else Verdict.DUPLICATE
        if standing is Standing.FINISHED:
            return Verdict.DUPLICATE
        if standing is Standing.LEASED:
            return Verdict.BUSY
        return Verdict.ACTED if await inbox.act_on(refund, leased) else Verdict.FAILED

    async def sweep(self, *, concurrency: int | None = None) -> Resumed:
        """Resolve all open refunds, as ``RefundSession.resume`` does, then act on the refunds in state FINAL.

        LianLian stops after 30 deliveries, about an hour. Call this method at the start of the service and about every
        15 minutes: it queries the refunds whose notification never arrived. It calls the handler for refunds that
        became final without a notification, and again for refunds whose handler call failed.

        Returns the result of ``resume``; :attr:`counts` has the results of the handler calls. ``concurrency``: see
        ``resume``. Raises ``ConfigurationError`` as :meth:`check_sweep` and ``resume``, ``JournalError`` if the
        journal fails, and ``RuntimeError`` if the inbox has no worker.
        """
        journal, session = self.check_sweep()
        self._check_inbox(may_have_ended=True)
        _, inbox = await self._open()
        await journal.begin_acting()  # again: a failover of the database may have lost the first one
        resumed = await session.resume(concurrency=concurrency)
        await inbox.keep_final()
        if not self._is_inbox:
            await inbox.catch_up()
        self._check_inbox()  # its worker calls the handler
        return resumed

    def check_sweep(self) -> tuple[Journal, RefundSession]:
        """Return the journal and the session for :meth:`sweep`.

        Raises ``ConfigurationError`` without a journal or a session, or if the session has another journal.
        """
        if self._session is None or self._session.journal is not self._journal:
            raise errors.ConfigurationError(
                "sweep requires a session with the endpoint's journal: it queries the gateway through the session"
            )
        return self._journal, self._session

    def _check_inbox(self, *, may_have_ended: bool = False) -> None:
        # Without a worker, no notification may be acknowledged.
        if self._is_inbox and self._worker is None:
            raise RuntimeError(f"the inbox is not open: {_HOW_TO_OPEN}")
        if self._worker is not None and self._worker.has_ended and not may_have_ended:
            raise RuntimeError("the inbox's worker has ended: open the NotificationEndpoint again")

    async def _act(self, refund: Refund) -> None:
        began, succeeded = self._listeners.timer(), False
        try:
            # The gateway might not find a refund whose outcome comes from a statement or from a person's decision.
            if self._confirm and self._session is not None and refund.evidence is None:
                check_same(refund, await self._session.query_refund(refund.query()))
            if isawaitable(done := self._on_refund(refund)):  # the work of a function that is not async is done now
                await done
            succeeded = True
        finally:
            seconds = self._listeners.timer() - began
            self._listeners.tell(ActedOn, no_refund=refund.no_refund, succeeded=succeeded, seconds=seconds)

    async def __call__(self, scope: asgi.Message, receive: asgi.Receive, send: asgi.Send) -> None:
        """Serve HTTP requests and the server's lifespan (ASGI 3)."""
        if scope["type"] == "lifespan":
            await asgi.lifespan(receive, send, self)
        elif scope["type"] == "http":
            ack = await self._serve(scope, receive)
            headers = dict(ack.headers)
            if ack.status != 200 and scope.get("http_version", "1.1").startswith("1"):
                headers["connection"] = "close"  # the request may not have been read to its end
            await asgi.respond(send, ack.status, headers, ack.body)
        else:
            await send({"type": "websocket.close"})

    async def _serve(self, scope: Mapping[str, Any], receive: asgi.Receive) -> Ack:
        # If another application mounts the endpoint, the path begins with the mount point.
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
        raise TypeError("headers: must be a mapping of str to str, or (name, value) pairs of str") from None
