"""Check a caller's client or transport (httpx, httpx2), or create the library's own transport (httpx or aiohttp)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import httpx

from lianlian_async.errors import ConfigurationError

from .connection import proxy_for
from .pool import PoolTransport

if TYPE_CHECKING:
    import httpx2

AsyncClient: TypeAlias = "httpx.AsyncClient | httpx2.AsyncClient"
AsyncBaseTransport: TypeAlias = "httpx.AsyncBaseTransport | httpx2.AsyncBaseTransport"
HttpBackend: TypeAlias = Literal["httpx", "aiohttp"]

# aiohttp limits the number of response headers from 3.13.4 on.
_OLDEST_AIOHTTP: Final = (3, 14)


def http_backend(wanted: str | None = None) -> HttpBackend:
    """Return the HTTP backend: ``wanted``, or else ``LIANLIAN_HTTP_BACKEND``, or else ``httpx``.

    aiohttp is never selected just because it is installed: httpx mocks and tracing would not see its requests.
    ``aiohttp`` (extra ``fast``) uses a fraction of the CPU time. On trio, and behind a proxy, httpx still sends.
    """
    name = "LIANLIAN_HTTP_BACKEND" if wanted is None else "http_backend"
    match (os.environ.get(name) or "httpx") if wanted is None else wanted:
        case "httpx":
            return "httpx"
        case "aiohttp" if _has_aiohttp():
            return "aiohttp"
        case "aiohttp":
            raise ConfigurationError(f"{name}: aiohttp needs pip install 'lianlian-async[fast]'")
        case other:
            raise ConfigurationError(f"{name}: must be httpx or aiohttp, is {other!r}")


def check_http(client: object, transport: object, backend: str | None) -> None:
    """Raise ``ConfigurationError`` if more than one argument is given, or if one has the wrong type or value."""
    if [client, transport, backend].count(None) < 2:
        raise ConfigurationError("client, transport and http_backend: give only one of them")
    for name, given, kind in (("client", client, "AsyncClient"), ("transport", transport, "AsyncBaseTransport")):
        if given is not None and library_of(given, kind) is None:
            what = given if isinstance(given, type) else type(given)
            raise ConfigurationError(
                f"{name}: must be an httpx.{kind} or httpx2.{kind} object, is {what.__module__}.{what.__qualname__}"
            )
    http_backend(backend)


def library_of(given: object, *kinds: str) -> Any:
    """Return the library, httpx or httpx2, if ``given`` is an instance of one of its classes ``kinds``, else None."""
    for library in (httpx, sys.modules.get("httpx2")):  # if httpx2 is not imported, it has no objects
        for kind in kinds or ("AsyncClient", "AsyncBaseTransport"):
            if library is not None and isinstance(given, getattr(library, kind)):
                return library
    return None


@cache
def _has_aiohttp() -> bool:
    import importlib.metadata  # takes milliseconds, and few programs need it

    try:
        installed = importlib.metadata.version("aiohttp")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(map(int, re.findall("[0-9]+", installed)[:2])) >= _OLDEST_AIOHTTP


def own_transport(
    max_connections: int, backend: HttpBackend | None, urls: Sequence[str], *, on_asyncio: bool
) -> AsyncBaseTransport:
    """Return the library's own transport for ``urls``. Call it in a thread: it reads CA files and imports modules.

    Raises ``ConfigurationError`` if ``backend`` or an environment variable has an unusable value.
    """
    chosen = http_backend(backend)
    proxies = [proxy_for(httpx.URL(url)) for url in urls]  # a list: it checks all of them
    if chosen == "httpx" or not on_asyncio or any(proxies):
        import httpcore  # noqa: F401 - httpx imports it for the first connection, on the event loop

        return PoolTransport(max_connections)
    from .aiohttp import AiohttpTransport  # requires the extra

    return AiohttpTransport(max_connections)
