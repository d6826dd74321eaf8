"""The transactions of batches, on the one connection that writes.

A batch of nothing but new messages, and of messages that leave whole, is a single statement; any
other is a transaction of a few. If a single request makes it fail, the transaction is done again
with a savepoint for each request, so that only that one fails.

Each batch inserts its mark, `batch(lease, n)`, from the row of its lease as long as that is not
lost. No row: nothing is written, and the node has to register anew.

A write is never cancelled: a cancelled wait for a standby succeeds with a warning. A connection
that ends while a commit may be under way, says nothing for `SILENCE` seconds or gives a warning
leaves the outcome unknown. It is asked for on a fresh connection: that inserts the same mark,
void, and reads back what stands there. The insert waits for a server process that is still
committing. Void: the batch can never commit. Not void: it is committed, and as durable as the
commit of the question, which comes behind it in the write-ahead log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import asyncpg

from relay.queue.postgres.connection import (
    ERRORS,
    SAFE_COMMIT,
    Db,
    NoServer,
    Server,
    is_lost,
    translated,
)
from relay.queue.postgres.statements import Tables
from relay.queue.request import Refused, Request
from relay.queue.store import SpoolError

log = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE = 6.0
"""After so many seconds without an answer a connection is given up."""

_PLANS = "SELECT set_config('enable_seqscan', 'off', false), set_config('jit', 'off', false)"
"""Of the session, since only speed depends on it: what is planned while a table is empty would read
all of it in each commit when it is full of dead rows.
"""

_MARK = (
    "INSERT INTO relay.batch (lease, n, void) SELECT id, $2, false FROM relay.lease"
    " WHERE id = $1 AND lost IS NULL FOR KEY SHARE RETURNING true"
)
_MARK_VOID = "INSERT INTO relay.batch (lease, n, void) VALUES ($1, $2, true) ON CONFLICT DO NOTHING"


class LeaseLost(SpoolError):
    """The lease of this node was lost: nothing was written."""


class UnknownOutcome(Exception):
    """The batch may be committed or not."""


class Transactions:
    """One connection, made when it is needed."""

    def __init__(self, server: Server, tables: Tables) -> None:
        self._server = server
        self._tables = tables
        self._db: Db | None = None
        self._warned = False

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection."""
        return self._db is not None and not self._db.is_closed()

    async def connect(self) -> Db:
        """The connection. `NoServer`."""
        db = self._db
        if db is None or db.is_closed():
            db = await self._server.connect()
            try:
                async with asyncio.timeout(SILENCE):
                    await db.fetchrow(_PLANS)
            except ERRORS as exc:
                db.terminate()
                raise NoServer(str(translated(exc))) from exc
            db.add_log_listener(self._hear)
            self._db = db
        return db

    async def close(self) -> None:
        """Let the connection go in order."""
        db, self._db = self._db, None
        if db is not None:
            with suppress(*ERRORS):
                await db.close(timeout=2.0)

    def drop(self) -> None:
        """Let the connection go at once."""
        db, self._db = self._db, None
        if db is not None:
            db.terminate()

    def _hear(self, _: object, message: Any) -> None:
        """A warning in a batch may be that it is "committed locally": no standby has it."""
        if (message.severity_en or message.severity) == "WARNING":
            log.warning("the database warned: %s", message)
            self._warned = True

    async def _guarded(self, db: Db, work: Coroutine[object, object, T]) -> T:
        """Do the work; a connection that says nothing for long is ended, never cancelled."""
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait({task}, timeout=SILENCE)
        if not done:
            db.terminate()
        return await task

    async def commit(self, lease: int, n: int, batch: list[Request]) -> None:
        """Commit a batch under this mark. Raises `UnknownOutcome`, and `LeaseLost` or what the
        library raises where nothing was written.
        """
        db = await self.connect()
        await self._guarded(db, self._commit(db, lease, n, batch))

    async def _commit(self, db: Db, lease: int, n: int, batch: list[Request]) -> None:
        self._warned = False
        point = self._tables.point()
        for request in batch:
            request.error = None
        if self._tables.is_plain(batch):
            try:
                written = await self._committing(self._tables.write_plain(db, batch, n))
            except (*_OWN_FAULTS, Refused):
                undone(self._tables, point, batch)
            else:
                if not written:
                    raise LeaseLost("the lease of this node is lost")
                return
        try:
            await self._transact(db, lease, n, batch, alone=False)
        except (*_OWN_FAULTS, Refused):
            for request in batch:
                request.stored.clear()
            await self._transact(db, lease, n, batch, alone=True)

    async def _transact(
        self, db: Db, lease: int, n: int, batch: list[Request], *, alone: bool
    ) -> None:
        """The batch as a transaction of several statements; `alone`: each request by itself."""
        point = self._tables.point()
        for request in batch:
            request.error = None
        await db.execute("BEGIN")
        try:
            await db.fetchrow(SAFE_COMMIT)
            if await db.fetchval(_MARK, lease, n) is None:
                raise LeaseLost("the lease of this node is lost")
            if alone:
                for request in batch:
                    if request.function is None:
                        await self._alone(db, request)
            else:
                await self._tables.write(db, batch)
            for request in batch:
                if request.function is not None:
                    await self._alone(db, request)
        except BaseException:
            self._tables.back_to(point)
            with suppress(*ERRORS):
                await db.execute("ROLLBACK")
            raise
        await self._committing(db.execute("COMMIT"))

    async def _alone(self, db: Db, request: Request) -> None:
        """One request in a savepoint: if it fails, no other does."""
        point = self._tables.point()
        await db.execute("SAVEPOINT one")
        try:
            if request.function is not None:
                request.result = await request.function(db)
            else:
                await self._tables.write_alone(db, request)
        except (*_OWN_FAULTS, SpoolError) as exc:
            await db.execute("ROLLBACK TO one")
            self._tables.back_to(point)
            request.stored.clear()
            request.error = translated(exc)
        await db.execute("RELEASE one")

    async def _committing(self, work: Awaitable[T]) -> T:
        """What commits. An error that the server says is a commit that was not made."""
        try:
            result = await work
        except asyncpg.PostgresError as exc:
            if is_lost(exc) and not isinstance(exc, asyncpg.ReadOnlySQLTransactionError):
                raise UnknownOutcome(translated(exc)) from exc
            raise
        except (asyncpg.InterfaceError, OSError, TimeoutError, asyncio.CancelledError) as exc:
            raise UnknownOutcome(translated(exc)) from exc
        if self._warned:
            raise UnknownOutcome("the server warned")
        return result

    async def can_never_commit(self, lease: int, n: int) -> bool:
        """Whether the batch of a mark can never commit; if not, it has, and is durable."""
        db = await self.connect()
        self._warned = False

        async def ask() -> bool:
            async with db.transaction():
                await db.fetchrow(SAFE_COMMIT)
                await db.execute(_MARK_VOID, lease, n)
                # A transaction that writes nothing waits for no sync: this one always writes.
                is_void: bool = await db.fetchval(
                    "UPDATE relay.batch SET void = void WHERE lease = $1 AND n = $2 RETURNING void",
                    lease,
                    n,
                )
            return is_void

        is_void = await self._guarded(db, ask())
        if self._warned:
            raise SpoolError("the server warned")
        return is_void


def undone(tables: Tables, point: int, batch: Sequence[Request]) -> None:
    """Nothing that was written since is in the database."""
    tables.back_to(point)
    for request in batch:
        request.stored.clear()


_OWN_FAULTS = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.UntranslatableCharacterError,
)
"""Errors that one request is to blame for, and not the database."""
