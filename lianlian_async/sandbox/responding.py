"""A response of the sandbox as messages of ASGI 3: whole, or broken off in the middle."""

from __future__ import annotations

from lianlian_async import asgi

from .answers import Response

__all__ = ["break_off", "respond"]


async def respond(send: asgi.Send, response: Response) -> None:
    """Send a response."""
    await asgi.respond(send, response.status, response.headers, response.body)


async def break_off(send: asgi.Send, response: Response) -> None:
    """Half of a response, and an error: a server closes the connection on it; in process it is the error itself."""
    await asgi.start(send, response.status, response.headers, len(response.body))
    await send({"type": "http.response.body", "body": response.body[: len(response.body) // 2], "more_body": True})
    raise ConnectionResetError("the sandbox broke the connection")
