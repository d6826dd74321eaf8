"""The operator's verbs for what hosts have shown of TLS before, in the values of the interface's
JSON.

A filter means hosts: all of a domain's where it names only the domain, else those that match.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

from relay.admin.requests import RequestError, check_known, domain_in, text_in
from relay.mail.memory import DomainMemory, HostMemory, Run, Shown
from relay.route.memory import MemoryOptions, known_hosts, without_expired
from relay.route.suggestions import Suggestion, suggested

__all__ = [
    "Memory",
    "MemoryFilter",
    "forget",
    "forget_filter",
    "list_memories",
    "memory_as_json",
    "memory_filter",
    "suggest",
    "suggestion_bounds",
]

_FILTERS = frozenset({"domain", "host", "level", "alarm"})


class Memory(Protocol):
    """What is remembered by a running relay: `relay.deliver.memory.DowngradeMemory`."""

    @property
    def options(self) -> MemoryOptions: ...

    async def page(
        self, *, after: str = "", limit: int = 500
    ) -> tuple[list[DomainMemory], str | None]: ...

    async def forget(self, domain: str, host: str = "") -> bool: ...


@dataclass(frozen=True, slots=True)
class MemoryFilter:
    """Hosts of what is remembered. `alarm`: those that show less than before, now."""

    domain: str = ""
    host: str = ""
    level: Shown | None = None
    alarm: bool = False

    def hosts(self, memory: DomainMemory) -> tuple[str, ...]:
        """The hosts of a domain that are meant."""
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
        """Whether it means a domain, whatever is remembered of it."""
        return self == MemoryFilter(self.domain) and self.domain != ""


def memory_filter(
    request: Mapping[str, Any], *, also: frozenset[str] = frozenset()
) -> MemoryFilter:
    """The hosts a request means."""
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


def forget_filter(request: Mapping[str, Any]) -> MemoryFilter:
    """The hosts to forget: those of a filter, or all where just that is said."""
    wanted = memory_filter(request, also=frozenset({"all"}))
    if "all" in request and request["all"] is not True:
        raise RequestError("all is true, or is left out")
    if (wanted == MemoryFilter()) != ("all" in request):
        raise RequestError("forget what? name a domain or a filter, or else say all")
    return wanted


async def list_memories(
    memory: Memory, wanted: MemoryFilter, *, now: datetime
) -> AsyncIterator[list[dict[str, Any]]]:
    """What is remembered, by domain, in pages; what is too old is left out."""
    async for page in _pages(memory):
        fresh = (without_expired(one, keep=memory.options.keep, now=now) for one in page)
        yield [memory_as_json(one, hosts) for one in fresh if (hosts := wanted.hosts(one))]


async def forget(memory: Memory, wanted: MemoryFilter) -> int:
    """Forget what is meant; of how many domains it was."""
    if wanted.is_of_domain:  # whatever its row says
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
) -> AsyncIterator[dict[str, Any]]:
    """A suggestion, or the reason why there is none, for each domain that is remembered."""
    keep = memory.options.keep
    async for one in _all(memory):
        if not known_hosts(one, keep=keep, now=now):
            continue
        found = suggested(one, keep=keep, messages=messages, age=age, now=now)
        if isinstance(found, Suggestion):
            yield suggestion_as_json(found)
        else:
            yield {"domain": one.domain, "reason": found.value}


def suggestion_bounds(request: Mapping[str, Any]) -> tuple[int, timedelta]:
    """The least number of messages, and the least time, that a suggestion goes by."""
    check_known(request, frozenset({"verb", "messages", "seconds"}))
    messages, seconds = request.get("messages", 10), request.get("seconds", 7 * 86400)
    for key, value in (("messages", messages), ("seconds", seconds)):
        if type(value) not in (int, float) or not 0 <= value <= 1e9:
            raise RequestError(f"{key} is a number")
    return int(messages), timedelta(seconds=seconds)


async def _pages(memory: Memory) -> AsyncIterator[list[DomainMemory]]:
    after: str | None = ""
    while after is not None:
        page, after = await memory.page(after=after)
        yield page


async def _all(memory: Memory) -> AsyncIterator[DomainMemory]:
    async for page in _pages(memory):
        for one in page:
            yield one


def memory_as_json(memory: DomainMemory, hosts: tuple[str, ...]) -> dict[str, Any]:
    """What is remembered of a domain, and of these hosts of it."""
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


def suggestion_as_json(found: Suggestion) -> dict[str, Any]:
    """A rule, and the mail that would have met it."""
    return {
        "domain": found.domain,
        "rule": {"require_tls": True}
        | ({"skip_verification": True} if found.skip_verification else {}),
        "messages": found.messages,
        "first": _time(found.first),
        "last": _time(found.last),
        "hosts": list(found.hosts),
    }


def _run(run: Run) -> dict[str, Any]:
    return {"messages": run.messages, "since": _time(run.since)}


def _host(name: str, host: HostMemory) -> dict[str, Any]:
    return {
        "host": name,
        "level": host.level.value,
        "seen": _time(host.seen),
        "less": host.less.level.value if host.less is not None else None,
        "less-since": _time(host.less.since) if host.less is not None else None,
    }


def _time(at: datetime | None) -> str | None:
    return at.isoformat(timespec="seconds") if at is not None else None
