"""Where mail goes: next hops of the operator's own, and the values that routing returns.

`Route = Hosts | NoRoute`. A `Host` is one address of one mail host, already checked
against the address rules: the relay connects to exactly this address without another look-up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Annotated, Protocol

from relay.mail.option import ONE_OR_MORE, NotEmpty, Path, Port, Range, ShortKey, TextForm
from relay.mail.outcome import Bounced, Deferred, NamedBy, Routing
from relay.mail.record import record


class TlsMode(StrEnum):
    """How TLS begins with a next hop."""

    STARTTLS = "starttls"
    IMPLICIT = "implicit"


class AuthMechanism(StrEnum):
    """How the relay logs in at a next hop (SASL). `auto`: the strongest that the host offers."""

    AUTO = "auto"
    PLAIN = "plain"
    LOGIN = "login"
    XOAUTH2 = "xoauth2"
    OAUTHBEARER = "oauthbearer"
    EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What proves who the relay is at a next hop that the operator named (RFC 4954); sent only
    inside verified TLS.

    `token`: an access token. `is_fresh`: it was fetched for this attempt. Two logins are the same
    whatever their token is: it changes every hour.
    """

    username: str
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False, compare=False)
    mechanism: AuthMechanism = AuthMechanism.AUTO
    is_fresh: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Auth:
    """The login at a next hop. `oauth2`: the name of the `TokenSource` that gives its token."""

    mechanism: AuthMechanism = AuthMechanism.AUTO
    username: str | None = None
    password_file: Path | None = None
    oauth2: Annotated[str, TextForm.NAME] | None = None


class Grant(StrEnum):
    """How an access token is asked for (OAuth 2.0)."""

    CLIENT_CREDENTIALS = "client_credentials"
    SERVICE_ACCOUNT = "service_account"
    REFRESH_TOKEN = "refresh_token"


