"""Functions for ASGI 3 applications that read small requests and send each response body in one message."""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


async def lifespan(receive: Receive, send: Send, context: AbstractAsyncContextManager[object]) -> None:
    """Enter ``context`` at the server's startup and leave it at shutdown; report failures to the server."""
    phase = "startup"
    try:
        await receive()
        async with context:
            await send({"type": "lifespan.startup.complete"})
            phase = "shutdown"
            await receive()
    except BaseException as error:
        await send({"type": f"lifespan.{phase}.failed", "message": f"{type(error).__name__}: {error}"})
        raise
    await send({"type": "lifespan.shutdown.complete"})


def headers(scope: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers with lower-case names; commas join the values of a repeated header (RFC 9110 §5.3)."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


async def read(receive: Receive, limit: int) -> bytes:
    """Return the request's body; if it has more than ``limit`` bytes, return what was received until then."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def respond(send: Send, status: int, headers: Mapping[str, str], body: bytes, *, cut: bool = False) -> None:
    """Send a response; with ``cut`` only the first half of its body, as a fault of the sandbox."""
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    fields.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body[: len(body) // 2] if cut else body, "more_body": cut})
