"""`relay.queue.policies.PolicyCache` in an SQLite file of its own, which all workers share.

    policies.db   in the directory of the first worker's queue; what hosts have shown of TLS
                  (`memory`) is in it, too

A worker's queue is its own and has one writer. A policy is for all workers, and any of them may
fetch it; so this file is not in WAL mode, which in SQLite before 3.51.3 two writers can corrupt,
but has a rollback journal: whoever writes holds the file for the moment that takes, and others
wait. It is written once a policy and day. What is written is synced, and so is the end of the
journal (`synchronous = EXTRA`): a policy that was kept is there after a power cut.

`SharedFile` is the file, `SqlitePolicyCache` what is kept of policies in it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import quote

from relay.mail.files import sync_directory
from relay.queue.policies import StoredPolicy, policies_of_rows
from relay.queue.rows import micros
from relay.queue.sqlite.schema import Migration, migrate
from relay.queue.store import SpoolError

POLICIES = "policies.db"

_APPLICATION_ID = 0x524C5950
"""Marks the file as a relay's policies ("RLYP")."""
_BUSY_SECONDS = 5.0
_COLUMNS = "domain, id, body, fetched, refresh_at"

_VERSION_1: Migration = (
    """CREATE TABLE policy (
        domain TEXT NOT NULL PRIMARY KEY,
        id TEXT NOT NULL,
        body BLOB NOT NULL,
        fetched INTEGER NOT NULL,      -- microseconds since 1970
        refresh_at INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX policy_refresh_at ON policy (refresh_at)",
)

_VERSION_2: Migration = (
    """CREATE TABLE memory (
        domain TEXT NOT NULL PRIMARY KEY,
        last INTEGER NOT NULL,
        data TEXT NOT NULL             -- relay.queue.memory.to_row
    ) WITHOUT ROWID""",
    "CREATE INDEX memory_last ON memory (last)",
)

MIGRATIONS = (_VERSION_1, _VERSION_2)

T = TypeVar("T")


class SharedFile:
    """One connection, on one thread. `is_to_read`: of a relay, running or not, that is only looked
    at; where there is no file, there is nothing to read.
    """

    def __init__(self, path: Path, *, is_to_read: bool = False) -> None:
        self._path = path
        self._is_to_read = is_to_read
        self._db: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="policies")
        self._closed = False

    @classmethod
    async def open(cls, directory: Path) -> Self:
        """The file of the relay whose first worker has its queue in `directory`."""
        file = cls(directory / POLICIES)
        try:
            await file._on_thread(lambda db: None)
        except BaseException:
            await file.close()
            raise
        return file

    async def close(self) -> None:
        """Let the file go."""
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._let_go)
        self._thread.shutdown(wait=True)

    async def _on_thread(self, work: Callable[[sqlite3.Connection], T]) -> T:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise SpoolError(f"{self._path} is closed")
        try:
            return await loop.run_in_executor(self._thread, self._with_connection, work)
        except (sqlite3.Error, OSError) as exc:
            raise _translated(exc, self._path) from exc

    def _with_connection(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._db is None:
            self._db = self._connect()
        return work(self._db)

    def _connect(self) -> sqlite3.Connection:
        if not self._is_to_read:
            return _open(self._path)
        uri = f"file:{quote(str(self._path))}?mode=ro"
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_SECONDS)

    def _let_go(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


class SqlitePolicyCache(SharedFile):
    """The policies. Open them with `SqlitePolicyCache.open`."""

    async def policy(self, domain: str) -> StoredPolicy | None:
        """The policy of a domain."""
        found = await self._ask("WHERE domain = ?", domain)
        return found[0] if found else None

    async def policies(self, *, after: str = "", limit: int = 500) -> list[StoredPolicy]:
        """A page of all policies."""
        return await self._ask("WHERE domain > ? ORDER BY domain LIMIT ?", after, limit)

    async def refresh_due(self, *, now: datetime, limit: int) -> list[StoredPolicy]:
        """Policies that are to be fetched again."""
        where = "WHERE refresh_at <= ? ORDER BY refresh_at LIMIT ?"
        return await self._ask(where, micros(now), limit)

    async def keep(self, policy: StoredPolicy) -> None:
        """Keep a policy."""
        await self._change(
            "INSERT OR REPLACE INTO policy VALUES (?, ?, ?, ?, ?)",
            policy.domain,
            policy.id,
            policy.body,
            micros(policy.fetched),
            micros(policy.refresh_at),
        )

    async def refresh_later(self, policy: StoredPolicy, refresh_at: datetime) -> None:
        """Have a policy fetched again at another time."""
        await self._change(
            "UPDATE policy SET refresh_at = ? WHERE domain = ? AND fetched = ?",
            micros(refresh_at),
            policy.domain,
            micros(policy.fetched),
        )

    async def forget(self, domain: str, *, fetched: datetime | None = None) -> bool:
        """Forget a policy."""
        if fetched is None:
            return await self._change("DELETE FROM policy WHERE domain = ?", domain) > 0
        sql = "DELETE FROM policy WHERE domain = ? AND fetched = ?"
        return await self._change(sql, domain, micros(fetched)) > 0

    async def _ask(self, where: str, *arguments: object) -> list[StoredPolicy]:
        sql = f"SELECT {_COLUMNS} FROM policy {where}"
        rows = await self._on_thread(lambda db: db.execute(sql, arguments).fetchall())
        return policies_of_rows(rows)

    async def _change(self, sql: str, *arguments: object) -> int:
        """A statement, which is a transaction of its own; how many rows it changed."""
        return await self._on_thread(lambda db: db.execute(sql, arguments).rowcount)


class PoliciesToRead(SqlitePolicyCache):
    """The policies of a relay, running or not, to be looked at: what is fetched is kept nowhere."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, is_to_read=True)

    async def _ask(self, where: str, *arguments: object) -> list[StoredPolicy]:
        return await super()._ask(where, *arguments) if self._path.exists() else []

    async def _change(self, sql: str, *arguments: object) -> int:
        return 0


def _open(path: Path) -> sqlite3.Connection:
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        sync_directory(path.parent)
    db = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_SECONDS)
    try:
        _refuse_what_is_not_ours(db, path)
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA synchronous = EXTRA")
        if not db.execute("PRAGMA application_id").fetchone()[0]:
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        migrate(db, MIGRATIONS)
    except BaseException:
        db.close()
        raise
    return db


def _refuse_what_is_not_ours(db: sqlite3.Connection, path: Path) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] not in (0, _APPLICATION_ID):
        raise SpoolError(f"{path} is a database of another program")
    if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise _damaged(path)


def _translated(exc: BaseException, path: Path) -> SpoolError:
    """Our error for what SQLite raised."""
    code = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return _damaged(path)
    return SpoolError(f"{path}: {exc}")


def _damaged(path: Path) -> SpoolError:
    cure = "move it away; policies are fetched anew, and what hosts show is learned anew"
    return SpoolError(f"{path} is damaged: {cure}")
