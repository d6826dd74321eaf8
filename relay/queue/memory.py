"""What hosts have shown of TLS, as the store keeps it: a row a recipient domain, for all workers.

Here are the store's promise and the text of a row; `relay.route.memory` says what is remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Protocol

from relay.mail.jsontext import JsonFields
from relay.mail.memory import DomainMemory, HostMemory, KeptAlarm, Less, Run, Shown
from relay.queue.rows import micros, moment
from relay.queue.store import SpoolError

Change = Callable[[DomainMemory | None], DomainMemory | None]
"""From what is kept of a domain to what is to be kept; None: nothing."""


class MemoryStore(Protocol):
    """All methods may raise `SpoolError`; what one that changes returned from is committed and
    synced.
    """

    async def memory(self, domain: str) -> DomainMemory | None:
        """What is kept of a domain."""

    async def change(self, changes: Mapping[str, Change]) -> dict[str, DomainMemory | None]:
        """Change what is kept of domains, in one transaction: each change is told what is kept at
        that moment, by whichever worker. What is kept then.
        """

    async def forget(self, domain: str) -> bool:
        """Forget a domain, whatever its row says; whether there was one."""

    async def page(self, *, after: str = "", limit: int = 500) -> list[DomainMemory]:
        """A page of all, by domain."""

    async def purge(self, *, seen_before: datetime, most: int) -> int:
        """Forget domains of which nothing was seen since, and beyond `most` those seen longest ago;
        how many.
        """

    async def close(self) -> None:
        """Let the file go."""


def to_row(memory: DomainMemory) -> str:
    """The text of a row."""
    return json.dumps(
        {
            "first": micros(memory.first),
            "last": micros(memory.last),
            "in-tls": [memory.in_tls.messages, micros(memory.in_tls.since)],
            "in-full": [memory.in_full.messages, micros(memory.in_full.since)],
            "hosts": {
                name: [host.level, micros(host.seen), *_less_in_row(host.less)]
                for name, host in memory.hosts.items()
            },
            "alarms": [
                [
                    one.host,
                    one.before,
                    one.now,
                    one.is_new_host,
                    _micros(one.first),
                    micros(one.told),
                ]
                for one in memory.alarms
            ],
        },
        separators=(",", ":"),
    )


def from_row(domain: str, text: str, *, file: str = "") -> DomainMemory:
    """What a row says. `SpoolError` where it cannot be read, which names the file it is in."""
    try:
        return _read(domain, json.loads(text))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        text = f"the memory of {domain} cannot be read ({error}): `relay memory forget {domain}`"
        raise SpoolError(f"{file}: {text}" if file else text) from error


def _read(domain: str, row: JsonFields) -> DomainMemory:
    return DomainMemory(
        domain,
        moment(row["first"]),
        moment(row["last"]),
        _run(*row["in-tls"]),
        _run(*row["in-full"]),
        {name: _host(*host) for name, host in row["hosts"].items()},
        tuple(_alarm(*alarm) for alarm in row["alarms"]),
    )


def _run(messages: int, since: int) -> Run:
    return Run(messages, moment(since))


def _less_in_row(less: Less | None) -> list[object]:
    return [] if less is None else [less.level, micros(less.since)]


def _host(level: str, seen: int, *less: Any) -> HostMemory:
    return HostMemory(Shown(level), moment(seen), _less(*less) if less else None)


def _less(level: str, since: int) -> Less:
    return Less(Shown(level), moment(since))


def _alarm(
    host: str, before: str, now: str, is_new_host: bool, first: int | None, told: int
) -> KeptAlarm:
    return KeptAlarm(host, Shown(before), Shown(now), is_new_host, _moment(first), moment(told))


def _micros(at: datetime | None) -> int | None:
    return None if at is None else micros(at)


def _moment(at: int | None) -> datetime | None:
    return None if at is None else moment(at)
