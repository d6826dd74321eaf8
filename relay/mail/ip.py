"""IP addresses in one form, so that a client is one client at every door.

A dual-stack socket shows the IPv4 client 10.0.0.5 as `::ffff:10.0.0.5`, a proxy may write
`::ffff:a00:5`: both are 10.0.0.5 to networks, limits and logs (RFC 4291 §2.5.5.2).
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address, ip_address

__all__ = ["canonical"]


@lru_cache(maxsize=1024)
def canonical(address: str) -> str:
    """The address in its one form, without a zone; what is no address comes back as it is."""
    host = address.partition("%")[0]
    try:
        parsed = ip_address(host)
    except ValueError:
        return address
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed)
