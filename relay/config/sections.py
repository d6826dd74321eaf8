"""The file, section by section, as dataclasses: what it may say, and what holds where it is silent.

What a module elsewhere wants to be told in the same words is taken from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from relay.deliver.options import DeliveryOptions, TlsOptions
from relay.policy.rules import PolicyRules
from relay.queue.retry import RetrySchedule
from relay.receive.access import Access
from relay.receive.limits import Limits
from relay.receive.spec import ListenerSpec
from relay.route.next_hop import StaticRoute
from relay.sign.options import DkimOptions


@dataclass(frozen=True, slots=True)
class ResolverSection:
    """Whom we ask for names; nobody named: /etc/resolv.conf."""

    nameservers: tuple[str, ...] = ()
    timeout: timedelta = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class QueueSection:
    """Where the queue is kept, and when it is tried again. `warn_after` None: no delay notice."""

    path: str = "var/spool"
    url: str | None = None
    retry: tuple[timedelta, ...] = RetrySchedule().waits
    lifetime: timedelta = RetrySchedule().lifetime
    warn_after: timedelta | None = RetrySchedule().warn_after

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

    delivery: str = "var/log/delivery.log"
    keep_events: timedelta = timedelta(days=7)
    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.TEXT


@dataclass(frozen=True, slots=True)
class AdminSection:
    """Where the operator comes in, and mail over HTTP.

    `http` None or empty, or no `api_keys`: not served. `domains`: those that may be sent from over
    HTTP, none named: any.
    """

    socket: str = "var/run/relay.sock"
    http: str | None = "127.0.0.1:8025"
    certificate: str | None = None
    key: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    domains: tuple[str, ...] = ()
    webhook_signing_key: str | None = field(default=None, repr=False)

    @property
    def serves_http(self) -> bool:
        """Whether there is an HTTP interface: nobody could use one without a key."""
        return bool(self.http and self.api_keys)


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
    tls: TlsOptions = field(default_factory=TlsOptions)
    delivery: DeliveryOptions = field(default_factory=DeliveryOptions)
    queue: QueueSection = QueueSection()
    log: LogSection = LogSection()
    admin: AdminSection = AdminSection()
    dkim: DkimOptions = field(default_factory=DkimOptions)
    warnings: tuple[str, ...] = field(default=(), init=False, compare=False)
