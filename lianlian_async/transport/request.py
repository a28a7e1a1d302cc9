"""A request that knows whether anybody has taken its body, to send it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

__all__ = ["Body", "WatchedRequest"]


class Body(httpx.ByteStream):
    """A request's body that knows whether anybody has begun to send it.

    A given client may have layers of its own, such as a transport that retries or a hook that calls another
    server: what they raise after a first send looks as if nothing had been sent.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.content = content
        """For a transport that can tell by itself whether it was sent."""
        self.begun = False

    def __iter__(self) -> Iterator[bytes]:
        self.begun = True
        return super().__iter__()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _AsyncIterator(iter(self))


class _AsyncIterator(AsyncIterator[bytes]):
    """Not a generator: one that is cancelled while it sends would be left to trio's garbage collector."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


class WatchedRequest(httpx.Request):
    """A request of which one knows afterwards whether it may have been sent, whatever was raised.

    To send it means to iterate over its :class:`Body`. Adapters of other HTTP clients take that as a whole, though,
    and so do layers that only look: by itself it says nothing.
    """

    def __init__(
        self, url: httpx.URL, headers: httpx.Headers | list[tuple[bytes, bytes]], body: Body, **extensions: Any
    ) -> None:
        super().__init__("POST", url, headers=headers, stream=body, extensions=extensions)
        self._body = body
        self._taken = False

    @property
    def content(self) -> bytes:
        """The body as a whole."""
        self._taken = True
        return self._body.content

    def read(self) -> bytes:
        """The body as a whole."""
        return self.content

    async def aread(self) -> bytes:
        """The body as a whole."""
        return self.content

    def may_have_been_sent(self, error: Exception) -> bool:
        """Whether it may have been, though ``error`` is one that is raised before the first byte is written.

        An adapter need not know which exceptions of its client mean that: httpx-aiohttp calls a connection that
        broke after the request one that was never made.
        """
        foreign = error.__cause__ is not None and type(error.__cause__).__module__.partition(".")[0] != "httpcore"
        return self._body.begun or (self._taken and foreign)
