"""FastAPI: the application's session as a dependency, and a route for notifications.

::

    journal = SqliteJournal("refunds.sqlite")
    session = RefundSession(merchant, journal=journal)
    endpoint = NotificationEndpoint(merchant, on_refund, journal=journal, session=session)

    app = FastAPI(lifespan=lifespan(journal, session, endpoint))
    app.include_router(notifications(endpoint, "/lianlian/refund"))

    @app.post("/refunds")
    async def make_refund(order: Order, session: Session) -> str | None:
        return (await session.apply_refund(order.refund())).sta_refund
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.requests import HTTPConnection
from starlette.routing import Route

from lianlian_async.notifications import NotificationEndpoint
from lianlian_async.session import RefundSession

__all__ = ["Session", "get_session", "lifespan", "notifications"]


def lifespan(
    *contexts: AbstractAsyncContextManager[Any],
) -> Callable[[FastAPI], AbstractAsyncContextManager[dict[str, Any]]]:
    """Return a lifespan that opens ``contexts`` in this order: a journal, its session, an endpoint.

    A parameter of type :data:`Session` receives the ``RefundSession`` among them. Your own lifespan can
    ``yield {"refund_session": session}`` instead.
    """

    @asynccontextmanager
    async def opened(_app: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            entered = [await stack.enter_async_context(context) for context in contexts]
            yield {"refund_session": next((each for each in entered if isinstance(each, RefundSession)), None)}

    return opened


def get_session(connection: HTTPConnection) -> RefundSession:
    """Return the application's session. Raises ``RuntimeError`` if the lifespan opened none."""
    session: RefundSession | None = getattr(connection.state, "refund_session", None)
    if session is None:
        raise RuntimeError(
            "no RefundSession is open: pass one to FastAPI(lifespan=lifespan(...)), and let the server run the lifespan"
        )
    return session


Session = Annotated[RefundSession, Depends(get_session)]
"""Type of a parameter that receives the application's session."""


def notifications(endpoint: NotificationEndpoint, path: str) -> APIRouter:
    """Return a router with ``endpoint`` at ``path``, left out of the OpenAPI schema, as only LianLian calls it."""
    return APIRouter(routes=[Route(path, endpoint, include_in_schema=False)])
