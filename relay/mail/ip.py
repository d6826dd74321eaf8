"""IP addresses in one form, so that a client is one client at every door.

A dual-stack socket shows the IPv4 client 10.0.0.5 as `::ffff:10.0.0.5`, a proxy may write
`::ffff:a00:5`: both are 10.0.0.5 to networks, limits and logs (RFC 4291 §2.5.5.2).
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["canonical", "unmapped"]


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv4-mapped one stands for; any other as it is."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


@lru_cache(maxsize=1024)
def canonical(address: str) -> str:
    """The address in its one form, without a zone; what is no address comes back as it is."""
    host = address.partition("%")[0]
    try:
        return str(unmapped(ip_address(host)))
    except ValueError:
        return address
