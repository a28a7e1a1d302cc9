"""aiohttp: responses to errors, and a handler for notifications.

A service with the ``journal``, ``session`` and ``endpoint`` of the README's FastAPI service::

    from aiohttp import web
    from lianlian_async.contrib.aiohttp import apply_shielded, lifespan, notifications, read_request, refund_errors

    async def make_refund(request: web.Request) -> web.Response:
        refund = await apply_shielded(session, read_request(await request.read()))
        return web.json_response(refund.sta_refund)

    app = web.Application(middlewares=[refund_errors])
    app.cleanup_ctx.append(lifespan(journal, session, endpoint, sweep=900))
    app.router.add_post("/refunds", make_refund)
    app.router.add_post("/lianlian/refund", notifications(endpoint))
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web
from aiohttp.typedefs import Handler

from lianlian_async.errors import LianLianError
from lianlian_async.notifications import NotificationEndpoint

from .web import apply_shielded, lifespan, read_request, respond

__all__ = ["apply_shielded", "lifespan", "notifications", "read_request", "refund_errors"]


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
