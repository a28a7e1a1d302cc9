"""HTTP exchanges over a client or transport of httpx or httpx2; only this package imports them and aiohttp's client.

The lease is checked right before the request is written to the socket. The connection of a cancelled or timed-out
request is reset. Three risks remain:

- If the process is suspended between this check and the write, it sends when it resumes, even if the lease has ended.
  Only a few instructions separate the two, and none of them waits.
- The network may delay bytes that have left the machine; a reset cannot recall them.
- For a caller's client or transport that is not built on httpcore, the lease is checked only before the call and when
  the body is read. Such a client may not reset connections.
"""

from .own_transport import AsyncBaseTransport, AsyncClient, HttpBackend, check_http, http_backend
from .pool import PoolTransport
from .probe import probe_server
from .sender import HttpSender, asgi_transport

__all__ = [
    "AsyncBaseTransport",
    "AsyncClient",
    "HttpBackend",
    "HttpSender",
    "PoolTransport",
    "asgi_transport",
    "check_http",
    "http_backend",
    "probe_server",
]
