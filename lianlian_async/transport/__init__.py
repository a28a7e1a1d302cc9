"""One HTTP exchange at a time over a shared ``httpx.AsyncClient``; the only importer of httpx."""

from .http import AsyncBaseTransport, AsyncClient, Transport, asgi_transport
from .own import HttpBackend, check_http, http_backend
from .pool import PoolTransport

__all__ = [
    "AsyncBaseTransport",
    "AsyncClient",
    "HttpBackend",
    "PoolTransport",
    "Transport",
    "asgi_transport",
    "check_http",
    "http_backend",
]