@dataclass(frozen=True, slots=True)
class TokenSource:
    """`oauth2`: an authorization server, and the account whose access tokens it gives.

    `key_file`: the JSON file that Google makes for a service account; `subject` is the mailbox that
    it acts for. `device_url`: where `relay login` begins.
    """

    name: str
    grant: Grant
    token_url: Annotated[str, TextForm.HTTPS_URL] | None = None
    client_id: str | None = None
    client_secret_file: Path | None = None
    scope: str | None = None
    key_file: Path | None = None
    subject: str | None = None
    refresh_token_file: Path | None = None
    device_url: Annotated[str, TextForm.HTTPS_URL] | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many messages in so many seconds."""

    messages: int
    seconds: float


class IpFamily(StrEnum):
    """Which addresses of a host the relay connects to."""

    ANY = "any"
    IPV4 = "ipv4"
    IPV6 = "ipv6"


NO_CHAIN = "none"
"""`ca_file` of a next hop whose certificate no authority has to have issued."""

_Count = Annotated[int, Range(1, 1_000_000)]
_MailHost = Annotated[str, TextForm.MAIL_HOST]
_NO_HOST = NotEmpty("an empty list: mail would have no host to go to", "name a host")


@dataclass(frozen=True, slots=True)
class NextHop:
    """A next hop of the operator's own, which mail goes to instead of the MX hosts.

    `name`: the key under `next_hops`; of a map that stands in a route itself, the pattern it stands
    under. `hosts`: groups of equals, in order. `ca_file`: the roots for this next hop alone;
    "none" for no chain at all, where pins prove who the host is. `verify_name`: the name that a
    certificate has to be for, None for the name of the host. `hello`: what EHLO says.
    """

    name: str
    hosts: Annotated[
        tuple[Annotated[tuple[_MailHost, ...], ONE_OR_MORE, _NO_HOST], ...],
        ONE_OR_MORE,
        _NO_HOST,
        ShortKey("host", _MailHost),
    ]
    port: Port = 25
    tls: TlsMode = TlsMode.STARTTLS
    auth: Annotated[
        Auth | None,
        ShortKey("username", str | None, "username"),
        ShortKey("password_file", Path | None, "password_file"),
    ] = None
    max_connections: _Count | None = None
    max_messages_per_connection: _Count | None = None
    rate: Annotated[Rate, TextForm.RATE] | None = None
    certificate: Path | None = None
    key: Path | None = None
    ca_file: Path | None = None
    pin_sha256: Annotated[tuple[Annotated[str, TextForm.SPKI_DIGEST], ...], ONE_OR_MORE] = ()
    verify_name: Annotated[str, TextForm.DOMAIN] | None = None
    source_address: Annotated[str, TextForm.ADDRESS] | None = None
    ip_family: IpFamily = IpFamily.ANY
    hello: Annotated[str, TextForm.DOMAIN] | None = None
    destination: str = field(init=False, repr=False, compare=False)
    """Where its connections lead: the same for all next hops with these hosts, this port, this
    appearance, and this login, as providers limit each account.
    """
    is_limited: bool = field(init=False, repr=False, compare=False)
    """Whether the operator has set `max_connections` or `rate`."""

    def __post_init__(self) -> None:
        where = f"{','.join(self.every_host())}:{self.port}{self.appearance}"
        destination = f"{where} as {self.auth.username}" if self.auth is not None else where
        object.__setattr__(self, "destination", destination)
        is_limited = self.max_connections is not None or self.rate is not None
        object.__setattr__(self, "is_limited", is_limited)

    def every_host(self) -> Iterator[str]:
        """Its hosts in order, whatever their group."""
        return (host for equals in self.hosts for host in equals)

    @property
    def appearance(self) -> str:
        """What a host sees of its connections before TLS, "" where no key says it: a host may turn
        away one address, or one EHLO, and take the others.
        """
        family = self.ip_family if self.ip_family is not IpFamily.ANY else None
        keys = ("from", self.source_address), ("over", family), ("EHLO", self.hello)
        return "".join(f" {key} {value}" for key, value in keys if value is not None)


class RouteRule(StrEnum):
    """The rule that chose where a message goes, in the order in which they are asked."""

    RECIPIENT = "recipient"
    CLIENT = "client"
    SENDER = "sender"
    ALL = "all"
    MX = "mx"


@dataclass(frozen=True, slots=True)
class RouteChoice:
    """Which next hop a message takes, None for the MX hosts, and by which rule. `pattern`: where
    the rule stands in `routes` or `routes_by_sender`. `missing`: the name of a next hop that is not
    configured any more.
    """

    rule: RouteRule = RouteRule.MX
    pattern: str = ""
    hop: NextHop | None = None
    missing: str = ""

    @property
    def next_hop(self) -> str:
        """The name of the next hop, also of one that is missing; "" for the MX hosts."""
        return self.hop.name if self.hop is not None else self.missing


@dataclass(frozen=True, slots=True)
class Host:
    """One address of one mail host.

    `name`: of the MX record, normalised; it is sent as SNI, verified, and logged as `mx-host`.
    `tlsa_bases`: the names that may have its TLSA records, in order; none where its addresses are
    not signed. `hop`: the operator's next hop that has this address; None for a host of MX records.
    """

    name: str
    address: str
    port: int
    preference: int = 0
    tls: TlsMode = TlsMode.STARTTLS
    credentials: Credentials | None = None
    tlsa_bases: tuple[str, ...] = ()
    hop: NextHop | None = None
    destination: str = field(init=False, repr=False, compare=False)
    """The key for counting its connections: the next hop, or this address."""

    def __post_init__(self) -> None:
        hop = self.hop
        destination = hop.destination if hop is not None else f"[{self.address}]:{self.port}"
        object.__setattr__(self, "destination", destination)

    def __hash__(self) -> int:
        """The hash of the fields that differ most; the hash of a whole next hop is slow."""
        return hash((self.name, self.address, self.port))


@dataclass(frozen=True, slots=True)
class Naming:
    """Who named the hosts of a domain, and whether that is secure.

    `is_secure`: a signed answer or the operator named them. `route_host`: the (first) host of the
    operator's next hop, None where the DNS was asked. `domains`: the domain and the name that it is
    an alias of, if a host's certificate may be for these (RFC 7672 §3.2.2). `is_domain_itself`: the
    domain has no MX record and is its own host.
    """

    is_secure: bool = False
    route_host: str | None = None
    domains: tuple[str, ...] = ()
    is_domain_itself: bool = False


BY_NOBODY = Naming()
"""The naming of an address, which has no name."""


@record(frozen=True, slots=True)
class Hosts:
    """The hosts to try, in order, at least one.

    `trouble`: temporary failures of look-ups (one line each), which make an attempt temporary if
    no host takes the mail. `rejected`: addresses that are not allowed, and why. `choice`: why mail
    goes there.
    """

    hosts: tuple[Host, ...]
    trouble: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    naming: Naming = BY_NOBODY
    choice: RouteChoice = RouteChoice()
    routing: Routing = field(init=False, repr=False, compare=False)
    """The same for the delivery log."""
    _namings: dict[str, Naming] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "routing", self._routing())
        object.__setattr__(self, "_namings", {})

    def naming_of(self, host: Host) -> Naming:
        """Who named one host: each host of a next hop stands for itself."""
        if host.hop is None:
            return self.naming
        naming = self._namings.get(host.name)
        if naming is None:
            naming = replace(self.naming, route_host=host.name, domains=(host.name,))
            self._namings[host.name] = naming
        return naming

    def _routing(self) -> Routing:
        naming = self.naming
        if naming.route_host is not None:
            named_by = NamedBy.ROUTE
        elif naming.is_domain_itself:
            named_by = NamedBy.DOMAIN
        else:
            is_literal = self.hosts[0].name == self.hosts[0].address
            named_by = NamedBy.ADDRESS if is_literal else NamedBy.MX
        lines = tuple(map(_line, self.hosts))
        return Routing(named_by, naming.is_secure, lines, self.choice.next_hop)


def _line(host: Host) -> str:
    """`10 mx1.example.net [192.0.2.7]`; a next hop of the operator's has no preference."""
    where = f"{host.name} [{host.address}]"
    return f"{where}:{host.port}" if host.hop is not None else f"{host.preference} {where}"


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No host to try; `outcome` is the result for the recipients. `choice`: as for `Hosts`."""

    outcome: Deferred | Bounced
    choice: RouteChoice = RouteChoice()

    @property
    def routing(self) -> Routing | None:
        """For the delivery log: the next hop that cannot be used now; None for a domain's hosts."""
        next_hop = self.choice.next_hop
        return Routing(NamedBy.ROUTE, True, (), next_hop) if next_hop else None


Route = Hosts | NoRoute


class RouteFinder(Protocol):
    """`relay.route.router.Router.route`."""

    def __call__(
        self, domain: str, /, reverse_path: str = "", next_hop: str = ""
    ) -> Awaitable[Route]:
        """Where mail for a domain goes: see `relay.route.choice.choose`."""
