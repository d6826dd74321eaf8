"""What the tables of a Postfix that choose a next hop by sender mean in `routes_by_sender`.

    sender_dependent_relayhost_maps            sender   [host]:port, or several
    sender_dependent_default_transport_maps    sender   transport:[host]:port

A sender is `user@example.com`, or `@example.com` for all of a domain. `imported_senders` gives each
line a next hop, and a remark for each difference. Where the relay cannot do the same, the line gets
the nearest next hop, or none: then its mail goes as that of other senders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from relay.mail.address import AddressError, normalise_domain
from relay.policy.postfix_files import HIDDEN, holds_secret, shown
from relay.policy.postfix_remarks import Difference, ImportRemark
from relay.policy.postfix_table import TableLine, read_table


@dataclass(frozen=True, slots=True)
class SenderHop:
    """Where a sender's mail goes: hosts in order, without brackets."""

    hosts: tuple[str, ...]
    port: int = 25

    @property
    def name(self) -> str:
        """A name for `next_hops`."""
        host = re.sub(r"[^A-Za-z0-9.-]", "-", self.hosts[0])[:50]
        host = host if host[0].isalpha() else f"hop-{host}"
        more = f"-and-{len(self.hosts) - 1}-more" if len(self.hosts) > 1 else ""
        return f"{host}{more}" if self.port == 25 else f"{host}{more}-{self.port}"


@dataclass(frozen=True, slots=True)
class ImportedSender:
    """A line, its key in `routes_by_sender` ("" for none), and its next hop (None for none)."""

    line: TableLine
    pattern: str = ""
    hop: SenderHop | None = None
    remarks: tuple[ImportRemark, ...] = ()

    @property
    def shown(self) -> str:
        """The line, without a value that is no next hop and that may be a password."""
        return shown(self.line, is_understood=self.hop is not None)

    @property
    def shown_key(self) -> str:
        """The key, of a line with a sender."""
        return HIDDEN if not self.pattern and holds_secret(self.line.key) else self.line.key

    @property
    def has_equivalent(self) -> bool:
        """Whether the relay sends this mail where Postfix did."""
        return not any(one.difference is Difference.NO_EQUIVALENT for one in self.remarks)


_PORTS = {"smtp": 25, "submission": 587, "smtps": 465, "submissions": 465}
_NEXT_HOP = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<plain>[^:\[\]]+))(?::(?P<port>[^:]+))?")
_TO_HOST = ("smtp", "relay")
"""The transports of master.cf that speak SMTP with a host, as Postfix comes."""
_NOT_SMTP = ("error", "retry", "discard", "local", "virtual", "lmtp", "pipe")


def imported_senders(text: str, *, has_transports: bool) -> tuple[ImportedSender, ...]:
    """Each line of a table's source. `has_transports`: it is one of
    sender_dependent_default_transport_maps.
    """
    return tuple(_imported(line, has_transports=has_transports) for line in read_table(text))


def _imported(line: TableLine, *, has_transports: bool) -> ImportedSender:
    if line.fault:
        return ImportedSender(line, remarks=(_none(f"{line.fault}; Postfix passes over it"),))
    pattern = _pattern(line.key)
    if not pattern:
        return ImportedSender(line, remarks=(_why_no_pattern(line.key),))
    remarks: list[ImportRemark] = []
    value = line.value
    if value.upper() == "DUNNO":
        text = "no route of this sender's; one of its domain holds for it here"
        return ImportedSender(line, pattern, remarks=(_none(text),))
    if has_transports:
        transport, _, value = line.value.partition(":")
        if transport in _NOT_SMTP or not transport:
            return ImportedSender(line, pattern, remarks=(_none(f"no transport {transport}"),))
        if not re.fullmatch(r"[\w-]+", transport) or not re.fullmatch(r"|.*[\[.].*", value):
            # `user:password` looks so, and is not quoted.
            return ImportedSender(line, pattern, remarks=(_none("no transport with a host"),))
        if transport not in _TO_HOST:
            text = f"what master.cf says of the transport {transport} is not imported"
            remarks.append(_none(text))
    if not value:
        text = "no next hop of its own"
        return ImportedSender(
            line, pattern, remarks=(*remarks, ImportRemark(Difference.NO_EFFECT, text))
        )
    hop, differences = _next_hop(value)
    return ImportedSender(line, pattern, hop, (*remarks, *differences))


def _pattern(key: str) -> str:
    """`user@example.com`, or the domain of `@example.com`; "" where it is neither."""
    local_part, at, domain = key.rpartition("@")
    try:
        domain = normalise_domain(domain) if at else ""
    except AddressError:
        return ""
    if not domain or not re.fullmatch(r"[^\s@\"(),:;<>\[\]\\]*", local_part):
        return ""
    return f"{local_part.lower()}@{domain}" if local_part else domain


def _why_no_pattern(key: str) -> ImportRemark:
    if key.startswith("/"):
        return _none("a regular expression; write the addresses and domains that it means")
    if key == "<>":
        return _none('a message with the null reverse-path goes by the route "*" or by MX')
    try:
        domain = normalise_domain(key)
    except AddressError:
        domain = ""
    if "." not in domain:
        return _none("no sender that a route can be for; write an address or a domain")
    text = f"Postfix looks up addresses and @domain only; for all senders of it write @{domain}"
    return ImportRemark(Difference.NO_EFFECT, text)


def _next_hop(value: str) -> tuple[SenderHop | None, list[ImportRemark]]:
    """The next hop of a value, of which there may be several, tried in order."""
    hosts, ports, remarks = [], [], []
    for one in re.split(r"[,\s]+", value.strip()):
        match = _NEXT_HOP.fullmatch(one)
        port = _port(match["port"]) if match else None
        host = _host(match["bracketed"] or match["plain"]) if match else ""
        if match is None or port is None or not host:
            said = HIDDEN if holds_secret(one) else one
            return None, [_none(f"{said} is no next hop")]
        if match["plain"]:
            remarks.append(_none(_by_mx(host)))
        hosts.append(host)
        ports.append(port)
    if len(set(ports)) > 1:
        remarks.append(_none("a next hop has one port here; the first one is taken"))
    return SenderHop(tuple(hosts), ports[0]), remarks


def _by_mx(host: str) -> str:
    return f"Postfix looks up the MX records of {host}; here it is the host itself: name its hosts"


def _host(text: str) -> str:
    try:
        return str(ip_address(text.removeprefix("ipv6:")))
    except ValueError:
        pass
    try:
        return normalise_domain(text)
    except AddressError:
        return ""


def _port(text: str | None) -> int | None:
    if text is None:
        return 25
    if text.isascii() and text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    return _PORTS.get(text.lower())


def _none(text: str) -> ImportRemark:
    return ImportRemark(Difference.NO_EQUIVALENT, text)


def by_pattern(tables: Iterable[Sequence[ImportedSender]]) -> list[ImportedSender]:
    """The lines with a next hop that Postfix obeys. Of two lines of a table for a sender, the first
    counts; a transport with a next hop, whose table stands first, comes before a relay host.
    """
    found: dict[str, ImportedSender] = {}
    for lines in tables:
        first: dict[str, ImportedSender] = {}
        for each in lines:
            first.setdefault(each.pattern, each)
        for each in first.values():
            if each.hop is not None:
                found.setdefault(each.pattern, each)
    return list(found.values())
