"""Downgrade memory: what a mail host has shown of TLS before, held against what it shows now.

Most domains publish neither MTA-STS nor TLSA records. Who is on the path to such a domain strips
STARTTLS, and mail goes in clear. But the relay was there before: a host that has always been
verified, and today offers nothing, is worth an alarm, or a day's wait.

    a session carried mail        `learned`: the best of none < encrypted < verified, when last seen
    before a host gets mail       `recalled`: what is held against this host
    it gets mail with less        `alarm_of`; `rung` says whether the alarm is told now
    action: defer                 `held_until`: until then the earlier level is required as a floor

Held against a host is what it has shown itself; against a host that is not known yet, what every
known host of the domain has shown. Mail with skip_verification shows `encrypted` at most and is
held against that alone. One session with more ends an alarm. Less, for `_NEW_NORMAL` and never
more, is what is remembered then. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from relay.mail.memory import (
    DomainMemory,
    DowngradeAlarm,
    HostMemory,
    KeptAlarm,
    Less,
    Run,
    Shown,
    Sighting,
)
from relay.policy.settings import MemoryAction

_NEW_NORMAL = timedelta(days=7)
_TOLD_AGAIN = timedelta(days=1)
MOST_HOSTS = 64
"""Hosts remembered of a domain: forged MX records can name any number of them."""


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """What is done with the memory. `keep`: what was not seen for so long is forgotten.
    `defer_for`: how long mail waits after the first alarm.
    """

    action: MemoryAction = MemoryAction.LOG
    keep: timedelta = timedelta(days=90)
    defer_for: timedelta = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Recalled:
    """What is held against a host. `host`: whose memory it is, another's if `is_new_host`."""

    before: Shown
    host: str
    since: datetime
    is_new_host: bool


def most_of(*, verify: bool, is_waived: bool) -> Shown:
    """The most that can be seen of a host by a message: whether its certificate is looked at by
    the message's own settings; `is_waived`: by TLS-Required: No, which memory does not hold.
    """
    if is_waived:
        return Shown.NONE
    return Shown.VERIFIED if verify else Shown.ENCRYPTED


def known_hosts(memory: DomainMemory, *, keep: timedelta, now: datetime) -> dict[str, HostMemory]:
    """The hosts that are not forgotten yet."""
    return {name: one for name, one in memory.hosts.items() if one.seen > now - keep}


def recalled(
    memory: DomainMemory | None, host: str, most: Shown, *, keep: timedelta, now: datetime
) -> Recalled | None:
    """What is held against a host; None where that is nothing."""
    if memory is None:
        return None
    found = memory.hosts.get(host)
    is_known = found is not None and found.seen > now - keep
    if found is None or not is_known:
        known = known_hosts(memory, keep=keep, now=now)
        if not known:
            return None
        host = min(known, key=lambda name: _weakest_first(name, known[name]))
        found = known[host]
    before = _least(found.level, most)
    if before is Shown.NONE:
        return None
    return Recalled(before, host, found.seen, is_new_host=not is_known)


def alarm_of(found: Recalled | None, shown: Shown) -> DowngradeAlarm | None:
    """The alarm that mail rings which goes with this much; None: it does not go with less."""
    if found is None or shown.rank >= found.before.rank:
        return None
    return DowngradeAlarm(found.before, shown, found.host, found.since)


def held_until(
    memory: DomainMemory, found: Recalled, *, defer_for: timedelta, now: datetime
) -> datetime | None:
    """Until when mail waits rather than to go with less; None: it does not wait any more.

    Before the first alarm the wait has not begun yet: it would last from now.
    """
    rang = [
        alarm.first
        for alarm in memory.alarms
        if alarm.first is not None
        and alarm.before is found.before
        and (alarm.host, alarm.is_new_host) == (found.host, found.is_new_host)
    ]
    until = min(rang, default=now) + defer_for
    return until if now < until else None


def rung(
    memory: DomainMemory, alarm: DowngradeAlarm, *, is_new_host: bool, now: datetime
) -> tuple[DomainMemory, bool]:
    """The memory after an alarm, and whether the alarm is told: once a day for a host, what it
    showed before and what it shows now. The very same memory where there is nothing to write down.
    """
    alike = [kept for kept in memory.alarms if _is_of(kept, alarm)]
    told = max((kept.told for kept in alike), default=None)
    is_told = told is None or told <= now - _TOLD_AGAIN
    old = next((kept for kept in alike if kept.is_new_host is is_new_host), None)
    first = old.first if old is not None else None
    if first is not None and not is_told:
        return memory, False
    new = KeptAlarm(
        alarm.host,
        alarm.before,
        alarm.now,
        is_new_host,
        first or now,
        now if told is None or is_told else told,
    )
    others = tuple(kept for kept in memory.alarms if kept is not old)
    return replace(memory, alarms=(*others, new)), is_told


def is_as_known(memory: DomainMemory, host: str, shown: Shown) -> bool:
    """Whether what a host has shown changes numbers and times only, and can be written later."""
    known = memory.hosts.get(host)
    return (
        known is not None
        and known.level is shown
        and known.less is None
        and all(alarm.first is None for alarm in memory.alarms)
    )


