"""HTTP exchanges over httpx, httpx2 or aiohttp; only this package imports httpx, httpx2 and aiohttp's client.

The lease is checked right before the request is written to the socket. The library's own transports reset the
connection of a cancelled or timed-out request. Three risks remain:

- If the process is suspended between this check and the write, it sends the request when it resumes, even if the lease
  has ended. Only a few instructions separate the check from the write, and none of them waits.
- The network may delay bytes that have left the machine; a reset cannot recall them.
- A caller's client or transport might not reset the connection of a cancelled request. If it is not built on httpcore,
  the lease is checked only before the call and when the body is read, and a layer that repeats requests is not stopped.
  A layer that sends copies without the request's extensions is not stopped either.
"""

from .own_transport import AsyncBaseTransport, AsyncClient, HttpBackend, check_http, http_backend
from .pool import PoolTransport
from .sender import HttpSender, asgi_transport, probe_server

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
