"""The HTTP stack below a session's own client: httpx's, or aiohttp's where it is asked for (extra ``fast``)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import anyio.to_thread
import httpx

from lianlian_async.background import asyncio_loop
from lianlian_async.errors import ConfigurationError

from .environment import has_proxies, proxy_for, trusting_context
from .pool import KEEPALIVE_SECONDS, PoolTransport

__all__ = ["HttpBackend", "check_http", "http_backend", "own_client"]

HttpBackend: TypeAlias = Literal["httpx", "aiohttp"]

_OLDEST_AIOHTTP: Final = (3, 14)  # the first that ends an answer whose headers have no end


def http_backend(wanted: str | None = None) -> HttpBackend:
    """Return what carries the requests: ``wanted``, or else ``LIANLIAN_HTTP_BACKEND``, or else ``httpx``.

    Never what merely is installed: mocks and tracing of httpx would be passed by. ``aiohttp`` (extra ``fast``) takes
    a fraction of the CPU time. It needs asyncio and uses no proxy: on trio, and behind a proxy, httpx takes its place.
    """
    name = "LIANLIAN_HTTP_BACKEND" if wanted is None else "http_backend"
    match os.environ.get(name) or "httpx" if wanted is None else wanted:
        case "httpx":
            return "httpx"
        case "aiohttp" if _has_aiohttp():
            return "aiohttp"
        case "aiohttp":
            raise ConfigurationError(f"{name}: aiohttp needs pip install 'lianlian-async[fast]'")
        case other:
            raise ConfigurationError(f"{name}: must be httpx or aiohttp, is {other!r}")


def check_http(client: object, transport: object, backend: str | None) -> None:
    """Raise ``ConfigurationError`` unless at most one is given (not None), and that one is what it should be."""
    if [client, transport, backend].count(None) < 2:
        raise ConfigurationError("client, transport and http_backend: give one of them, each one replaces the others")
    for name, given, kind in (
        ("client", client, httpx.AsyncClient),
        ("transport", transport, httpx.AsyncBaseTransport),
    ):
        if given is not None and not isinstance(given, kind):
            what = given if isinstance(given, type) else type(given)
            raise ConfigurationError(
                f"{name}: must be an httpx.{kind.__name__} object, is {what.__module__}.{what.__qualname__}"
            )
    http_backend(backend)


def _has_aiohttp() -> bool:
    import importlib.metadata  # some milliseconds that a program which opens no session need not pay

    try:
        installed = importlib.metadata.version("aiohttp")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall("[0-9]+", installed)[:2])) >= _OLDEST_AIOHTTP


class _NoCookies(httpx.Cookies):
    """Keeps none: looking for cookies costs as much as all the rest that a client does for a request."""

    def extract_cookies(self, response: httpx.Response) -> None:
        """Leave them where they are."""


class _Client(httpx.AsyncClient):
    """A client that carries requests, and nothing from one to the next."""

    _none = _NoCookies()

    @property  # type: ignore[misc] # without a setter: this client never leaves the session, and nobody sets any
    def cookies(self) -> httpx.Cookies:
        """None, ever."""
        return self._none


async def own_client(
    transport: httpx.AsyncBaseTransport | None, max_connections: int, backend: HttpBackend | None, urls: Sequence[str]
) -> httpx.AsyncClient:
    """Return a client on ``transport``, or on one of ours for ``urls``; made in a thread, since it reads the CA bundle.

    Raises ``ConfigurationError`` where our own transport cannot be made as the environment wants it.
    """
    on_asyncio = asyncio_loop() is not None

    def make() -> httpx.AsyncClient:
        return _Client(transport=transport or _own_transport(max_connections, http_backend(backend), urls, on_asyncio))

    return await anyio.to_thread.run_sync(make)


def _own_transport(
    max_connections: int, backend: HttpBackend, urls: Sequence[str], on_asyncio: bool
) -> httpx.AsyncBaseTransport:
    proxies = [proxy_for(httpx.URL(url)) for url in urls]
    if backend == "httpx" or not on_asyncio or (any(proxies) if urls else has_proxies()):
        return PoolTransport(max_connections)
    from .aiohttp import AiohttpTransport  # only who has the extra can import it

    return AiohttpTransport(max_connections, ssl_context=trusting_context(), keepalive_expiry=KEEPALIVE_SECONDS)
