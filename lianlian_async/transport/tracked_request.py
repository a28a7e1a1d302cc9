"""A request of which one knows afterwards whether it may have been sent, whatever was raised."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import httpx

__all__ = ["Body", "LeaseEndedError", "WatchedRequest"]


class LeaseEndedError(Exception):
    """The lease ended before the request was sent; nothing was sent."""


class Body(httpx.ByteStream):
    """A request's body that knows whether anybody has begun to send it, and that is sent only while its lease holds.

    A given client may have layers of its own, such as a transport that retries or a hook that calls another
    server: what they raise after a first send looks as if nothing had been sent.
    """

    def __init__(self, content: bytes, lease_holds: Callable[[], bool]) -> None:
        super().__init__(content)
        self.content = content
        self.lease_holds = lease_holds
        self.sends = 0
        """How often somebody took it to send it, and may have."""

    def check_lease(self) -> None:
        """Raise ``LeaseEndedError`` if another worker may hold the refund by now."""
        if not self.lease_holds():
            raise LeaseEndedError("the lease ended before the request was sent: another worker may hold this refund")

    async def trace(self, event: str, _info: Mapping[str, Any]) -> None:
        """Check the lease before httpcore writes the head; it takes the body after that."""
        if event.endswith(".send_request_headers.started"):
            self.check_lease()

    def __iter__(self) -> Iterator[bytes]:
        self.check_lease()
        self.sends += 1
        return super().__iter__()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _AsyncIterator(iter(self))

    def was_not_sent(self) -> None:
        """Who took it last has written no byte of it."""
        self.sends -= 1


class _AsyncIterator(AsyncIterator[bytes]):
    """Not a generator: one that is cancelled while it sends would be left to trio's garbage collector."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


class WatchedRequest(httpx.Request):
    """A POST request that is sent by iterating over its :class:`Body`; whoever takes its content is noticed, too.

    Adapters of other HTTP clients take it as a whole, and so do layers that copy it or only look.
    """

    def __init__(self, url: httpx.URL, headers: httpx.Headers, body: Body, **extensions: Any) -> None:
        super().__init__("POST", url, headers=headers, stream=body, extensions={**extensions, "trace": body.trace})
        self._body = body
        self._taken = False

    @property
    def content(self) -> bytes:
        """What a request's content always is; reading it is remembered."""
        self._taken = True
        return self._body.content

    def read(self) -> bytes:
        """The same."""
        return self.content

    async def aread(self) -> bytes:
        """The same."""
        return self.content

    def may_have_been_sent(self, error: Exception) -> bool:
        """Whether it may have been, though ``error`` is of a kind that is raised before the first byte is written.

        Where a layer has taken the content, such an error is believed only if no other stands behind it: the layer may
        have sent a copy before, or be wrong about its own client's errors, as httpx-aiohttp is, which calls a
        connection that broke after the request one that was never made. Bare ones are raised by who only looks, such
        as a mocked transport's handler.
        """
        chained = error.__cause__ is not None or error.__context__ is not None
        return self._body.sends > 0 or (self._taken and chained)
