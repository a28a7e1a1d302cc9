"""A request that knows whether it may have been sent, whatever exception was raised."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import httpx


class LeaseEndedError(Exception):
    """The lease ended before the request was sent; nothing was sent."""


class Body(httpx.ByteStream):
    """A request's body: it counts its sends, and is sent only while the lease holds.

    A caller's client may have its own layers, such as a transport that retries or a hook that calls another server:
    after a first send, their exceptions look as if nothing had been sent.
    """

    def __init__(self, content: bytes, lease_holds: Callable[[], bool]) -> None:
        super().__init__(content)
        self.content = content
        self.sends = 0
        """How often the body was read in order to send it."""
        self._lease_holds = lease_holds

    def check_lease(self) -> None:
        """Raise ``LeaseEndedError`` if another worker may hold the refund now."""
        if not self._lease_holds():
            raise LeaseEndedError("the lease ended before the request was sent: another worker may hold this refund")

    async def trace(self, event: str, _info: Mapping[str, Any]) -> None:
        """Check the lease before httpcore writes the head; httpcore reads the body afterwards."""
        if event.endswith(".send_request_headers.started"):
            self.check_lease()

    def __iter__(self) -> Iterator[bytes]:
        self.check_lease()
        self.sends += 1
        return super().__iter__()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _AsyncIterator(iter(self))

    def was_not_sent(self) -> None:
        """Take back the last send: no byte was written."""
        self.sends -= 1


class _AsyncIterator(AsyncIterator[bytes]):
    """Not a generator: trio's garbage collector would have to finish one that is cancelled during a send."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


class TrackedRequest(httpx.Request):
    """A POST request that notices when its :class:`Body` or its whole content is read.

    Adapters of other HTTP clients, and layers that copy or inspect a request, read the content as a whole.
    """

    def __init__(self, url: httpx.URL, headers: httpx.Headers, body: Body, **extensions: Any) -> None:
        super().__init__("POST", url, headers=headers, stream=body, extensions={**extensions, "trace": body.trace})
        self._body = body
        self._content_was_read = False

    @property
    def content(self) -> bytes:
        """The body as bytes."""
        self._content_was_read = True
        return self._body.content

    def read(self) -> bytes:
        """Return the body as bytes."""
        return self.content

    async def aread(self) -> bytes:
        """Return the body as bytes."""
        return self.content

    def may_have_been_sent(self, error: BaseException) -> bool:
        """Return whether the request may have been sent, although ``error`` is of a kind that precedes the first byte.

        If a layer read the content, such an error is believed only without a cause or context. With one, the layer may
        have sent a copy before, or misreport its client's error, as httpx-aiohttp does for a connection that broke
        after the request. A layer that only inspects, such as the handler of a mocked transport, raises without one.
        """
        chained = error.__cause__ is not None or error.__context__ is not None
        return self._body.sends > 0 or (self._content_was_read and chained)
