"""Which addresses notifications are taken from: an allow-list, and the proxies that may speak for others."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypeAlias

import attrs

from lianlian_async.errors import ConfigurationError

__all__ = ["AllowList"]

Networks: TypeAlias = tuple[IPv4Network | IPv6Network, ...]


@attrs.frozen
class AllowList:
    """The networks that are let in, and those of the proxies in front of us."""

    allow_from: Networks
    trusted_proxies: Networks

    @classmethod
    def read(cls, allow_from: Iterable[str], trusted_proxies: Iterable[str]) -> AllowList:
        """From texts such as ``203.0.113.0/24`` or ``2001:db8::7``; ``ConfigurationError`` for one that is none."""
        return cls(_networks("allow_from", allow_from), _networks("trusted_proxies", trusted_proxies))

    def admits(self, peer: str | None, forwarded_for: str) -> bool:
        """Whether the client may come in: the nearest address that is no trusted proxy's.

        ``peer`` is who is connected to us, ``forwarded_for`` the header X-Forwarded-For, to which each proxy adds
        at the end whom it speaks for: what stands before an address that is not trusted may be made up.
        """
        for text in reversed([*forwarded_for.split(","), peer or ""]):
            try:
                address = _plain(ip_address(text.strip()))
            except ValueError:
                return False
            if not any(address in network for network in self.trusted_proxies):
                return any(address in network for network in self.allow_from)
        return False


def _networks(name: str, texts: Iterable[str]) -> Networks:
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _plain(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Servers that listen on both families show IPv4 clients as ``::ffff:203.0.113.7``."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
