"""Rules for recipient domains that the mail of before would have met: `relay policy suggest`.

    every message went verified, or as its sender's skip_verification let it   require_tls
    every message went in TLS                                                  require_tls and
                                                                               skip_verification

What went before the last exception does not count: a domain that has had TLS for a month is one
that has TLS. Mail that went with less by TLS-Required: No does not count either: it would go under
the rule, too. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from relay.mail.memory import DomainMemory, Run, Shown
from relay.route.memory import known_hosts


class Reason(StrEnum):
    """Why no rule is suggested for a domain."""

    CLEAR = "in-clear"
    """The latest mail went in clear, or some host of it is known for that."""
    ALARM = "alarm"
    """A host of it shows less than before, now."""
    FEW = "too-few"
    """Too few messages since the last exception, or too short a time."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A rule with `require_tls: true`, and what it would have met: so many messages, from the first
    to the last, at these hosts.
    """

    domain: str
    skip_verification: bool
    messages: int
    first: datetime
    last: datetime
    hosts: tuple[str, ...]


def suggested(
    memory: DomainMemory, *, keep: timedelta, messages: int, age: timedelta, now: datetime
) -> Suggestion | Reason:
    """The strictest rule that no message since the last exception would have failed. `messages`,
    `age`: the least to go by.
    """
    known = known_hosts(memory, keep=keep, now=now)
    if any(alarm.first is not None and alarm.host in known for alarm in memory.alarms):
        return Reason.ALARM
    if not known:
        return Reason.FEW
    levels = {host.level for host in known.values()}
    if levels == {Shown.VERIFIED} and _is_enough(memory.in_full, memory, messages, age):
        return _suggestion(memory, memory.in_full, tuple(sorted(known)), skip_verification=False)
    if Shown.NONE in levels or not memory.in_tls.messages:
        return Reason.CLEAR
    if not _is_enough(memory.in_tls, memory, messages, age):
        return Reason.FEW
    return _suggestion(memory, memory.in_tls, tuple(sorted(known)), skip_verification=True)


def _is_enough(run: Run, memory: DomainMemory, messages: int, age: timedelta) -> bool:
    return run.messages >= messages and memory.last - run.since >= age


def _suggestion(
    memory: DomainMemory, run: Run, hosts: tuple[str, ...], *, skip_verification: bool
) -> Suggestion:
    return Suggestion(memory.domain, skip_verification, run.messages, run.since, memory.last, hosts)
