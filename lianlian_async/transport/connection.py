"""TLS context, proxies, the loopback check for tests, and how a cancelled request resets its connection."""

import contextlib
import ipaddress
import os
import socket
import ssl
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.request import getproxies, proxy_bypass_environment  # type: ignore[attr-defined]

import httpx

from lianlian_async.errors import ConfigurationError
from lianlian_async.retry import LONGEST_ATTEMPT
from lianlian_async.settings import LOOPBACK_ONLY
from lianlian_async.text_rules import is_loopback

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_LINGER: Final = struct.Struct("hh" if os.name == "nt" else "ii")
_CLOSE_NORMALLY: Final = (socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(0, 0))
_RESET_WHEN_CLOSED: Final = (
    (socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, 0)),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), int(1000 * LONGEST_ATTEMPT))
        for name in ("TCP_USER_TIMEOUT",)  # milliseconds until unacknowledged bytes end the connection
        if hasattr(socket, name)  # Linux only
    ),
)


def trusting_context() -> ssl.SSLContext:
    """Return a TLS context that trusts ``SSL_CERT_FILE``, ``SSL_CERT_DIR`` or certifi's CAs.

    Reads the CA files. Raises ``ConfigurationError`` if they cannot be read.
    """
    name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "")
    path = os.environ.get(name, "")
    try:
        if name == "SSL_CERT_DIR" and not any(Path(part).is_dir() for part in path.split(os.pathsep)):
            raise NotADirectoryError("no such directory")  # OpenSSL would report nothing and trust no CA
        if name == "SSL_CERT_FILE":
            Path(path).open("rb").close()  # httpx 0.27 would ignore a missing file and trust certifi's CAs
        return httpx.create_ssl_context()
    except OSError as error:  # includes ssl.SSLError
        source = f"{name}={path}" if name else "certifi's CA bundle"
        cure = "reinstall the package certifi"
        if name:
            kind = "PEM file" if name == "SSL_CERT_FILE" else "directory"
            cure = f"set {name} to a {kind} of CA certificates, or unset it"
        reason = error.strerror or str(error)
        raise ConfigurationError(f"{source}: cannot read CA certificates ({reason}): {cure}") from error


def proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    """Return the proxy for ``url``, or None for a direct connection.

    Reads ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``ALL_PROXY`` as httpx does; ``NO_PROXY`` may contain hosts, domains,
    ``host:port``, addresses and networks. Raises ``ConfigurationError`` if the proxy is unusable.
    """
    environment = getproxies()
    scheme = url.scheme if environment.get(url.scheme) else "all"
    address = environment.get(scheme)
    if not address or _is_direct(url, environment):
        return None
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
        httpx.AsyncHTTPTransport(verify=False, proxy=proxy)  # raises if the proxy is unusable
        (proxy.url.port or 0).to_bytes(2, "big")  # the operating system has ports up to 65535
    except (ImportError, ValueError, OverflowError, httpx.InvalidURL):
        # The URL of a proxy may contain a password: do not show it.
        raise ConfigurationError(
            f"{scheme.upper()}_PROXY: must be the URL of an http, https or (with httpx[socks]) socks5 proxy; "
            f"or add {url.host} to NO_PROXY to connect directly"
        ) from None
    return proxy


def _is_direct(url: httpx.URL, environment: dict[str, str]) -> bool:
    if proxy_bypass_environment(f"{url.host}:{url.port or _DEFAULT_PORTS.get(url.scheme)}", environment):
        return True
    for entry in environment.get("no", "").split(","):
        with contextlib.suppress(ValueError):  # the entry or the host is a name
            if ipaddress.ip_address(url.host) in ipaddress.ip_network(entry.strip(" []"), strict=False):
                return True
    return False


def check_loopback(*hosts: str) -> None:
    """Raise ``ConfigurationError`` if a host is not loopback and ``LIANLIAN_LOOPBACK_ONLY`` is set.

    The pytest plugin sets it. Call this function right before a connection is opened.
    """
    for host in hosts:
        if os.environ.get(LOOPBACK_ONLY) and not is_loopback(host):
            raise ConfigurationError(
                f"this is a test, so no connection to {host} was opened and nothing was sent: use the fixture "
                "lianlian_session or a mocked transport. If the test needs the network, mark it with "
                "pytest.mark.lianlian_allow_network, or set lianlian_allow_network = true in pytest's configuration "
                f"({LOOPBACK_ONLY} is set)"
            )


async def trace_loopback(url: httpx.URL, event: str, info: Mapping[str, Any]) -> None:
    """Call :func:`check_loopback` for ``url`` and its proxy if httpcore's ``event`` is the start of a connect."""
    if event.endswith(".connect_tcp.started"):
        check_loopback(url.host, info["host"])


def reset_when_closed(sock: Any) -> None:
    """Set SO_LINGER to 0 s: when ``sock`` closes, even by process exit, the kernel drops unsent bytes and sends RST.

    On Linux, set TCP_USER_TIMEOUT, too. ``sock`` is a socket object of asyncio, uvloop or trio; ignore a closed socket.
    """
    with contextlib.suppress(OSError):
        for option in _RESET_WHEN_CLOSED:
            sock.setsockopt(*option)


def close_normally(sock: Any) -> None:
    """Disable SO_LINGER again, after the response has been read."""
    with contextlib.suppress(OSError):
        sock.setsockopt(*_CLOSE_NORMALLY)


def discard_if_bytes_follow(response: httpx.Response) -> None:
    """Do not reuse the connection if bytes follow ``response``: httpcore would read them as the next response.

    httpcore checks only the socket before it reuses a connection. Bytes that were already read are in h11's buffer,
    reachable only by private attributes; ``test_second_response_in_the_same_segment`` fails if their names change.
    """
    layer: Any = response.stream
    while layer is not None and not hasattr(layer, "_h11_state"):
        names = ("_stream", "_httpcore_stream", "_connection")
        layer = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    h11_state = getattr(layer, "_h11_state", None)
    if h11_state is not None and h11_state.trailing_data[0]:
        h11_state.send_failed()  # httpcore closes the connection after the response
