"""One HTTP exchange at a time over a shared ``httpx.AsyncClient``; the only importer of httpx."""

from .http import AsyncBaseTransport, AsyncClient, Transport, asgi_transport
from .own import http_backend
from .pool import PoolTransport

__all__ = ["AsyncBaseTransport", "AsyncClient", "PoolTransport", "Transport", "asgi_transport", "http_backend"]
