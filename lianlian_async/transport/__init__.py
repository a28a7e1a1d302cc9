"""HTTP exchanges over a shared ``httpx.AsyncClient``; the only package that imports httpx.

The lease is checked right before bytes leave, and the connection of a given-up request is reset. What remains:

- A process that is stopped between this check and the write sends when it continues, even if the lease has ended. Only
  a few instructions are between the two, and none of them waits.
- The network may deliver bytes later that have left the machine; no reset calls them back.
- A caller's client or transport that is not built on httpcore is checked only before it is called and when it reads the
  body; it may not reset connections.
"""

from .own_transport import HttpBackend, check_http, http_backend
from .pool import PoolTransport
from .sender import AsyncBaseTransport, AsyncClient, HttpSender, asgi_transport

__all__ = [
    "AsyncBaseTransport",
    "AsyncClient",
    "HttpBackend",
    "HttpSender",
    "PoolTransport",
    "asgi_transport",
    "check_http",
    "http_backend",
]
