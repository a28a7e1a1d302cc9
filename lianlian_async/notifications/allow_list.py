"""Decide whether a client address is allowed; X-Forwarded-For counts only behind trusted proxies."""

import re
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

from lianlian_async.errors import ConfigurationError, printable

Networks: TypeAlias = tuple[IPv4Network | IPv6Network, ...]

_ADDRESS: Final = re.compile(r"\[([^]]+)](?::[0-9]+)?|([0-9.]+):[0-9]+")
"""The forms of an address in X-Forwarded-For that ``ip_address`` cannot read: in brackets, or with a port."""


def networks(name: str, texts: Iterable[str]) -> Networks:
    """Parse networks such as ``203.0.113.0/24`` or ``2001:db8::7``; ``ConfigurationError`` names the argument."""
    try:
        return tuple(ip_network(text) for text in texts)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from None


def judge(
    peer: str | None, forwarded_for: str, allowed: Networks, proxies: Networks, *, trusts_unix: bool
) -> tuple[bool, str]:
    """Return whether the client is allowed, and its address for the log.

    ``peer`` is the address of the connection; None or empty on a Unix socket, whose peers are trusted proxies if
    ``trusts_unix`` is true. ``forwarded_for`` is the header X-Forwarded-For: each proxy appends the address of its
    client. The client's address is the last one that does not belong to a trusted proxy; earlier ones may be forged.
    """
    judged = "a trusted proxy on a Unix socket"
    if not trusts_unix:
        judged = 'a peer without an IP address (for a proxy on a Unix socket, add "unix" to trusted_proxies)'
    hops = [] if trusts_unix and not peer else [peer or ""]
    for hop in (*hops, *reversed(forwarded_for.split(","))):
        try:
            address = _address(hop.strip())
        except ValueError:
            return False, repr(printable(hop.strip())) if hop else judged
        judged = str(address)
        if not any(address in network for network in proxies):
            return any(address in network for network in allowed), judged
    return False, judged


def _address(text: str) -> IPv4Address | IPv6Address:
    match = _ADDRESS.fullmatch(text)
    address = ip_address(match[1] or match[2] if match else text)
    # Servers that listen on both families report IPv4 clients as ``::ffff:203.0.113.7``.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
