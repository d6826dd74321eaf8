"""What mail hosts have shown of TLS: the values that delivery, store and log share.

`relay.route.memory` decides by these values, `relay.queue.memory` keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class Shown(StrEnum):
    """What a host has shown of TLS in a session that carried mail, from least to most."""

    NONE = "none"
    ENCRYPTED = "encrypted"
    VERIFIED = "verified"
    """By authorities or by TLSA records."""

    rank: int
    """The greater, the better protected."""


for _rank, _level in enumerate(Shown):
    _level.rank = _rank


@dataclass(frozen=True, slots=True)
class DowngradeAlarm:
    """A message is about to go, or would go, with less TLS than a host has shown before.

    `host`: the host that showed more; `since`: when it last showed `before`.
    """

    before: Shown
    now: Shown
    host: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Less:
    """The most that a host has shown since it first showed less than its `HostMemory.level`."""

    level: Shown
    since: datetime


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What one host has shown. `seen`: when it last showed `level`. `less`: what it shows now,
    None where it still shows `level`.
    """

    level: Shown
    seen: datetime
    less: Less | None = None


@dataclass(frozen=True, slots=True)
class KeptAlarm:
    """An alarm that was raised. `host`: the host that showed more. `is_new_host`: a host that was
    not known before showed less than every known host. `first`: when the alarm was first raised;
    None after the host has shown `before` again. `told`: when the operator was last told.
    """

    host: str
    before: Shown
    now: Shown
    is_new_host: bool
    first: datetime | None
    told: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """A number of consecutive messages. `since`: the time of the first."""

    messages: int
    since: datetime


@dataclass(frozen=True, slots=True)
class DomainMemory:
    """What the hosts of a recipient domain have shown, by the name of the host.

    `first`, `last`: the times of its first and last message. `in_tls`: the messages in TLS since
    the last one in clear. `in_full`: the messages with as much TLS as their settings allow, since
    the last one with less. A message with TLS-Required: No that went with less does not count.
    """

    domain: str
    first: datetime
    last: datetime
    in_tls: Run
    in_full: Run
    hosts: Mapping[str, HostMemory] = field(default_factory=dict)
    alarms: tuple[KeptAlarm, ...] = ()


@dataclass(slots=True)
class Sighting:
    """What a host showed in sessions that carried mail, until this is written to the store.

    `most`: the most that the relay could have seen: `encrypted` where it checked no certificate,
    `none` where the message ignores what hosts have shown. `first`, `last`: the times of the first
    and last session; `messages`: how many messages. `is_old`: the version of TLS was too old for a
    message that requires TLS.
    """

    host: str
    shown: Shown
    most: Shown
    first: datetime
    last: datetime
    messages: int = 1
    is_old: bool = False

    def again(self, at: datetime) -> None:
        """Count one more message, in a session in which the host showed the same."""
        self.last = max(self.last, at)
        self.messages += 1

    def joined(self, later: Sighting) -> Sighting:
        """This and another sighting of the same host, in which it showed the same, as one."""
        return Sighting(
            self.host,
            self.shown,
            self.most,
            min(self.first, later.first),
            max(self.last, later.last),
            self.messages + later.messages,
            self.is_old,
        )
