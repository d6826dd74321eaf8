"""The networks this machine is in: whom a container relays for that was told nothing else.

Each network of an interface that is up, without our own addresses and without gateways. Both
are where traffic from elsewhere seems to come from once ports are published and addresses
translated: whoever trusts a gateway trusts the whole world behind it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["own_networks", "with_own_networks"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_LOOPBACK = ("127.0.0.0/8", "::1/128")
_VARIABLE = "RELAY__ACCESS__NETWORKS"


def with_own_networks(environ: Mapping[str, str], config: Path) -> Mapping[str, str]:
    """The environment, with `access.networks` set to our own networks where nobody has set it."""
    if _VARIABLE in environ or _is_set_in(config):
        return environ
    networks = [*_LOOPBACK, *map(str, own_networks())]
    return {**environ, _VARIABLE: "[" + ", ".join(f'"{network}"' for network in networks) + "]"}


def _is_set_in(config: Path) -> bool:
    import yaml

    try:
        said = yaml.safe_load(config.read_text(encoding="utf-8"))
        return "networks" in ((said or {}).get("access") or {})
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return False  # `serve` will say what is wrong with it


def own_networks() -> list[Network]:
    """What is around this machine, and is neither itself nor a way out."""
    interfaces = [
        one for one in (*_ipv4(), *_ipv6()) if not one.is_loopback and not one.is_link_local
    ]
    apart: list[Address] = [*(one.ip for one in interfaces), *_gateways()]
    found: list[Network] = []
    for interface in interfaces:
        found += _without(interface.network, [one for one in apart if one in interface.network])
    return found


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
