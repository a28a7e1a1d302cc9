"""What the environment says about our own connections: whom TLS trusts, and which proxy leads to a URL."""

from __future__ import annotations

import ipaddress
import os
import ssl
from pathlib import Path
from typing import Final
from urllib.request import getproxies, proxy_bypass_environment  # type: ignore[attr-defined]

import httpx

from lianlian_async.errors import ConfigurationError

__all__ = ["has_proxies", "proxy_for", "trusting_context"]

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


def trusting_context() -> ssl.SSLContext:
    """Return a TLS context that trusts ``SSL_CERT_FILE``, ``SSL_CERT_DIR`` or certifi's CAs; reads files.

    Raises ``ConfigurationError`` where these cannot be read.
    """
    name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "")
    path = os.environ.get(name, "")
    try:
        if name == "SSL_CERT_DIR" and not any(Path(part).is_dir() for part in path.split(os.pathsep)):
            raise NotADirectoryError("no such directory")  # OpenSSL would only trust nobody
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        source = f"{name}={path}" if name else "certifi's CA bundle"
        cure = f"let {name} name CA certificates in PEM, or unset it" if name else "reinstall the package certifi"
        reason = error.strerror or str(error)
        raise ConfigurationError(f"{source}: no CA certificates can be read there ({reason}): {cure}") from error


def has_proxies() -> bool:
    """Whether the environment names a proxy for any URL."""
    return any(getproxies().get(scheme) for scheme in ("http", "https", "all"))


def proxy_for(url: httpx.URL) -> httpx.Proxy | None:
    """Return the proxy that leads to ``url``; None: it is reached directly.

    Reads ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``ALL_PROXY`` as httpx does; ``NO_PROXY`` names hosts, domains,
    ``host:port``, addresses and networks. Raises ``ConfigurationError`` if this proxy cannot be used.
    """
    environment = getproxies()
    scheme = url.scheme if environment.get(url.scheme) else "all"
    address = environment.get(scheme)
    if not address or _is_direct(url, environment):
        return None
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
        httpx.AsyncHTTPTransport(verify=False, proxy=proxy)  # only to see whether it can be made
    except (ImportError, ValueError, httpx.InvalidURL):
        # The text of a proxy's URL may hold a password: it is not shown.
        raise ConfigurationError(
            f"{scheme.upper()}_PROXY: must be the URL of an http, https or (with httpx[socks]) socks5 proxy; "
            f"or name {url.host} in NO_PROXY to reach it directly"
        ) from None
    return proxy


def _is_direct(url: httpx.URL, environment: dict[str, str]) -> bool:
    if proxy_bypass_environment(f"{url.host}:{url.port or _DEFAULT_PORTS.get(url.scheme)}", environment):
        return True
    return any(_is_in_network(url.host, entry.strip(" []")) for entry in environment.get("no", "").split(","))


def _is_in_network(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:  # a name
        return False
