"""A request of which one knows afterwards whether it may have been sent, whatever was raised."""

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
        self.sends = 0
        """How often somebody took it to send it, and may have."""

    def __iter__(self) -> Iterator[bytes]:
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
        super().__init__("POST", url, headers=headers, stream=body, extensions=extensions)
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
