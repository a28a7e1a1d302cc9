"""A request that knows whether anybody has taken its body, to send it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

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
    """A request whose bytes come out of its :class:`Body` only, which notices.

    One that is made with its content keeps a second copy, and adapters of other HTTP clients send that.
    """

    @property
    def content(self) -> bytes:
        """The body, read: from now on it may have been sent."""
        return self.read()
