"""`relay.queue.memory.MemoryStore`: a table in the file of the policies, which all workers share.

A row is read, changed and written in one transaction that no other worker gets in between
(`BEGIN IMMEDIATE`): what two workers learn at the same time is all kept.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from relay.mail.memory import DomainMemory
from relay.queue.memory import Change, from_row, to_row
from relay.queue.rows import micros
from relay.queue.sqlite.policies import SharedFile


class SqliteMemory(SharedFile):
    """Open it with `SqliteMemory.open`."""

    async def memory(self, domain: str) -> DomainMemory | None:
        """What is kept of a domain."""
        return await self._on_thread(lambda db: _row_of(db, domain, self._path))

    async def change(self, changes: Mapping[str, Change]) -> dict[str, DomainMemory | None]:
        """Change what is kept of domains."""
        return await self._on_thread(lambda db: _changed(db, changes, self._path))

    async def forget(self, domain: str) -> bool:
        """Forget a domain."""
        sql = "DELETE FROM memory WHERE domain = ?"
        return await self._on_thread(lambda db: db.execute(sql, (domain,)).rowcount) > 0

    async def page(self, *, after: str = "", limit: int = 500) -> list[DomainMemory]:
        """A page of all."""
        sql = "SELECT domain, data FROM memory WHERE domain > ? ORDER BY domain LIMIT ?"
        rows = await self._on_thread(lambda db: db.execute(sql, (after, limit)).fetchall())
        return [from_row(domain, data, file=str(self._path)) for domain, data in rows]

    async def purge(self, *, seen_before: datetime, most: int) -> int:
        """Forget what is old, and what is too much."""
        return await self._on_thread(lambda db: _purged(db, micros(seen_before), most))


class MemoryToRead(SqliteMemory):
    """What a relay remembers, running or not, to be looked at."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, is_to_read=True)

    async def memory(self, domain: str) -> DomainMemory | None:
        return await super().memory(domain) if await self._is_there() else None

    async def change(self, changes: Mapping[str, Change]) -> dict[str, DomainMemory | None]:
        return {}

    async def forget(self, domain: str) -> bool:
        return False

    async def page(self, *, after: str = "", limit: int = 500) -> list[DomainMemory]:
        return await super().page(after=after, limit=limit) if await self._is_there() else []

    async def purge(self, *, seen_before: datetime, most: int) -> int:
        return 0

    async def _is_there(self) -> bool:
        """Whether there is a table: an older relay has none."""
        sql = "SELECT 1 FROM sqlite_master WHERE name = 'memory'"
        if not self._path.exists():
            return False
        return await self._on_thread(lambda db: db.execute(sql).fetchone() is not None)


def _row_of(db: sqlite3.Connection, domain: str, path: Path) -> DomainMemory | None:
    row = db.execute("SELECT data FROM memory WHERE domain = ?", (domain,)).fetchone()
    return from_row(domain, row[0], file=str(path)) if row is not None else None


def _changed(
    db: sqlite3.Connection, changes: Mapping[str, Change], path: Path
) -> dict[str, DomainMemory | None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        found = {domain: _change(db, domain, change, path) for domain, change in changes.items()}
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return found


def _change(db: sqlite3.Connection, domain: str, change: Change, path: Path) -> DomainMemory | None:
    before = _row_of(db, domain, path)
    after = change(before)
    if after is None:
        db.execute("DELETE FROM memory WHERE domain = ?", (domain,))
    elif after != before:
        row = (domain, micros(after.last), to_row(after))
        db.execute("INSERT OR REPLACE INTO memory VALUES (?, ?, ?)", row)
    return after


def _purged(db: sqlite3.Connection, seen_before: int, most: int) -> int:
    count = db.execute("DELETE FROM memory WHERE last <= ?", (seen_before,)).rowcount
    too_many = db.execute("SELECT count(*) FROM memory").fetchone()[0] - most
    if too_many > 0:
        oldest = "SELECT domain FROM memory ORDER BY last LIMIT ?"
        count += db.execute(f"DELETE FROM memory WHERE domain IN ({oldest})", (too_many,)).rowcount
    return count
