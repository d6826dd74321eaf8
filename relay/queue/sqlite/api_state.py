"""`relay.queue.api_state.ApiState` in the queue's own SQLite file: a few small tables, read and
written seldom.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Protocol, TypeVar

from relay.queue.api_state import (
    CallsAbout,
    DomainSettings,
    PendingCall,
    Webhook,
    calls_of_rows,
    webhooks_of_rows,
)
from relay.queue.rows import micros, moment
from relay.queue.sqlite.schema import version_of

_SINCE_VERSION = 3

T = TypeVar("T")


class Ask(Protocol):
    """Has a function work on a connection, which is its first argument."""

    async def __call__(self, question: Callable[..., T], /, *args: object) -> T: ...


class SqliteApiState:
    """`read` asks a question on the reader's connection, `write` works on the writer's."""

    def __init__(self, read: Ask, write: Ask) -> None:
        self._read = read
        self._write = write

    def when_changed_elsewhere(self, call: Callable[[], Awaitable[None]]) -> None:
        """Nobody else has this file."""

    is_shared = False

    async def add_lost_calls(self, about: CallsAbout) -> bool:
        """There are no other nodes."""
        return False

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        """All of them, by domain."""
        return await self._read(domain_settings)

    async def set_domain_settings(self, domain: str, settings: DomainSettings) -> DomainSettings:
        """Set what is not None."""
        return await self._write(_set_domain_settings, domain, settings)

    async def webhooks(self) -> list[Webhook]:
        """All of them."""
        return await self._read(_webhooks)

    async def set_webhook(self, domain: str, name: str, urls: Sequence[str]) -> None:
        """Put these URLs in the place of those it has."""
        await self._write(_set_webhook, domain, name, urls)

    async def add_calls(self, calls: Sequence[PendingCall], *, seen: int) -> None:
        """Have these calls made."""
        await self._write(_add_calls, calls, seen)

    async def calls_seen(self) -> int:
        """Up to where the events were looked at."""
        return await self._read(_calls_seen)

    async def calls_due(
        self, *, now: datetime, limit: int, besides: Collection[str] = ()
    ) -> list[PendingCall]:
        """The calls that are due."""
        return await self._read(_calls_due, now, limit, list(besides))

    async def next_call_due(self) -> datetime | None:
        """When the next call is due."""
        return await self._read(_next_call_due)

    async def settle_call(self, call: PendingCall, *, due: datetime | None) -> None:
        """The call was tried."""
        await self._write(_settle_call, call, due)


def domain_settings(db: sqlite3.Connection) -> dict[str, DomainSettings]:
    """What was set over HTTP, by domain; nothing in a queue older than the tables for it."""
    if version_of(db) < _SINCE_VERSION:
        return {}
    rows = db.execute(
        "SELECT domain, require_tls, skip_verification FROM domain_settings ORDER BY domain"
    )
    return {domain: DomainSettings(_flag(require), _flag(skip)) for domain, require, skip in rows}


def _flag(value: object) -> bool | None:
    return None if value is None else bool(value)


def _set_domain_settings(
    db: sqlite3.Connection, domain: str, settings: DomainSettings
) -> DomainSettings:
    db.execute(
        "INSERT INTO domain_settings VALUES (?, ?, ?) ON CONFLICT (domain) DO UPDATE SET"
        " require_tls = coalesce(excluded.require_tls, require_tls),"
        " skip_verification = coalesce(excluded.skip_verification, skip_verification)",
        (domain, settings.require_tls, settings.skip_verification),
    )
    require, skip = db.execute(
        "SELECT require_tls, skip_verification FROM domain_settings WHERE domain = ?", (domain,)
    ).fetchone()
    return DomainSettings(_flag(require), _flag(skip))


def _webhooks(db: sqlite3.Connection) -> list[Webhook]:
    rows = db.execute("SELECT domain, name, urls, since FROM webhook ORDER BY domain, name")
    return webhooks_of_rows(rows)


def _set_webhook(db: sqlite3.Connection, domain: str, name: str, urls: Sequence[str]) -> None:
    if not urls:
        db.execute("DELETE FROM webhook WHERE domain = ? AND name = ?", (domain, name))
        return
    since = db.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()[0]
    db.execute(
        "INSERT INTO webhook VALUES (?, ?, ?, ?)"
        " ON CONFLICT (domain, name) DO UPDATE SET urls = excluded.urls",
        (domain, name, json.dumps(list(urls)), since),
    )


def _add_calls(db: sqlite3.Connection, calls: Sequence[PendingCall], seen: int) -> None:
    db.executemany(
        "INSERT INTO call (due, attempts, url, line) VALUES (?, ?, ?, ?)",
        [(micros(call.due), call.attempts, call.url, call.line) for call in calls],
    )
    db.execute("INSERT OR REPLACE INTO meta VALUES ('calls_seen', ?)", (seen,))


def _calls_seen(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = 'calls_seen'").fetchone()
    return int(row[0]) if row else 0


def _calls_due(
    db: sqlite3.Connection, now: datetime, limit: int, besides: list[str]
) -> list[PendingCall]:
    rows = db.execute(
        "SELECT url, line, due, attempts, number FROM call WHERE due <= ?"
        " AND url NOT IN (SELECT value FROM json_each(?)) ORDER BY due LIMIT ?",
        (micros(now), json.dumps(besides), limit),
    )
    return calls_of_rows(rows)


def _next_call_due(db: sqlite3.Connection) -> datetime | None:
    due = db.execute("SELECT min(due) FROM call").fetchone()[0]
    return None if due is None else moment(due)


def _settle_call(db: sqlite3.Connection, call: PendingCall, due: datetime | None) -> None:
    if due is None:
        db.execute("DELETE FROM call WHERE number = ?", (call.number,))
    else:
        db.execute(
            "UPDATE call SET due = ?, attempts = attempts + 1 WHERE number = ?",
            (micros(due), call.number),
        )
