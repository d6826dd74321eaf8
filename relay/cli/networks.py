"""The networks of this machine, for which a container relays with `--own-networks`.

They are the private networks of every interface that is up, without the machine's own addresses
and without gateways. Traffic from outside seems to come from these addresses where ports are
published and addresses translated: to trust a gateway is to trust the whole world behind it.

The kernel knows the gateways of its routes. A second bridge of a container engine, or an internal
network, has a gateway and no route through it. That gateway is the host, which usually has the
first or the last address of the network, so the relay trusts neither. An operator who gave such a
network another gateway has to set `access.networks`.

Networks of public addresses are left out: their other addresses belong to strangers.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_LOOPBACK = ("127.0.0.0/8", "::1/128")
_VARIABLE = "RELAY__ACCESS__NETWORKS"


def with_own_networks(environ: Mapping[str, str], config: Path) -> Mapping[str, str]:
    """The environment, with `access.networks` set to the own networks if it was not set."""
    if _VARIABLE in environ or _is_set_in(config):
        return environ
    networks = [*_LOOPBACK, *map(str, own_networks())]
    return {**environ, _VARIABLE: "[" + ", ".join(f'"{network}"' for network in networks) + "]"}


def _is_set_in(config: Path) -> bool:
    from relay.config import ConfigError, text_of
    from relay.config.tree import Composer, Map

    try:
        tree = Composer(str(config), []).compose(text_of(config))
    except ConfigError:
        return False  # `serve` reports what is wrong with the file
    access = tree.values.get("access") if isinstance(tree, Map) else None
    return isinstance(access, Map) and "networks" in access.keys


def own_networks() -> list[Network]:
    """The private networks of this machine, without its own addresses and gateways."""
    interfaces = [one for one in (*_ipv4(), *_ipv6()) if _is_ours(one)]
    apart: set[Address] = {*(one.ip for one in interfaces), *_gateways()}
    found: list[Network] = []
    for network in {interface.network: None for interface in interfaces}:
        inside = {one for one in apart if one in network}
        found += _without(network, sorted(inside | _customary_gateways(network), key=int))
    return found


def _is_ours(interface: Interface) -> bool:
    return interface.is_private and not (interface.is_loopback or interface.is_link_local)


def _customary_gateways(network: Network) -> set[Address]:
    """The first and the last host address of a network, and the network's own address."""
    last = network.broadcast_address - (1 if network.version == 4 and network.prefixlen < 31 else 0)
    first = network.network_address + (1 if network.num_addresses > 2 else 0)
    return {network.network_address, first, last}


def _without(network: Network, apart: list[Address]) -> list[Network]:
    left: list[Network] = [network]
    for address in apart:
        single = ipaddress.ip_network(address)
        left = [
            part
            for whole in left
            for part in (whole.address_exclude(single) if address in whole else [whole])  # type: ignore[arg-type]
        ]
    return sorted(left, key=lambda part: (int(part.network_address), part.prefixlen))


def _ipv4() -> Iterator[Interface]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                address = fcntl.ioctl(asking, _SIOCGIFADDR, request)[20:24]
                mask = fcntl.ioctl(asking, _SIOCGIFNETMASK, request)[20:24]
            except OSError:
                continue  # an interface without an IPv4 address
            yield ipaddress.IPv4Interface(f"{socket.inet_ntoa(address)}/{socket.inet_ntoa(mask)}")


def _ipv6() -> Iterator[Interface]:
    for line in _lines("/proc/net/if_inet6"):
        address, _, prefix, *_ = line.split()
        yield ipaddress.IPv6Interface((int(address, 16), int(prefix, 16)))


def _gateways() -> Iterator[Address]:
    for line in _lines("/proc/net/route")[1:]:
        gateway = int(line.split()[2], 16)
        if gateway:
            yield ipaddress.IPv4Address(struct.pack("=I", gateway))
    for line in _lines("/proc/net/ipv6_route"):
        hop = int(line.split()[4], 16)
        if hop:
            yield ipaddress.IPv6Address(hop)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
