"""The file, section by section, as dataclasses: what it may say, and what holds where it is silent.

What a module elsewhere wants to be told in the same words is taken from there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from relay.policy.rules import PolicyRules
from relay.receive.access import Access
from relay.receive.limits import Limits
from relay.receive.spec import ListenerSpec
from relay.route.next_hop import StaticRoute


@dataclass(frozen=True, slots=True)
class ResolverSection:
    """Whom we ask for names; nobody named: /etc/resolv.conf."""

    nameservers: tuple[str, ...] = ()
    timeout: timedelta = timedelta(seconds=10)


class TlsVersion(StrEnum):
    """The TLS versions there are to choose from, oldest first."""

    TLS_1_0 = "TLSv1"
    TLS_1_1 = "TLSv1.1"
    TLS_1_2 = "TLSv1.2"
    TLS_1_3 = "TLSv1.3"


@dataclass(frozen=True, slots=True)
class TlsSection:
    """TLS towards the next hop. `ca_file` None: the system's roots."""

    ca_file: str | None = None
    min_version: TlsVersion = TlsVersion.TLS_1_2
    opportunistic_min_version: TlsVersion = TlsVersion.TLS_1_0


@dataclass(frozen=True, slots=True)
class TimeoutsSection:
    """How long each step with a next hop may take (RFC 5321 §4.5.3.2)."""

    connect: timedelta = timedelta(seconds=30)
    greeting: timedelta = timedelta(minutes=5)
    command: timedelta = timedelta(minutes=5)
    data_block: timedelta = timedelta(minutes=3)
    final_reply: timedelta = timedelta(minutes=10)
    tls_handshake: timedelta = timedelta(seconds=30)


class OnTlsUnmet(StrEnum):
    """What becomes of a message whose TLS no host can give."""

    DEFER = "defer"
    BOUNCE = "bounce"


class OnUnverified(StrEnum):
    """What is done where TLS is not required and a certificate does not verify."""

    PLAINTEXT = "plaintext"
    ENCRYPTED = "encrypted"


@dataclass(frozen=True, slots=True)
class DeliverySection:
    """How mail goes out."""

    port: int = 25
    concurrency: int = 200
    concurrency_per_destination: int = 20
    allow_networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    timeouts: TimeoutsSection = TimeoutsSection()
    on_tls_unmet: OnTlsUnmet = OnTlsUnmet.DEFER
    on_unverified: OnUnverified = OnUnverified.PLAINTEXT


@dataclass(frozen=True, slots=True)
class QueueSection:
    """Where the queue is kept, and when it is tried again. `warn_after` None: no delay notice."""

    path: str = "var/spool"
    url: str | None = None
    retry: tuple[timedelta, ...] = (
        timedelta(minutes=5),
        timedelta(minutes=10),
        timedelta(minutes=30),
        timedelta(hours=1),
        timedelta(hours=2),
        timedelta(hours=4),
    )
    lifetime: timedelta = timedelta(days=5)
    warn_after: timedelta | None = timedelta(hours=4)


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

    delivery: str = "var/log/delivery.log"
    keep_events: timedelta = timedelta(days=7)
    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.TEXT


@dataclass(frozen=True, slots=True)
class AdminSection:
    """Where the operator comes in."""

    socket: str = "var/run/relay.sock"
    http: str | None = "127.0.0.1:8025"
    api_keys: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `warnings`: what is legal and still worth a word to the administrator."""

    hostname: str = ""
    workers: int = 1
    listeners: tuple[ListenerSpec, ...] = (ListenerSpec("127.0.0.1:2525"),)
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    policy: PolicyRules = field(default_factory=PolicyRules)
    routes: Mapping[str, StaticRoute] = field(default_factory=dict)
    resolver: ResolverSection = ResolverSection()
    tls: TlsSection = TlsSection()
    delivery: DeliverySection = DeliverySection()
    queue: QueueSection = QueueSection()
    log: LogSection = LogSection()
    admin: AdminSection = AdminSection()
    warnings: tuple[str, ...] = field(default=(), init=False, compare=False)
