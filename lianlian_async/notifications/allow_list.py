"""Decide whether a client address is allowed; X-Forwarded-For counts only behind trusted proxies."""

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self, TypeAlias

import attrs

from lianlian_async.errors import ConfigurationError, printable

Networks: TypeAlias = tuple[IPv4Network | IPv6Network, ...]

_UNIX: Final = "unix"
_ADDRESS: Final = re.compile(r'("?)(?:\[([^]]+)](?::[0-9]+)?|([0-9.]+):[0-9]+|([^"]+))\1')
"""The forms of an address in X-Forwarded-For: bare, with a port, in brackets, or quoted (RFC 7239 §6)."""


@attrs.frozen
class AllowList:
    """Allowed client networks, and the networks of trusted proxies."""

    allow_from: Networks
    trusted_proxies: Networks
    trusts_unix: bool
    """Whether every peer on a Unix socket is a trusted proxy."""

    @classmethod
    def read(cls, allow_from: Iterable[str], trusted_proxies: Iterable[str]) -> Self:
        """Parse networks such as ``203.0.113.0/24`` or ``2001:db8::7``; ``unix`` trusts every peer on a Unix socket.

        Raises ``ConfigurationError`` if a text is not a network.
        """
        proxies = list(trusted_proxies)
        networks = _networks("trusted_proxies", (text for text in proxies if text != _UNIX))
        return cls(_networks("allow_from", allow_from), networks, _UNIX in proxies)

    def judge(self, peer: str | None, forwarded_for: str) -> tuple[bool, str]:
        """Return whether the client is allowed, and its address for the log.

        ``peer`` is the address of the connection; None or empty on a Unix socket. ``forwarded_for`` is the header
        X-Forwarded-For: each proxy appends the address of its client. The client's address is the last one that does
        not belong to a trusted proxy; the addresses before it may be forged.
        """
        hops = forwarded_for.split(",") if forwarded_for else []
        if peer:
            hops.append(peer)
        elif not self.trusts_unix:
            return False, 'a peer without an IP address (for a proxy on a Unix socket, add "unix" to trusted_proxies)'
        judged = "a trusted proxy on a Unix socket"
        for text in reversed(hops):
            try:
                address = _address(text.strip())
            except ValueError:
                return False, repr(printable(text.strip()))
            judged = str(address)
            if not any(address in network for network in self.trusted_proxies):
                return any(address in network for network in self.allow_from), judged
        return False, judged


def _networks(name: str, texts: Iterable[str]) -> Networks:
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _address(text: str) -> IPv4Address | IPv6Address:
    match = _ADDRESS.fullmatch(text)
    address = ip_address(match[2] or match[3] or match[4] if match else text)
    # Servers that listen on both families report IPv4 clients as ``::ffff:203.0.113.7``.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
