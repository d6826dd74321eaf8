"""Where a domain's mail goes: the values that routing returns.

`Route = Hosts | NoRoute`. A `Host` is one address of one mail host, already checked
against the address rules: the relay connects to exactly this address without another look-up.
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
    """AUTH with a next hop that the operator named (RFC 4954); sent only inside verified TLS."""

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

    `name`: of the MX record, normalised; it is sent as SNI, verified, and logged as `mx-host`.
    `tlsa_bases`: the names that may have its TLSA records, in order; none where its addresses are
    not signed. `next_hop`: the operator's next hop that has this address.
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
        """The key for counting its connections: the next hop, or this address."""
        return self.next_hop or f"[{self.address}]:{self.port}"


@dataclass(frozen=True, slots=True)
class Naming:
    """Who named the hosts of a domain, and whether that is secure.

    `is_secure`: a signed answer or the operator named them. `route_host`: the host of the
    operator's route, None where the DNS was asked. `domains`: the domain and the name that it is an
    alias of, if a host's certificate may be for these (RFC 7672 §3.2.2). `is_domain_itself`: the
    domain has no MX record and is its own host.
    """

    is_secure: bool = False
    route_host: str | None = None
    domains: tuple[str, ...] = ()
    is_domain_itself: bool = False


BY_NOBODY = Naming()
"""The naming of an address, which has no name."""


@dataclass(frozen=True, slots=True)
class Hosts:
    """The hosts to try, in order, at least one.

    `trouble`: temporary failures of look-ups (one line each), which make an attempt temporary if
    no host takes the mail. `rejected`: addresses that are not allowed, and why.
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
    """There is no host to try; `outcome` is the result for the recipients."""

    outcome: Deferred | Bounced


Route = Hosts | NoRoute
