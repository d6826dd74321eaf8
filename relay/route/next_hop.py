"""Where a domain's mail goes: the words routing answers with.

`Route = Hosts | NoRoute`. A `Host` is one address of one mail host, already checked
against the address rules: connect to exactly this address, look nothing up again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from relay.mail.option import Form, Path, Port
from relay.mail.outcome import Bounced, Deferred, NamedBy, Routing

__all__ = [
    "BY_NOBODY",
    "Credentials",
    "Host",
    "Hosts",
    "Naming",
    "NoRoute",
    "Route",
    "StaticRoute",
    "TlsMode",
]


class TlsMode(StrEnum):
    """How TLS begins with a next hop."""

    STARTTLS = "starttls"
    IMPLICIT = "implicit"


@dataclass(frozen=True, slots=True)
class Credentials:
    """AUTH with a next hop of the operator's (RFC 4954); only ever said inside verified TLS."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class StaticRoute:
    """`routes`: a next hop instead of MX, for one domain or "*"."""

    host: Annotated[str, Form.MAIL_HOST]
    port: Port = 25
    tls: TlsMode = TlsMode.STARTTLS
    username: str | None = None
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """One address of one mail host.

    `name`: as the MX record gives it, lower case, A-labels, no final dot: what is sent as SNI,
    verified, and logged as `mx-host`. `tlsa_bases`: where its TLSA records may be, in the order to
    ask; none where its addresses are not signed. `next_hop`: the operator's, whose address this is.
    """

    name: str
    address: str
    port: int
    preference: int = 0
    tls: TlsMode = TlsMode.STARTTLS
    credentials: Credentials | None = None
    tlsa_bases: tuple[str, ...] = ()
    next_hop: str = ""

    @property
    def destination(self) -> str:
        """What its connections are counted by: the next hop, or this address."""
        return self.next_hop or f"[{self.address}]:{self.port}"


@dataclass(frozen=True, slots=True)
class Naming:
    """Who named the hosts of a domain, and how far that is to be believed.

    `is_secure`: by a signed answer, or by the operator. `route_host`: the host of a route of the
    operator's, None where the DNS was asked. `domains`: the domain and what it is an alias of,
    where a host's certificate may be for those too (RFC 7672 §3.2.2). `is_domain_itself`: the domain
    has no MX record and is its own host.
    """

    is_secure: bool = False
    route_host: str | None = None
    domains: tuple[str, ...] = ()
    is_domain_itself: bool = False


BY_NOBODY = Naming()
"""Of an address: it has no name."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts to try, in order, at least one.

    `trouble`: a temporary failure met on the way (one line each), which makes an attempt that
    delivers nowhere temporary. `rejected`: addresses not to be connected to, and why.
    """

    hosts: tuple[Host, ...]
    trouble: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    naming: Naming = BY_NOBODY

    @property
    def routing(self) -> Routing:
        """The same for the delivery log."""
        naming = self.naming
        if naming.route_host is not None:
            named_by = NamedBy.ROUTE
        elif naming.is_domain_itself:
            named_by = NamedBy.DOMAIN
        else:
            is_literal = self.hosts[0].name == self.hosts[0].address
            named_by = NamedBy.ADDRESS if is_literal else NamedBy.MX
        return Routing(named_by, naming.is_secure, tuple(map(_line, self.hosts)))


def _line(host: Host) -> str:
    """`10 mx1.example.net [192.0.2.7]`; a next hop of the operator's has no preference."""
    where = f"{host.name} [{host.address}]"
    return f"{where}:{host.port}" if host.next_hop else f"{host.preference} {where}"


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No host to try, and what that means for the recipients."""

    outcome: Deferred | Bounced


Route = Hosts | NoRoute
