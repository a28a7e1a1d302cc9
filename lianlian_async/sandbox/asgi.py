"""The messages of ASGI 3: a request's body and headers in, a response out, whole or broken off."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

from lianlian_async import wire

from .answers import Response

__all__ = ["Message", "Receive", "Send", "break_off", "header", "lifespan", "read", "respond"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


async def lifespan(receive: Receive, send: Send) -> None:
    """Follow a server from start to end: there is nothing to prepare and nothing to put away."""
    for event in ("lifespan.startup", "lifespan.shutdown"):
        await receive()
        await send({"type": f"{event}.complete"})


def header(scope: Mapping[str, Any], name: bytes) -> str:
    """The value of a header (its name in lower case), empty if it was not sent."""
    value: bytes = dict(scope["headers"]).get(name, b"")
    return value.decode("latin-1")


async def read(receive: Receive) -> bytes:
    """The body, as far as it came; of one that is too big just enough to see that it is."""
    body, more = b"", True
    while more:
        message = await receive()
        body = (body + message.get("body", b""))[: wire.MAX_MESSAGE_BYTES + 1]
        more = message.get("more_body", False)
    return body


async def _start(send: Send, response: Response) -> None:
    headers = {**response.headers, "content-length": str(len(response.body))}
    await send(
        {
            "type": "http.response.start",
            "status": response.status,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )


async def respond(send: Send, response: Response) -> None:
    """Send a response."""
    await _start(send, response)
    await send({"type": "http.response.body", "body": response.body})


async def break_off(send: Send, response: Response) -> None:
    """Half of a response, and an error: a server closes the connection on it; in process it is the error itself."""
    await _start(send, response)
    await send({"type": "http.response.body", "body": response.body[: len(response.body) // 2], "more_body": True})
    raise ConnectionResetError("the sandbox broke the connection")
