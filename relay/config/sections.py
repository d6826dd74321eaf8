"""The file, section by section, as dataclasses: what it may say, and what holds where it is silent.

What a module elsewhere wants to be told in the same words is taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network
from socket import gethostname
from typing import Annotated

from relay.deliver.options import DeliveryOptions, TlsOptions, TlsReportOptions
from relay.mail.option import RELOAD, SECRET, NameKey, NotEmpty, Path, Range, TextForm
from relay.policy.rules import PolicyRules
from relay.queue.location import DEFAULT_PATH, QueueLocation
from relay.queue.retry import RetrySchedule
from relay.receive.access import Access
from relay.receive.limits import Limits
from relay.receive.spec import ListenerSpec
from relay.route.answers import TrustAd
from relay.route.memory import MemoryOptions
from relay.route.next_hop import NextHop, TokenSource
from relay.route.secret_files import SecretFileError, read_line
from relay.sign.options import DkimOptions
from relay.web.options import WebOptions


@dataclass(frozen=True, slots=True)
class ResolverSection:
    """The DNS resolver; no name server: those of /etc/resolv.conf. `trust_ad`: whether its word
    that it validated an answer (DNSSEC) is believed.
    """

    nameservers: tuple[Annotated[str, TextForm.NAMESERVER], ...] = ()
    timeout: timedelta = timedelta(seconds=10)
    trust_ad: TrustAd = TrustAd.AUTO


@dataclass(frozen=True, slots=True)
class QueueSection:
    """Where the queue is kept, and when it is tried again. `warn_after` None: no delay notice.

    `url`: the PostgreSQL server that several nodes share, instead of a directory. `node`: the name
    of this one, None: the machine's. `lease`: how long the others wait for it.
    """

    path: Path = DEFAULT_PATH
    url: Annotated[str, TextForm.QUEUE_URL, SECRET] | None = field(default=None, repr=False)
    password_file: Path | None = None
    node: Annotated[str, TextForm.NAME] | None = None
    lease: timedelta = timedelta(seconds=30)
    retry: Annotated[
        tuple[timedelta, ...],
        NotEmpty("an empty list: a deferred message would never be tried again", "name one wait"),
    ] = RetrySchedule().waits
    lifetime: timedelta = RetrySchedule().lifetime
    warn_after: timedelta | None = RetrySchedule().warn_after

    @property
    def location(self) -> QueueLocation:
        """Where these keys say that the queue is."""
        return QueueLocation(
            self.path, self.url, self._password, self.node or gethostname(), self.lease
        )

    def _password(self) -> str | None:
        """What the file says now."""
        try:
            return read_line(self.password_file) if self.password_file is not None else None
        except SecretFileError as error:
            from relay.queue.store import SpoolError

            raise SpoolError(f"queue.password_file: {error}") from error

    @property
    def schedule(self) -> RetrySchedule:
        """The retry schedule these keys make."""
        return RetrySchedule(waits=self.retry, lifetime=self.lifetime, warn_after=self.warn_after)


class LogLevel(StrEnum):
    """The least important line of the program's own log that is written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How the program's own log is written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class LogSection:
    """The delivery log (a file), and the program's own (on stderr)."""

    delivery: Path = "var/log/delivery.log"
    keep_events: timedelta = timedelta(days=7)
    keep_statistics: timedelta = timedelta(days=400)
    level: Annotated[LogLevel, RELOAD] = LogLevel.INFO
    format: LogFormat = LogFormat.TEXT


@dataclass(frozen=True, slots=True)
class AdminSection:
    """Where the operator comes in, and mail over HTTP.

    `socket_group`: whose members may use the socket, too. `http` None or empty, or neither
    `api_keys` nor users of `web`: not served. `domains`: those that may be sent from over
    HTTP, none named: any. `webhook_networks`: beside the public internet.
    """

    socket: Annotated[str, TextForm.SOCKET_PATH] = "var/run/relay.sock"
    socket_group: Annotated[str, TextForm.GROUP] | None = None
    http: Annotated[str, TextForm.HTTP_ADDRESS] | None = "127.0.0.1:8025"
    certificate: Path | None = None
    key: Path | None = None
    api_keys: Annotated[tuple[Annotated[str, TextForm.API_KEY, SECRET], ...], RELOAD] = field(
        default=(), repr=False
    )
    domains: Annotated[tuple[Annotated[str, TextForm.DOMAIN], ...], RELOAD] = ()
    webhook_signing_key: Annotated[Annotated[str, TextForm.SECRET, SECRET] | None, RELOAD] = field(
        default=None, repr=False
    )
    web: Annotated[WebOptions, RELOAD] = field(default_factory=WebOptions)
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], RELOAD] = ()

    @property
    def serves_http(self) -> bool:
        """Whether there is an HTTP server: nobody could use one without a key or a user."""
        return bool(self.http and (self.api_keys or self.web.users))


_Name = Annotated[str, TextForm.NAME]

RouteTo = Annotated[_Name | NextHop, NameKey("next_hop")]
"""Where a route leads: to a next hop of `next_hops`, or to one that stands in its place."""


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `warnings`: what is legal and still worth a word to the administrator."""

    hostname: Annotated[str, TextForm.DOMAIN] = ""
    workers: Annotated[int, Range(1, 64)] = 1
    listeners: tuple[ListenerSpec, ...] = (ListenerSpec("127.0.0.1:2525"),)
    access: Annotated[Access, RELOAD] = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    policy: Annotated[PolicyRules, RELOAD] = field(default_factory=PolicyRules)
    routes: Annotated[Mapping[Annotated[str, TextForm.ROUTE_PATTERN], RouteTo], RELOAD] = field(
        default_factory=dict
    )
    routes_by_sender: Annotated[
        Mapping[Annotated[str, TextForm.SENDER_PATTERN], RouteTo], RELOAD
    ] = field(default_factory=dict)
    next_hops: Annotated[Mapping[_Name, NextHop], RELOAD] = field(default_factory=dict)
    oauth2: Annotated[Mapping[_Name, TokenSource], RELOAD] = field(default_factory=dict)
    downgrade_memory: Annotated[MemoryOptions, RELOAD] = field(default_factory=MemoryOptions)
    resolver: ResolverSection = ResolverSection()
    tls: TlsOptions = field(default_factory=TlsOptions)
    delivery: DeliveryOptions = field(default_factory=DeliveryOptions)
    queue: QueueSection = QueueSection()
    log: LogSection = LogSection()
    admin: AdminSection = AdminSection()
    dkim: Annotated[DkimOptions, RELOAD] = field(default_factory=DkimOptions)
    tls_reports: TlsReportOptions = field(default_factory=TlsReportOptions)
    warnings: tuple[str, ...] = field(default=(), init=False, compare=False)
