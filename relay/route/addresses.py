"""Which addresses the relay must not connect to.

The recipient chooses its MX records, so it chooses where the relay connects to. An address
that is not of the public internet would let a stranger reach machines of the relay's own
network, or the relay itself. Each address is looked up once and judged here, and the relay
connects to exactly that address: a later answer of the DNS has no effect (rebinding).

    the relay's address, a port it listens on  never         5.4.6, the mail would loop
    IPv4-mapped                                never: `::/0` in `allow_networks` means no IPv4
    in `allow_networks`                        connect
    public                                     connect
    anything else                              never         5.4.4, with the reason

Public means: not in the special-purpose registries of IANA (RFC 6890). The table is
written out because `ipaddress.is_global` has changed its mind between releases of
Python. Addresses that carry an IPv4 address inside are judged by what they carry:
NAT64 (RFC 6052) and 6to4 (RFC 3056). IPv4-mapped (RFC 4291 §2.5.5.2) and Teredo
(RFC 4380) never belong in a record of a mail host.

`Own` knows the relay's own addresses; its caller says which addresses the machine has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from relay.mail.ip import unmapped

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the relay does not connect to an address. `ourselves`: it is the relay's listener."""

    reason: str
    ourselves: bool = False


@dataclass(frozen=True, slots=True)
class Own:
    """The addresses at which the relay itself answers.

    `listening`: address and port of every listener, wildcards as they are configured.
    `is_local`: whether an address is one of this machine; asked only for a wildcard.
    """

    listening: Callable[[], Collection[tuple[str, int]]] = tuple
    is_local: Callable[[str], bool] = lambda address: False

    def answers_at(self, address: Address, port: int) -> bool:
        """Whether a connection to there would reach one of our listeners."""
        address = unmapped(address)
        for text, listening_port in self.listening():
            if listening_port != port:
                continue
            listener = unmapped(ip_address(text))
            if listener == address:
                return True
            if listener.is_unspecified and (
                address.is_loopback or address.is_unspecified or self.is_local(str(address))
            ):
                return True
        return False


def judge(
    address: Address, port: int, *, own: Own, allow_networks: Sequence[Network]
) -> Rejection | None:
    """Why the relay does not connect to this address; None if it may.

    The relay's own listener comes first: `allow_networks` permits no loop.
    """
    if own.answers_at(address, port):
        return Rejection("is an address of our own", ourselves=True)
    if unmapped(address) != address:
        return Rejection(f"is {_MAPPED}")
    if any(address in network for network in allow_networks):
        return None
    reason = _special_use(address)
    return Rejection(f"is {reason}") if reason else None


def parse_address(text: str) -> Address | None:
    """The address in a text of the DNS; None if it is no address."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def parse_address_literal(domain: str) -> Address | None:
    """The address in `[192.0.2.1]` or `[IPv6:2001:db8::1]` (RFC 5321 §4.1.3), or None."""
    if not (domain.startswith("[") and domain.endswith("]")):
        return None
    text = domain[1:-1]
    if text[:5].lower() == "ipv6:":
        text = text[5:]
    if "%" in text:  # a zone names an interface of this machine; a recipient must not choose one
        return None
    return parse_address(text)


def _networks(*rows: tuple[str, str]) -> tuple[tuple[Network, str], ...]:
    return tuple((ip_network(network), reason) for network, reason in rows)


_SPECIAL_4 = _networks(
    ("0.0.0.0/8", "unspecified (RFC 1122)"),
    ("10.0.0.0/8", "private (RFC 1918)"),
    ("100.64.0.0/10", "shared by a provider (RFC 6598)"),
    ("127.0.0.0/8", "loopback (RFC 1122)"),
    ("169.254.0.0/16", "link-local (RFC 3927)"),
    ("172.16.0.0/12", "private (RFC 1918)"),
    ("192.0.0.0/24", "reserved (RFC 6890)"),
    ("192.0.2.0/24", "for documentation (RFC 5737)"),
    ("192.88.99.0/24", "reserved (RFC 7526)"),
    ("192.168.0.0/16", "private (RFC 1918)"),
    ("198.18.0.0/15", "for benchmarks (RFC 2544)"),
    ("198.51.100.0/24", "for documentation (RFC 5737)"),
    ("203.0.113.0/24", "for documentation (RFC 5737)"),
    ("224.0.0.0/4", "multicast (RFC 5771)"),
    ("240.0.0.0/4", "reserved (RFC 1112)"),
)

_MAPPED = "IPv4-mapped (RFC 4291)"

_SPECIAL_6 = _networks(
    ("::/128", "unspecified (RFC 4291)"),
    ("::1/128", "loopback (RFC 4291)"),
    ("64:ff9b:1::/48", "private (RFC 8215)"),
    ("2001::/32", "Teredo (RFC 4380)"),
    ("2001::/23", "reserved (RFC 2928)"),
    ("2001:db8::/32", "for documentation (RFC 3849)"),
    ("3fff::/20", "for documentation (RFC 9637)"),
    ("fc00::/7", "private (RFC 4193)"),
    ("fe80::/10", "link-local (RFC 4291)"),
    ("fec0::/10", "private (RFC 3879)"),
    ("ff00::/8", "multicast (RFC 4291)"),
)

_NAT64 = IPv6Network("64:ff9b::/96")
_6TO4 = IPv6Network("2002::/16")
_GLOBAL_UNICAST = IPv6Network("2000::/3")


def _special_use(address: Address) -> str:
    """The special purpose of an address; "" for one of the public internet."""
    for network, reason in _SPECIAL_4 if address.version == 4 else _SPECIAL_6:
        if address in network:
            return reason
    if isinstance(address, IPv4Address):
        return ""
    carried = _carried(address)
    if carried is not None:
        inner = _special_use(carried)
        return f"an embedding of {carried}, which is {inner}" if inner else ""
    return "" if address in _GLOBAL_UNICAST else "reserved (RFC 4291)"


def _carried(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address to which a translator or tunnel would forward this address."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    if address in _6TO4:
        return IPv4Address((int(address) >> 80) & 0xFFFFFFFF)
    return None
