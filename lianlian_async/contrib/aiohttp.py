"""aiohttp: the application's session under a key, responses to errors, and a handler for notifications.

A service with the ``journal``, ``session`` and ``endpoint`` of the README's FastAPI service::

    from aiohttp import web
    from lianlian_async.contrib.aiohttp import apply_shielded, get_session, lifespan
    from lianlian_async.contrib.aiohttp import notifications, read_request, refund_errors

    async def make_refund(request: web.Request) -> web.Response:
        refund = await apply_shielded(get_session(request), read_request(await request.read()))
        return web.json_response(refund.sta_refund)

    app = web.Application(middlewares=[refund_errors])
    app.cleanup_ctx.append(lifespan(journal, session, endpoint, sweep=900))
    app.router.add_post("/refunds", make_refund)
    app.router.add_post("/lianlian/refund", notifications(endpoint))
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.typedefs import Handler

from lianlian_async.errors import LianLianError
from lianlian_async.notifications import NotificationEndpoint
from lianlian_async.session import RefundSession

from .web import apply_shielded, read_request, respond
from .web import lifespan as web_lifespan

__all__ = ["SESSION", "apply_shielded", "get_session", "lifespan", "notifications", "read_request", "refund_errors"]

SESSION: Final = web.AppKey("refund_session", RefundSession)
"""``app[SESSION]`` is the session, if the lifespans of the application together open exactly one."""


def lifespan(
    *contexts: AbstractAsyncContextManager[Any], sweep: float | None = None
) -> Callable[[web.Application], AbstractAsyncContextManager[None]]:
    """Return a cleanup context that opens ``contexts``, and sweeps, as :func:`.web.lifespan` does."""
    opened = web_lifespan(*contexts, sweep=sweep)

    @asynccontextmanager
    async def stored(app: web.Application) -> AsyncGenerator[None]:
        async with opened(app) as sessions:
            for session in sessions.values():  # None if there are several, also in other lifespans
                app[SESSION] = session if app.get(SESSION, session) is session else cast("Any", None)
            yield

    return stored


def get_session(request: web.Request) -> RefundSession:
    """Return the session of the application or its parent. Raises ``RuntimeError`` for none, or for several."""
    session: RefundSession | None = request.config_dict.get(SESSION)
    if session is None:
        raise RuntimeError("exactly one RefundSession must be open: pass it to app.cleanup_ctx.append(lifespan(...))")
    return session


@web.middleware
async def refund_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Respond to a ``LianLianError`` that a handler raises: ``web.Application(middlewares=[refund_errors])``."""
    try:
        return await handler(request)
    except LianLianError as error:
        status, headers, body = respond(error)
        return web.json_response(body, status=status, headers=headers)


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
