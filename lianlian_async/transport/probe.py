"""Connect to a server without sending a refund or a query; report the proxy, the certificate and the server's clock."""

import ssl
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Final

import anyio
import anyio.to_thread
import httpx

from lianlian_async.clock import parse_http_date, system_clock
from lianlian_async.errors import GatewayUnavailable

from .connection import proxy_for, trace_loopback
from .pool import PoolTransport
from .sender import describe

_WAIT: Final = 10.0


async def probe_server(url: str) -> tuple[str | None, float | None, str, datetime | None]:
    """Send a HEAD request to ``url`` over a new connection of :class:`PoolTransport`, within 10 seconds.

    Return: the proxy's URL without credentials (None: direct); by how many seconds this machine's wall clock is ahead
    of the server's (None: no usable ``Date``); the certificate's issuer and expiry (empty and None: no TLS).
    Raises ``GatewayUnavailable``, or ``ConfigurationError`` if the proxy or the CA certificates are unusable.
    """
    proxy = proxy_for(httpx.URL(url))
    trace = partial(trace_loopback, httpx.URL(url))
    request = httpx.Request("HEAD", url, extensions={"timeout": httpx.Timeout(_WAIT).as_dict(), "trace": trace})
    async with await anyio.to_thread.run_sync(PoolTransport, 1) as transport:  # in a thread: reads the CA files
        try:
            with anyio.fail_after(_WAIT):
                response = await transport.handle_async_request(request)
                tls = response.extensions["network_stream"].get_extra_info("ssl_object")
                certificate = None if tls is None else tls.getpeercert()
                await response.aread()
        except (httpx.TransportError, TimeoutError) as error:
            reason = describe(error, url, _WAIT)
            raise GatewayUnavailable(reason, attempts=1, last_error=reason, ret_code=None) from error
    date, issuer, expires_at = parse_http_date(response.headers.get("date", "")), "", None
    if certificate is not None:
        names = dict(chain.from_iterable(certificate["issuer"]))
        issuer = names.get("organizationName") or names.get("commonName", "")
        expires_at = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
    ahead = None if date is None else (system_clock().wall - date).total_seconds()
    return None if proxy is None else str(proxy.url), ahead, issuer, expires_at
