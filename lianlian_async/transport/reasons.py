"""Why a request got no answer, in words for the person who reads the log: what happened, and with which host."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from itertools import islice

import httpx

__all__ = ["describe"]


def describe(error: BaseException, url: str, connect_seconds: float) -> str:
    """Return the type of ``error`` and what happened; an error's notes follow, such as the proxy's name."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {_told(error, url, connect_seconds)}".rstrip(": ") + notes


def _told(error: BaseException, url: str, connect_seconds: float) -> str:
    chain = list(islice(_chain(error), 20))
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2]  # never a password
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection to {host} within {connect_seconds:g} s"
    # Subclasses in aiohttp lack the attributes of what they were raised from.
    tls = next((each for each in chain if isinstance(each, ssl.SSLError) and type(each).__module__ == "ssl"), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        why = getattr(tls, "verify_message", tls)
        return f"TLS: the certificate of {host} is not trusted: {why} (CERTIFICATE_VERIFY_FAILED)"
    if "_ALERT_" in str(tls):
        return f"TLS: {host} refused the handshake ({tls}); it may want a client certificate"
    if (
        url.startswith("https:")
        and isinstance(error, httpx.ConnectError)
        and (isinstance(tls, ssl.SSLEOFError) or any(isinstance(each, ConnectionResetError) for each in chain))
    ):
        return f"the TLS handshake with {host} failed: the connection was closed or reset"
    if tls is not None:
        return f"the TLS handshake with {host} failed: {tls}"
    if not isinstance(error, httpx.TransportError):
        return next((str(each) for each in chain if str(each)), "")
    # Further down stand words about the insides of httpcore, anyio and trio, such as "pop from an empty deque".
    told = next((str(each) for each in chain if isinstance(each, (httpx.TransportError, OSError)) and str(each)), "")
    return told or f"the connection to {host} broke"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
