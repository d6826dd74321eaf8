"""`relay.queue.api_state.ApiState` in the tables that all nodes share.

Each node looks at its own events for the webhooks (`calls_seen` of the node), one of them at those
of lost nodes, and any node makes the calls: it claims them under its lease. What is set is counted
in `meta.changes`, which every node looks at once a second.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from relay.queue.api_state import (
    CallsAbout,
    DomainSettings,
    PendingCall,
    Webhook,
    calls_of_rows,
    webhooks_of_rows,
)
from relay.queue.postgres.connection import Ask, Db
from relay.queue.postgres.events import events_after
from relay.queue.postgres.lease import Lease
from relay.queue.rows import micros, moment
from relay.queue.store import StoredEvent

_EVENTS = 1000


class UnseenEvents(NamedTuple):
    """The next events of a node that is not there, about which no webhook has heard yet.

    `seen`: up to where they were looked at.
    """

    node: int
    seen: int
    webhooks: Sequence[Webhook]
    events: Sequence[StoredEvent]


class PostgresApiState:
    """`read` asks a question, `write` does what has to be durable."""

    def __init__(self, read: Ask, write: Ask, lease: Lease) -> None:
        self._read = read
        self._write = write
        self._lease = lease
        self._listeners: list[Callable[[], Awaitable[None]]] = []
        self._edition: int | None = None

    def when_changed_elsewhere(self, call: Callable[[], Awaitable[None]]) -> None:
        """Have this called when a node has changed settings or webhooks."""
        self._listeners.append(call)

    async def look(self, edition: int) -> None:
        """See whether a node has changed something: whether the edition is another now."""
        if self._edition is not None and edition != self._edition:
            for call in self._listeners:
                await call()
        self._edition = edition

    is_shared = True

    async def add_lost_calls(self, about: CallsAbout) -> bool:
        """Keep the calls about the next events that a lost node has not looked at."""
        unseen = await self._read(unseen_events, _EVENTS, self._lease.id)
        if unseen is None:
            return False
        await self._write(add_calls_about, unseen, about(unseen.webhooks, unseen.events))
        return True

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        """All of them, by domain."""
        return await self._read(domain_settings)

    async def set_domain_settings(self, domain: str, settings: DomainSettings) -> DomainSettings:
        """Set what is not None."""
        return await self._write(_set_domain_settings, domain, settings)

    async def webhooks(self) -> list[Webhook]:
        """All of them."""
        return await self._read(_webhooks, self._lease.node)

    async def set_webhook(self, domain: str, name: str, urls: Sequence[str]) -> None:
        """Put these URLs in the place of those it has."""
        await self._write(_set_webhook, domain, name, urls)

    async def add_calls(self, calls: Sequence[PendingCall], *, seen: int) -> None:
        """Have these calls made."""
        await self._write(_add_calls, self._lease.node, calls, seen)

    async def calls_seen(self) -> int:
        """Up to where the events of this node were looked at."""
        return await self._read(_calls_seen, self._lease.node)

    async def calls_due(
        self, *, now: datetime, limit: int, besides: Collection[str] = ()
    ) -> list[PendingCall]:
        """The calls that are due and that this node may make: it claims them."""
        if not await self._read(_has_due, self._lease.id, now, list(besides)):
            return []
        return await self._write(_claim_calls, self._lease.id, now, limit, list(besides))

    async def next_call_due(self) -> datetime | None:
        """When the next call is due."""
        return await self._read(_next_call_due)

    async def settle_call(self, call: PendingCall, *, due: datetime | None) -> None:
        """The call was tried."""
        await self._write(_settle_call, call, due)


async def domain_settings(db: Db) -> dict[str, DomainSettings]:
    """What was set over HTTP, by domain."""
    rows = await db.fetch(
        "SELECT domain, require_tls, skip_verification FROM relay.domain_settings ORDER BY domain"
    )
    return {domain: DomainSettings(require, skip) for domain, require, skip in rows}


async def _set_domain_settings(db: Db, domain: str, settings: DomainSettings) -> DomainSettings:
    row = await db.fetchrow(
        "INSERT INTO relay.domain_settings AS old VALUES ($1, $2, $3)"
        " ON CONFLICT (domain) DO UPDATE SET"
        " require_tls = coalesce(excluded.require_tls, old.require_tls),"
        " skip_verification = coalesce(excluded.skip_verification, old.skip_verification)"
        " RETURNING require_tls, skip_verification",
        domain,
        settings.require_tls,
        settings.skip_verification,
    )
    await _tell_all(db)
    assert row is not None
    return DomainSettings(row[0], row[1])


async def _tell_all(db: Db) -> None:
    await db.execute("UPDATE relay.meta SET changes = changes + 1")


async def _webhooks(db: Db, node: int) -> list[Webhook]:
    rows = await db.fetch(
        "SELECT domain, name, urls, coalesce((since ->> $1)::bigint, 0) FROM relay.webhook"
        " ORDER BY domain, name",
        str(node),
    )
    return webhooks_of_rows(rows)


async def _set_webhook(db: Db, domain: str, name: str, urls: Sequence[str]) -> None:
    if urls:
        await db.execute(
            "INSERT INTO relay.webhook (domain, name, urls, since) VALUES ($1, $2, $3,"
            " (SELECT coalesce(jsonb_object_agg(node.id::text, coalesce((SELECT max(seq)"
            "   FROM relay.event WHERE event.node = node.id), 0)), '{}') FROM relay.node))"
            " ON CONFLICT (domain, name) DO UPDATE SET urls = excluded.urls",
            domain,
            name,
            json.dumps(list(urls)),
        )
    else:
        await db.execute("DELETE FROM relay.webhook WHERE domain = $1 AND name = $2", domain, name)
    await _tell_all(db)


async def _add_calls(db: Db, node: int, calls: Sequence[PendingCall], seen: int) -> None:
    await db.execute(
        "INSERT INTO relay.call (due, attempts, url, line) SELECT * FROM"
        " unnest($1::bigint[], $2::integer[], $3::text[], $4::text[])",
        [micros(call.due) for call in calls],
        [call.attempts for call in calls],
        [call.url for call in calls],
        [call.line for call in calls],
    )
    await db.execute("UPDATE relay.node SET calls_seen = $2 WHERE id = $1", node, seen)


async def _calls_seen(db: Db, node: int) -> int:
    return await db.fetchval("SELECT calls_seen FROM relay.node WHERE id = $1", node) or 0


async def _has_due(db: Db, lease: int, now: datetime, besides: list[str]) -> bool:
    """Asked first: a claim is a commit, and mostly there is nothing to claim."""
    found: bool = await db.fetchval(
        "SELECT EXISTS (SELECT FROM relay.call WHERE (lease IS NULL OR lease = $1)"
        " AND due <= $2 AND url <> ALL($3))",
        lease,
        micros(now),
        besides,
    )
    return found


async def _claim_calls(
    db: Db, lease: int, now: datetime, limit: int, besides: list[str]
) -> list[PendingCall]:
    await db.execute(
        "UPDATE relay.call SET lease = $1 WHERE number IN (SELECT number FROM relay.call"
        " WHERE lease IS NULL AND due <= $2 AND url <> ALL($3) ORDER BY due LIMIT $4"
        " FOR UPDATE SKIP LOCKED)",
        lease,
        micros(now),
        besides,
        limit,
    )
    rows = await db.fetch(
        "SELECT url, line, due, attempts, number FROM relay.call"
        " WHERE lease = $1 AND due <= $2 AND url <> ALL($3) ORDER BY due LIMIT $4",
        lease,
        micros(now),
        besides,
        limit,
    )
    return calls_of_rows(rows)


async def _next_call_due(db: Db) -> datetime | None:
    due = await db.fetchval("SELECT min(due) FROM relay.call")
    return None if due is None else moment(due)


async def _settle_call(db: Db, call: PendingCall, due: datetime | None) -> None:
    if due is None:
        await db.execute("DELETE FROM relay.call WHERE number = $1", call.number)
    else:
        await db.execute(
            "UPDATE relay.call SET due = $2, attempts = attempts + 1, lease = NULL"
            " WHERE number = $1",
            call.number,
            micros(due),
        )


_FIRST = "(SELECT min(coalesce((since ->> node.id::text)::bigint, 0)) FROM relay.webhook)"
"""Up to this event of a node there was no webhook."""

_UNSEEN = f"""
    SELECT node.id, greatest(node.calls_seen, {_FIRST}) AS seen FROM relay.node
    WHERE EXISTS (SELECT FROM relay.webhook)
    AND NOT EXISTS (SELECT FROM relay.lease WHERE lease.node = node.id AND lost IS NULL
        AND ($1::bigint IS NOT NULL OR expires > now()))
    AND ($1::bigint IS NULL
        OR $1 = (SELECT min(id) FROM relay.lease WHERE lost IS NULL AND expires > now()))
    AND EXISTS (SELECT FROM relay.event WHERE event.node = node.id
        AND event.seq > greatest(node.calls_seen, {_FIRST}))
    ORDER BY node.id LIMIT 1"""


async def unseen_events(db: Db, limit: int, lease: int | None) -> UnseenEvents | None:
    """The next events of a node that is lost; None where all were looked at, or there is no
    webhook. `lease`: of the node that asks; the one with the oldest is told. None: who asks is no
    node, and those count as lost whose lease has ended.
    """
    node = await db.fetchrow(_UNSEEN, lease)
    if node is None:
        return None
    id, seen = node
    return UnseenEvents(id, seen, await _webhooks(db, id), await events_after(db, id, seen, limit))


async def add_calls_about(db: Db, unseen: UnseenEvents, calls: Sequence[PendingCall]) -> None:
    """Have these calls made, unless somebody else has looked at the events meanwhile. The
    connection is inside a transaction.
    """
    node, _, _, events = unseen
    before = await db.fetchval("SELECT calls_seen FROM relay.node WHERE id = $1 FOR UPDATE", node)
    if before < events[-1].seq:
        await _add_calls(db, node, calls, events[-1].seq)
