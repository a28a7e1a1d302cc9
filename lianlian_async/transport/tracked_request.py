"""A request of httpx or httpx2 that records whether it may have been sent, and refuses a second send after that."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from httpx import URL, ByteStream, Headers, Request
else:  # request_classes adds the base class of httpx or httpx2
    ByteStream = Request = object

from .connection import trace_loopback


class SendRefusedError(Exception):
    """The lease has ended, an earlier write of this request may have arrived, or its connection is unusable."""


class Body(ByteStream):
    """A request body that counts its iterations, and refuses them after the lease has ended.

    A caller's client may have additional layers, such as a transport that retries or a hook that calls another server.
    After a first send, such a layer may raise an exception that claims that nothing was sent.
    """

    def __init__(self, content: bytes, lease_holds: Callable[[], bool]) -> None:
        super().__init__(content)
        self.content = content
        self.sends = 0
        """How often the body was read for sending."""
        self.is_written = False
        """Whether httpcore has begun to write the request, and the server may have processed it."""
        self.lease_holds = lease_holds

    def check_lease(self) -> None:
        """Raise ``SendRefusedError`` if the lease has ended."""
        if not self.lease_holds():
            raise SendRefusedError("the lease ended before the request was sent: another worker may have taken it")

    async def trace(self, url: URL, event: str, info: Mapping[str, Any]) -> None:
        """Check the host before httpcore connects; before it writes the head, check that it may be sent.

        A second head comes from a layer of the caller's client that repeats requests, such as ``DigestAuth``.
        """
        if event.endswith(".send_request_headers.started"):
            self.check_lease()
            if info["request"].method != b"CONNECT":  # that one goes to a proxy
                if self.is_written:
                    raise SendRefusedError("the client tried to send a request again that may have arrived")
                self.is_written = True
        elif type(info.get("exception")).__name__ == "ConnectionNotAvailable":
            self.is_written = False  # an HTTP/2 server did not process it (RFC 9113 §6.8): httpcore sends it again
        else:
            await trace_loopback(url, event, info)

    def __iter__(self) -> Iterator[bytes]:
        self.check_lease()
        self.sends += 1
        return super().__iter__()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _AsyncIterator(iter(self))


class _AsyncIterator(AsyncIterator[bytes]):
    """An iterator that needs no cleanup: a cancelled send would not close a generator, and trio would warn of it."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    async def __anext__(self) -> bytes:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


class TrackedRequest(Request):
    """A POST request that records whether its :class:`Body` or its whole content was read.

    Adapters for other HTTP clients, and layers that copy or inspect a request, read the whole content.
    """

    def __init__(self, url: URL, headers: Headers, body: Body, **extensions: Any) -> None:
        extensions["trace"] = partial(body.trace, url)  # not a method of this object: a cycle would delay its release
        super().__init__("POST", url, headers=headers, stream=body, extensions=extensions)
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

    @property
    def is_unread(self) -> bool:
        """Whether the body was never read: at most the head of the request was sent."""
        return not self._body.sends and not self._content_was_read

    def may_have_been_sent(self, error: BaseException) -> bool:
        """Return whether the request may have been sent, although the type of ``error`` says that it was not.

        If a layer read the whole content, ``error`` is believed only if it has neither a cause nor a context. An error
        with a cause may come from a layer that sent a copy before, or from an adapter that translates another client's
        error wrongly, as httpx-aiohttp does if the connection breaks after the request. A layer that only inspects the
        content, such as the handler of a mock transport, raises errors without a cause.
        """
        chained = error.__cause__ is not None or error.__context__ is not None
        return self._body.sends > 0 or (self._content_was_read and chained)


@cache
def request_classes(library: Any) -> tuple[type[TrackedRequest], type[Body]]:
    """Return the classes of requests and bodies for ``library``, the module httpx or httpx2."""
    return (type("TrackedRequest", (TrackedRequest, library.Request), {}), type("Body", (Body, library.ByteStream), {}))
