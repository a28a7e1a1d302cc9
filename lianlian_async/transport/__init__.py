"""One HTTP exchange at a time over a shared ``httpx.AsyncClient``; the only importer of httpx.

What remains, although the lease is checked right before bytes leave and a connection that is given up is reset:

- A process that is stopped between this check and the write sends when it goes on, even if the lease has ended
  meanwhile. Only a few instructions separate the two, and nothing waits there.
- Bytes that have left the machine may be delivered later by the network, which no reset calls back.
- A client or transport of the caller's that is not built on httpcore is checked only before it is called and when it
  takes the body; whether it resets connections is its own affair.
"""

from .default_client import HttpBackend, check_http, http_backend
from .pool import PoolTransport
from .sender import AsyncBaseTransport, AsyncClient, Transport, asgi_transport

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
