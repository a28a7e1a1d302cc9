"""The HTTP stack below a session's own client: httpx's, or aiohttp's where that is installed (extra ``fast``)."""

from __future__ import annotations

import os
import re
from typing import Final
from urllib.request import getproxies

import anyio.to_thread
import httpx

from lianlian_async.errors import ConfigurationError
from lianlian_async.event_loop import asyncio_loop

from .pool import KEEPALIVE_SECONDS, PoolTransport, environment_proxies

__all__ = ["http_backend", "own_client"]

_OLDEST_AIOHTTP: Final = (3, 14)  # the first that ends an answer whose headers have no end


def http_backend() -> str:
    """What carries the requests: ``httpx``, or ``aiohttp`` with the extra ``fast``, at a fraction of the CPU time.

    aiohttp is taken where it is installed; the environment variable ``LIANLIAN_HTTP_BACKEND`` can choose.
    It needs asyncio, and knows the proxies of the environment less well: on trio, and behind a proxy, it is httpx.
    """
    match os.environ.get("LIANLIAN_HTTP_BACKEND", ""):
        case "":
            return "aiohttp" if _has_aiohttp() else "httpx"
        case "httpx":
            return "httpx"
        case "aiohttp" if _has_aiohttp():
            return "aiohttp"
        case "aiohttp":
            raise ConfigurationError("LIANLIAN_HTTP_BACKEND: aiohttp needs pip install 'lianlian-async[fast]'")
        case other:
            raise ConfigurationError(f"LIANLIAN_HTTP_BACKEND: must be httpx or aiohttp, is {other!r}")


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


async def own_client(transport: httpx.AsyncBaseTransport | None, max_connections: int) -> httpx.AsyncClient:
    """A client on ``transport``, or on one of ours; made in a thread, since it reads the CA bundle."""
    on_asyncio = asyncio_loop() is not None

    def make() -> httpx.AsyncClient:
        return _Client(transport=transport or _own_transport(max_connections, on_asyncio=on_asyncio))

    return await anyio.to_thread.run_sync(make)


def _own_transport(max_connections: int, *, on_asyncio: bool) -> httpx.AsyncBaseTransport:
    if http_backend() == "httpx" or not on_asyncio or environment_proxies(getproxies()):
        return PoolTransport(max_connections)
    from .aiohttp import AiohttpTransport  # only who has the extra can import it

    return AiohttpTransport(max_connections, ssl_context=httpx.create_ssl_context(), keepalive_expiry=KEEPALIVE_SECONDS)
