"""Which addresses of its hosts a next hop may use: `ip_family` and `source_address`. Pure.

A connection from an IPv4 address cannot lead to an IPv6 address, so that `source_address` names a
family as well as `ip_family` does.
"""

from __future__ import annotations

from dataclasses import replace

from relay.route.addresses import Address, parse_address
from relay.route.answers import AddressAnswer, AddressLookup
from relay.route.next_hop import IpFamily, NextHop

_VERSIONS = {IpFamily.IPV4: 4, IpFamily.IPV6: 6}


def usable_from(hop: NextHop, lookup: AddressLookup) -> AddressLookup:
    """The addresses of a host that the next hop may use; all if it may use none, so that the
    relay can say why.
    """
    if not isinstance(lookup, AddressAnswer):
        return lookup
    parsed = {text: parse_address(text) for text in lookup.addresses}
    usable = tuple(text for text, found in parsed.items() if found and not why_unusable(hop, found))
    return replace(lookup, addresses=usable) if usable else lookup


def why_unusable(hop: NextHop, address: Address) -> str:
    """Why the next hop may not use an address because of its family; "" where it may."""
    if address.version != _VERSIONS.get(hop.ip_family, address.version):
        return f"is not used, since ip_family is {hop.ip_family.value}"
    source = parse_address(hop.source_address) if hop.source_address is not None else None
    if source is not None and address.version != source.version:
        return f"is not used, since source_address is {source}, of the other IP version"
    return ""
