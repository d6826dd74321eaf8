"""The operator's verbs for what hosts have shown of TLS, with values as JSON.

A filter selects hosts. A filter that names only a domain selects the domain with all its hosts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from relay.admin.operations import pages_of
from relay.admin.requests import RequestError, check_all, check_known, domain_in, number_in, text_in
from relay.mail.jsontext import JsonObject
from relay.mail.memory import DomainMemory, HostMemory, Run, Shown
from relay.route.memory import MemoryOptions, known_hosts, without_expired
from relay.route.suggestions import Suggestion, suggested

_FILTERS = frozenset({"domain", "host", "level", "alarm"})


class Memory(Protocol):
    """What a running relay remembers: `relay.deliver.memory.DowngradeMemory`."""

    @property
    def options(self) -> MemoryOptions: ...

    async def page(
        self, *, after: str = "", limit: int = 500
    ) -> tuple[list[DomainMemory], str | None]: ...

    async def forget(self, domain: str, host: str = "") -> bool: ...


@dataclass(frozen=True, slots=True)
class MemoryFilter:
    """Selects hosts; an empty field selects all. `alarm`: only hosts that show less than before."""

    domain: str = ""
    host: str = ""
    level: Shown | None = None
    alarm: bool = False

    def hosts(self, memory: DomainMemory) -> tuple[str, ...]:
        """The hosts of a domain that the filter selects."""
        if self.domain not in ("", memory.domain):
            return ()
        alarmed = {one.host for one in memory.alarms if one.first is not None}
        return tuple(
            name
            for name, host in memory.hosts.items()
            if self.host in ("", name)
            and self.level in (None, host.level)
            and (name in alarmed or not self.alarm)
        )

    @property
    def is_of_domain(self) -> bool:
        """Whether the filter names only a domain."""
        return self == MemoryFilter(self.domain) and self.domain != ""


def memory_filter(
    request: Mapping[str, object], *, also: frozenset[str] = frozenset()
) -> MemoryFilter:
    """The filter of a request."""
    check_known(request, _FILTERS | {"verb"} | also)
    level = text_in(request, "level")
    if level not in ("", *Shown):
        raise RequestError(f"no such level: {level}; known are {', '.join(Shown)}")
    if "alarm" in request and request["alarm"] is not True:
        raise RequestError("alarm is true, or is left out")
    return MemoryFilter(
        domain_in(request),
        domain_in(request, "host"),
        Shown(level) if level else None,
        "alarm" in request,
    )


def forget_filter(request: Mapping[str, object]) -> MemoryFilter:
    """The hosts to forget: those of a filter, or all if the request says so."""
    wanted = memory_filter(request, also=frozenset({"all"}))
    check_all(
        request, wanted == MemoryFilter(), "forget what? name a domain or a filter, or say all"
    )
    return wanted


async def list_memories(
    memory: Memory, wanted: MemoryFilter, *, now: datetime
) -> AsyncIterator[list[JsonObject]]:
    """What is remembered, by domain, in pages. What is too old is left out."""
    async for page in pages_of(memory.page):
        fresh = (without_expired(one, keep=memory.options.keep, now=now) for one in page)
        yield [memory_as_json(one, hosts) for one in fresh if (hosts := wanted.hosts(one))]


async def forget(memory: Memory, wanted: MemoryFilter) -> int:
    """Forget the selected hosts. Returns of how many domains they were."""
    if wanted.is_of_domain:  # also where its row cannot be read
        return int(await memory.forget(wanted.domain))
    found = [(one, hosts) async for one in _all(memory) if (hosts := wanted.hosts(one))]
    for one, hosts in found:
        if len(hosts) == len(one.hosts):
            await memory.forget(one.domain)
        else:
            for host in hosts:
                await memory.forget(one.domain, host)
    return len(found)


async def suggest(
    memory: Memory, *, messages: int, age: timedelta, now: datetime
) -> AsyncIterator[JsonObject]:
    """For each domain a suggested rule, or the reason why there is none."""
    keep = memory.options.keep
    async for one in _all(memory):
        if not known_hosts(one, keep=keep, now=now):
            continue
        found = suggested(one, keep=keep, messages=messages, age=age, now=now)
        if isinstance(found, Suggestion):
            yield suggestion_as_json(found)
        else:
            yield {"domain": one.domain, "reason": found.value}


def suggestion_bounds(request: Mapping[str, object]) -> tuple[int, timedelta]:
    """The least number of messages, and the least time, that a suggestion needs."""
    check_known(request, frozenset({"verb", "messages", "seconds"}))
    messages, seconds = number_in(request, "messages"), number_in(request, "seconds")
    least = 10 if messages is None else int(messages)
    return least, timedelta(days=7) if seconds is None else timedelta(seconds=seconds)


async def _all(memory: Memory) -> AsyncIterator[DomainMemory]:
    async for page in pages_of(memory.page):
        for one in page:
            yield one


def memory_as_json(memory: DomainMemory, hosts: tuple[str, ...]) -> JsonObject:
    """What is remembered of a domain and of these of its hosts."""
    return {
        "domain": memory.domain,
        "first": _time(memory.first),
        "last": _time(memory.last),
        "in-tls": _run(memory.in_tls),
        "in-full": _run(memory.in_full),
        "hosts": [_host(name, memory.hosts[name]) for name in hosts],
        "alarms": [
            {
                "host": one.host,
                "before": one.before.value,
                "now": one.now.value,
                "by": "new-host" if one.is_new_host else "host",
                "first": _time(one.first),
                "told": _time(one.told),
            }
            for one in memory.alarms
            if one.first is not None and one.host in hosts
        ],
    }


def suggestion_as_json(found: Suggestion) -> JsonObject:
    """A suggested rule, and the mail that would have met it."""
    return {
        "domain": found.domain,
        "rule": {"require_tls": True}
        | ({"skip_verification": True} if found.skip_verification else {}),
        "messages": found.messages,
        "first": _time(found.first),
        "last": _time(found.last),
        "hosts": list(found.hosts),
    }


def _run(run: Run) -> JsonObject:
    return {"messages": run.messages, "since": _time(run.since)}


def _host(name: str, host: HostMemory) -> JsonObject:
    return {
        "host": name,
        "level": host.level.value,
        "seen": _time(host.seen),
        "less": host.less.level.value if host.less is not None else None,
        "less-since": _time(host.less.since) if host.less is not None else None,
    }


def _time(at: datetime | None) -> str | None:
    return at.isoformat(timespec="seconds") if at is not None else None
