"""What mail hosts have shown of TLS before: the values that delivery, store and log have in common.

`relay.route.memory` decides by them, `relay.queue.memory` keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

__all__ = [
    "DomainMemory",
    "DowngradeAlarm",
    "HostMemory",
    "KeptAlarm",
    "Less",
    "Run",
    "Shown",
    "Sighting",
]


class Shown(StrEnum):
    """What a host has shown of TLS in a session that carried mail, the least first."""

    NONE = "none"
    ENCRYPTED = "encrypted"
    VERIFIED = "verified"
    """By authorities or by TLSA records."""

    rank: int
    """Of two, the greater is the better."""


for _rank, _level in enumerate(Shown):
    _level.rank = _rank


@dataclass(frozen=True, slots=True)
class DowngradeAlarm:
    """Mail is about to go, or would go, with less than a host has shown before.

    `host`: whose memory it is; `since`: when the host was last seen to show `before`.
    """

    before: Shown
    now: Shown
    host: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Less:
    """The most a host has shown since it first showed less than is remembered of it."""

    level: Shown
    since: datetime


@dataclass(frozen=True, slots=True)
class HostMemory:
    """What one host has shown. `seen`: when it last showed that much. `less`: what it shows now,
    None where that is as much.
    """

    level: Shown
    seen: datetime
    less: Less | None = None


@dataclass(frozen=True, slots=True)
class KeptAlarm:
    """An alarm that rang. `host`: whose memory it is; `is_new_host`: another host, not known yet,
    showed less than every known one. `first`: when it first rang, None since the host has shown
    `before` again. `told`: when it was last told.
    """

    host: str
    before: Shown
    now: Shown
    is_new_host: bool
    first: datetime | None
    told: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """So many messages one after the other, since then."""

    messages: int
    since: datetime


@dataclass(frozen=True, slots=True)
class DomainMemory:
    """All that is remembered of a recipient domain, by the name of the mail host.

    `first`, `last`: of its messages. `in_tls`: the messages in TLS since the last one that went in
    clear; `in_full`: those with as much as their settings let them have, since the last one that
    went with less. Waived mail (TLS-Required: No) that went with less is in neither, and ends none.
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
    """What a host showed in sessions that carried mail. It grows until it is written down.

    `most`: the most that could be seen in them: encrypted where nobody looked at certificates,
    none where memory is not held against the mail. `first`, `last`: when; `messages`: how many.
    `is_old`: in a version of TLS that mail which requires TLS would not have gone with.
    """

    host: str
    shown: Shown
    most: Shown
    first: datetime
    last: datetime
    messages: int = 1
    is_old: bool = False

    def again(self, at: datetime) -> None:
        """The same, in one more session, for one more message."""
        self.last = max(self.last, at)
        self.messages += 1

    def joined(self, later: Sighting) -> Sighting:
        """This one with another of the same host and kind."""
        return Sighting(
            self.host,
            self.shown,
            self.most,
            min(self.first, later.first),
            max(self.last, later.last),
            self.messages + later.messages,
            self.is_old,
        )
