"""aiohttp: store the session under an application key, and handle notifications.

A complete service::

    from aiohttp import web
    from lianlian_async import Merchant, NotificationEndpoint, Refund, RefundRequest, RefundSession
    from lianlian_async.contrib.aiohttp import get_session, lifespan, notifications
    from lianlian_async.journal import SqliteJournal

    async def on_refund(refund: Refund) -> None:
        print(refund.no_refund, "is final:", refund.sta_refund)   # your own work: commit it before you return

    async def make_refund(request: web.Request) -> web.Response:
        refund = await get_session(request).apply_refund(RefundRequest.from_dict(await request.json()))
        return web.json_response(refund.sta_refund)

    merchant = Merchant.from_env()
    journal = SqliteJournal("refunds.sqlite")
    session = RefundSession(merchant, journal=journal)
    endpoint = NotificationEndpoint(merchant, on_refund, journal=journal, session=session)

    app = web.Application()
    app.cleanup_ctx.append(lifespan(journal, session, endpoint))
    app.router.add_post("/refunds", make_refund)
    app.router.add_post("/lianlian/refund", notifications(endpoint))
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any, Final

from aiohttp import web

from lianlian_async.notifications import NotificationEndpoint
from lianlian_async.session import RefundSession

__all__ = ["SESSION", "get_session", "lifespan", "notifications"]

SESSION: Final = web.AppKey("refund_session", RefundSession)


def lifespan(*contexts: AbstractAsyncContextManager[Any]) -> Callable[[web.Application], AsyncGenerator[None]]:
    """Return a cleanup context that opens ``contexts`` in this order: a journal, its session, an endpoint.

    If one of them is a session, ``app[SESSION]`` is that session.
    """

    async def opened(app: web.Application) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for context in contexts:
                entered = await stack.enter_async_context(context)
                if isinstance(entered, RefundSession):
                    app[SESSION] = entered
            yield

    return opened


def get_session(request: web.Request) -> RefundSession:
    """Return the session of the application or its parent. Raises ``RuntimeError`` if there is none."""
    session: RefundSession | None = request.config_dict.get(SESSION)
    if session is None:
        raise RuntimeError("no RefundSession is open: pass one to app.cleanup_ctx.append(lifespan(...))")
    return session


def notifications(endpoint: NotificationEndpoint) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return a handler for POST requests that passes notifications to ``endpoint``."""

    async def handler(request: web.Request) -> web.Response:
        async def read(limit: int) -> bytes:
            body = bytearray()
            # If the body ends early or its compression is broken, the endpoint reports it as malformed.
            with suppress(ConnectionError, web.RequestPayloadError):
                while len(body) <= limit and (piece := await request.content.readany()):
                    body += piece
            return bytes(body)

        ack = await endpoint.handle_stream(read, request.headers, client=request.remote)
        return web.Response(status=ack.status, headers=ack.headers, body=ack.body)

    return handler
