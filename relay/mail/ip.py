"""IP addresses in one form, so that every listener counts a client as the same client.

A dual-stack socket shows the IPv4 client 10.0.0.5 as `::ffff:10.0.0.5`, a proxy may write
`::ffff:a00:5`. Networks, limits and logs take both for 10.0.0.5 (RFC 4291 §2.5.5.2).
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv4-mapped address stands for; any other address unchanged."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


@lru_cache(maxsize=1024)
def canonical(address: str) -> str:
    """The address in its one form, without a zone; a text that is no address comes unchanged."""
    host = address.partition("%")[0]
    try:
        return str(unmapped(ip_address(host)))
    except ValueError:
        return address
