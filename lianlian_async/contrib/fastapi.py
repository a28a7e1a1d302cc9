"""FastAPI: the application's session as a dependency, responses to errors, and a route for notifications.

The README shows a complete service.
"""

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import HTTPConnection
from starlette.routing import Route

from lianlian_async.notifications import NotificationEndpoint
from lianlian_async.session import RefundSession

from .web import apply_shielded, lifespan, refund_error

__all__ = ["Session", "apply_shielded", "get_session", "lifespan", "notifications", "refund_error"]


async def get_session(connection: HTTPConnection) -> RefundSession:  # async: else FastAPI would need a thread for it
    """Return the application's session. Raises ``RuntimeError`` if its lifespans opened none, or several."""
    sessions = {each for each in connection.scope.get("state", {}).values() if isinstance(each, RefundSession)}
    if len(sessions) != 1:
        raise RuntimeError(
            "exactly one RefundSession must be open: pass it to FastAPI(lifespan=lifespan(...)); the server or a test "
            "client must run the lifespan (for httpx.ASGITransport, which does not, see lianlian_async.testing); with "
            "several sessions, such as one for each merchant, use a dependency of your own"
        )
    return sessions.pop()


Session = Annotated[RefundSession, Depends(get_session)]
"""Type of a parameter that receives the application's session."""


def notifications(endpoint: NotificationEndpoint, path: str) -> APIRouter:
    """Return a router with ``endpoint`` at ``path``, left out of the OpenAPI schema, as only LianLian calls it."""
    return APIRouter(routes=[Route(path, endpoint, include_in_schema=False)])
