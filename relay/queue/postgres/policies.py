"""`relay.queue.policies.PolicyCache` and `relay.queue.memory.MemoryStore` in tables of the queue's
database, which all nodes share.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from relay.mail.memory import DomainMemory
from relay.queue.memory import Change, from_row, to_row
from relay.queue.policies import StoredPolicy, policies_of_rows
from relay.queue.postgres.connection import SAFE_COMMIT, Db, Link, Server, changed_rows
from relay.queue.rows import micros

_SECONDS = 10.0
_COLUMNS = "domain, id, body, fetched, refresh_at"


class PostgresPolicyCache:
    """The policies."""

    def __init__(self, server: Server) -> None:
        self._link = Link(server, seconds=_SECONDS)

    async def policy(self, domain: str) -> StoredPolicy | None:
        """The policy of a domain."""
        found = await self._link.ask(_policies, "WHERE domain = $1", domain)
        return found[0] if found else None

    async def policies(self, *, after: str = "", limit: int = 500) -> list[StoredPolicy]:
        """A page of all policies."""
        where = "WHERE domain > $1 ORDER BY domain LIMIT $2"
        return await self._link.ask(_policies, where, after, limit)

    async def refresh_due(self, *, now: datetime, limit: int) -> list[StoredPolicy]:
        """Policies that are to be fetched again."""
        where = "WHERE refresh_at <= $1 ORDER BY refresh_at LIMIT $2"
        return await self._link.ask(_policies, where, micros(now), limit)

    async def keep(self, policy: StoredPolicy) -> None:
        """Keep a policy."""
        await self._link.ask(
            _change,
            "INSERT INTO relay.policy VALUES ($1, $2, $3, $4, $5) ON CONFLICT (domain) DO UPDATE"
            " SET id = excluded.id, body = excluded.body, fetched = excluded.fetched,"
            " refresh_at = excluded.refresh_at",
            policy.domain,
            policy.id,
            policy.body,
            micros(policy.fetched),
            micros(policy.refresh_at),
        )

    async def refresh_later(self, policy: StoredPolicy, refresh_at: datetime) -> None:
        """Have a policy fetched again at another time."""
        await self._link.ask(
            _change,
            "UPDATE relay.policy SET refresh_at = $1 WHERE domain = $2 AND fetched = $3",
            micros(refresh_at),
            policy.domain,
            micros(policy.fetched),
        )

    async def forget(self, domain: str, *, fetched: datetime | None = None) -> bool:
        """Forget a policy."""
        if fetched is None:
            sql, arguments = "DELETE FROM relay.policy WHERE domain = $1", (domain,)
            return await self._link.ask(_change, sql, *arguments) > 0
        sql = "DELETE FROM relay.policy WHERE domain = $1 AND fetched = $2"
        return await self._link.ask(_change, sql, domain, micros(fetched)) > 0

    async def close(self) -> None:
        """Let the connection go."""
        await self._link.close()


class PoliciesToRead(PostgresPolicyCache):
    """The policies, to be looked at: what is fetched is kept nowhere."""

    async def keep(self, policy: StoredPolicy) -> None:
        pass

    async def refresh_later(self, policy: StoredPolicy, refresh_at: datetime) -> None:
        pass

    async def forget(self, domain: str, *, fetched: datetime | None = None) -> bool:
        return False


async def _policies(db: Db, where: str, *arguments: object) -> list[StoredPolicy]:
    rows = await db.fetch(f"SELECT {_COLUMNS} FROM relay.policy {where}", *arguments)
    return policies_of_rows(rows)


async def _change(db: Db, sql: str, *arguments: object) -> int:
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        status = await db.execute(sql, *arguments)
    return changed_rows(status)


class PostgresMemory:
    """What hosts have shown of TLS. Each row is read, changed and written under a lock of its own,
    so that what two nodes learn at the same time is all kept.
    """

    def __init__(self, server: Server) -> None:
        self._link = Link(server, seconds=_SECONDS)

    async def memory(self, domain: str) -> DomainMemory | None:
        """What is kept of a domain."""
        return await self._link.ask(_row_of, domain)

    async def change(self, changes: Mapping[str, Change]) -> dict[str, DomainMemory | None]:
        """Change what is kept of domains."""
        return await self._link.ask(_changed, changes)

    async def forget(self, domain: str) -> bool:
        """Forget a domain."""
        sql = "DELETE FROM relay.memory WHERE domain = $1"
        return await self._link.ask(_change, sql, domain) > 0

    async def page(self, *, after: str = "", limit: int = 500) -> list[DomainMemory]:
        """A page of all."""
        return await self._link.ask(_page, after, limit)

    async def purge(self, *, seen_before: datetime, most: int) -> int:
        """Forget what is old, and what is too much."""
        return await self._link.ask(_purged, micros(seen_before), most)

    async def close(self) -> None:
        """Let the connection go."""
        await self._link.close()


async def _row_of(db: Db, domain: str) -> DomainMemory | None:
    data = await db.fetchval("SELECT data FROM relay.memory WHERE domain = $1", domain)
    return from_row(domain, data) if data is not None else None


async def _page(db: Db, after: str, limit: int) -> list[DomainMemory]:
    rows = await db.fetch(
        "SELECT domain, data FROM relay.memory WHERE domain > $1 ORDER BY domain LIMIT $2",
        after,
        limit,
    )
    return [from_row(domain, data) for domain, data in rows]


async def _changed(db: Db, changes: Mapping[str, Change]) -> dict[str, DomainMemory | None]:
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        # A row that is not there cannot be locked; the order keeps two nodes from a deadlock.
        await db.execute(
            "INSERT INTO relay.memory SELECT domain, 0, '' FROM unnest($1::text[]) AS one (domain)"
            " ORDER BY domain ON CONFLICT DO NOTHING",
            sorted(changes),
        )
        return {
            domain: await _change_one(db, domain, changes[domain]) for domain in sorted(changes)
        }


async def _change_one(db: Db, domain: str, change: Change) -> DomainMemory | None:
    data = await db.fetchval("SELECT data FROM relay.memory WHERE domain = $1 FOR UPDATE", domain)
    before = from_row(domain, data) if data else None
    after = change(before)
    if after is None:
        await db.execute("DELETE FROM relay.memory WHERE domain = $1", domain)
    elif after != before:
        await db.execute(
            "UPDATE relay.memory SET last = $2, data = $3 WHERE domain = $1",
            domain,
            micros(after.last),
            to_row(after),
        )
    return after


async def _purged(db: Db, seen_before: int, most: int) -> int:
    async with db.transaction():
        status = await db.execute("DELETE FROM relay.memory WHERE last <= $1", seen_before)
        count = changed_rows(status)
        too_many = await db.fetchval("SELECT count(*) FROM relay.memory") - most
        if too_many > 0:
            status = await db.execute(
                "DELETE FROM relay.memory WHERE domain IN"
                " (SELECT domain FROM relay.memory ORDER BY last LIMIT $1)",
                too_many,
            )
            count += changed_rows(status)
    return count
