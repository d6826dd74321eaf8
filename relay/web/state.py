"""The parts of the relay that the pages use. The daemon makes them of the configuration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from relay.admin.mta_sts import Policies
from relay.admin.operator import Operator
from relay.mail.event import Event
from relay.policy.rules import PolicyRules
from relay.queue.store import QueueView
from relay.submit.failures import Failures
from relay.web.options import WebOptions

Caught = Callable[[str], bytes | None]
"""In the demonstration: the content of a message as its mail host received it, by queue id."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The state of the relay. `certificates`: when the certificate in each file expires.

    `trouble`: sentences. `commit_seconds`: the mean time to commit a result; None before the first.
    `silent`: until when each silent destination is not tried.
    """

    version: str
    workers: int
    started: datetime
    free_bytes: int
    log_lag_events: int
    certificates: Mapping[str, datetime] = field(default_factory=dict)
    trouble: Sequence[str] = ()
    commit_seconds: float | None = None
    in_flight: int = 0
    silent: Mapping[str, str] = field(default_factory=dict)
    nameservers: Sequence[str] = ()
    validates: bool | None = None
    """Whether the resolver validates DNSSEC; None: not known."""


@dataclass(frozen=True, slots=True)
class Web:
    """`locations`: file and line of each key of the policy. `last_reload`: when, and what changed.

    `configuration`: the one in effect, without secrets, as YAML. `failures`: counts wrong
    passwords, also those at the listeners. `note`: a sentence on every page.
    """

    operator: Operator
    hostname: str
    options: Callable[[], WebOptions]
    rules: Callable[[], PolicyRules]
    facts: Callable[[], Awaitable[Facts]]
    policies: Policies
    write_event: Callable[[Event], Awaitable[None]]
    configuration: Callable[[], str] = lambda: ""
    locations: Callable[[], Mapping[str, str]] = dict
    last_reload: Callable[[], tuple[datetime, str] | None] = lambda: None
    failures: Failures = field(default_factory=Failures)
    note: Callable[[], str] = lambda: ""
    caught: Caught | None = None

    @property
    def view(self) -> QueueView:
        """The queue and the log, for reading."""
        return self.operator.view

    def clock(self) -> datetime:
        """Now."""
        return self.operator.clock()
