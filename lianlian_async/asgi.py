"""The messages of ASGI 3, as far as an application needs them that takes small requests and answers them whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

__all__ = ["Message", "Receive", "Send", "headers", "lifespan", "read", "respond", "start"]

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


async def lifespan(receive: Receive, send: Send, context: AbstractAsyncContextManager[object]) -> None:
    """Follow a server from start to end, inside of ``context``; the server is told if that cannot be had."""
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
    """The headers by their names in lower case; those that came several times in one, as RFC 9110 §5.3 has it."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


async def read(receive: Receive, limit: int) -> bytes:
    """Return the body as far as it came, or the beginning of a longer one: more than ``limit`` bytes."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def start(send: Send, status: int, headers: Mapping[str, str], length: int) -> None:
    """Send the head of a response whose body has ``length`` bytes."""
    fields = {**headers, "content-length": str(length)}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )


async def respond(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Send a response."""
    await start(send, status, headers, len(body))
    await send({"type": "http.response.body", "body": body})