def learned(
    memory: DomainMemory | None, domain: str, seen: Sighting, *, keep: timedelta
) -> DomainMemory:
    """The memory of a domain after sessions that carried mail."""
    now = seen.last
    if memory is None:
        run = Run(0, seen.first)
        memory = DomainMemory(domain, seen.first, now, run, run)
    memory = without_expired(memory, keep=keep, now=now)
    hosts = dict(memory.hosts)
    hosts[seen.host] = _host_after(hosts.get(seen.host), seen)
    if len(hosts) > MOST_HOSTS:
        del hosts[
            min((name for name in hosts if name != seen.host), key=lambda n: _removal(hosts[n]))
        ]
    alarms = tuple(
        _alarm_after(alarm, seen) for alarm in memory.alarms if _is_kept(alarm, hosts, now)
    )
    # The settings of waived mail say nothing of certificates: only verified TLS is enough.
    full = Shown.VERIFIED if seen.most is Shown.NONE else seen.most
    is_in_tls = seen.shown is not Shown.NONE and not seen.is_old
    is_in_full = seen.shown.rank >= full.rank and not seen.is_old
    return replace(
        memory,
        last=max(memory.last, now),
        in_tls=_run_after(memory.in_tls, seen, goes_on=is_in_tls),
        in_full=_run_after(memory.in_full, seen, goes_on=is_in_full),
        hosts=hosts,
        alarms=alarms,
    )


def without_expired(memory: DomainMemory, *, keep: timedelta, now: datetime) -> DomainMemory:
    """The memory without hosts that are forgotten by now, and without their alarms."""
    hosts = known_hosts(memory, keep=keep, now=now)
    if len(hosts) == len(memory.hosts):
        return memory
    alarms = tuple(alarm for alarm in memory.alarms if alarm.host in hosts)
    return replace(memory, hosts=hosts, alarms=alarms)


def without_host(memory: DomainMemory | None, host: str) -> DomainMemory | None:
    """The memory without one host and its alarms; None where no host is left."""
    if memory is None or not memory.hosts.keys() - {host}:
        return None
    hosts = {name: one for name, one in memory.hosts.items() if name != host}
    alarms = tuple(alarm for alarm in memory.alarms if alarm.host != host)
    return replace(memory, hosts=hosts, alarms=alarms)


def _host_after(known: HostMemory | None, seen: Sighting) -> HostMemory:
    if known is None:
        return HostMemory(seen.shown, seen.last)
    if seen.shown.rank >= known.level.rank:
        if known.less is not None and known.less.since > seen.last:
            return known  # another worker saw less after that, and wrote it down before
        return HostMemory(seen.shown, max(seen.last, known.seen))
    if seen.shown.rank >= seen.most.rank and known.less is None:
        return known  # no more could be seen
    if known.less is None:
        return replace(known, less=Less(seen.shown, seen.first))
    most = _greatest(known.less.level, seen.shown)
    if seen.last - known.less.since >= _NEW_NORMAL:
        return HostMemory(most, seen.last)
    return replace(known, less=replace(known.less, level=most))


def _alarm_after(alarm: KeptAlarm, seen: Sighting) -> KeptAlarm:
    """An alarm ends when its host shows as much as before; one about a new host, when any host of
    the domain does. When it was told is kept: it is not told twice a day.
    """
    is_about = alarm.is_new_host or alarm.host == seen.host
    if (
        is_about
        and alarm.first is not None
        and alarm.first <= seen.last
        and seen.shown.rank >= alarm.before.rank
    ):
        return replace(alarm, first=None)
    return alarm


def _is_kept(alarm: KeptAlarm, hosts: Mapping[str, HostMemory], now: datetime) -> bool:
    """Whether an alarm matters still: it is under way, or was told within the day."""
    host = hosts.get(alarm.host)
    if host is None or host.level.rank < alarm.before.rank:
        return False
    return alarm.first is not None or alarm.told > now - _TOLD_AGAIN


def _run_after(run: Run, seen: Sighting, *, goes_on: bool) -> Run:
    """Waived mail with less is no exception, and is not counted either."""
    if goes_on:
        return replace(run, messages=run.messages + seen.messages)
    return run if seen.most is Shown.NONE else Run(0, seen.last)


def _is_of(kept: KeptAlarm, alarm: DowngradeAlarm) -> bool:
    return (kept.host, kept.before, kept.now) == (alarm.host, alarm.before, alarm.now)


def _least(one: Shown, other: Shown) -> Shown:
    return one if one.rank <= other.rank else other


def _greatest(one: Shown, other: Shown) -> Shown:
    return one if one.rank >= other.rank else other


def _weakest_first(name: str, host: HostMemory) -> tuple[int, float, str]:
    return host.level.rank, -host.seen.timestamp(), name


def _removal(host: HostMemory) -> tuple[int, float]:
    """The order of removal: the host with the lowest level first, then the one not seen longest."""
    return host.level.rank, host.seen.timestamp()
