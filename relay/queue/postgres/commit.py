"""The one connection that writes: batches, and commits whose outcome is not known.

One transaction is under way; what comes meanwhile is the next batch. A batch of nothing but new
messages, and of messages that leave whole, is a single statement; any other is a transaction of a
few. If a single request makes it fail, the transaction is done again with a savepoint for each
request, so that only that one fails.

Each batch inserts its mark, `batch(lease, n)`, from the row of its lease as long as that is not
lost. No row: nothing is written, and the node has to register anew.

A write is never cancelled: a cancelled wait for a standby succeeds with a warning. A connection
that ends while a commit may be under way, says nothing for `SILENCE` seconds or gives a warning
leaves the outcome unknown. It is asked for on a fresh connection: that inserts the same mark,
void, and reads back what stands there. The insert waits for a server process that is still
committing. Void: the batch can never commit, and is written again. Not void: it is committed, and
as durable as the commit of the question, which comes behind it in the write-ahead log. Until that
is known nothing else is written; after `PATIENCE` seconds who waits for new mail hears 451, and a
message that turns out to be committed is removed again, untold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import asyncpg

from relay.queue.postgres.connection import (
    ERRORS,
    Db,
    NoServer,
    Server,
    is_lost,
    may_repeat,
    translated,
)
from relay.queue.request import Refused, Request, resolve
from relay.queue.store import QueueFull, SpoolError, StoredEvent

__all__ = ["PATIENCE", "SAFE_COMMIT", "SILENCE", "LeaseLost", "Tables", "Writer"]

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""How long a request may wait for the database, in seconds."""
SILENCE = 6.0
"""After so many seconds without an answer a connection is given up."""

_BATCH_REQUESTS = 512
_BATCH_BYTES = 16 * 1024 * 1024
_PAUSE_SECONDS = 0.2
_GLANCE_SECONDS = 0.5
_REPEATS = 5

SAFE_COMMIT = (
    "SELECT CASE WHEN current_setting('synchronous_commit') IN ('on', 'remote_apply') THEN NULL"
    " ELSE set_config('synchronous_commit', 'on', true) END,"
    " set_config('idle_in_transaction_session_timeout', '10s', true)"
)
"""In the transaction, where no pooler loses it: its commit is synced, and a node that is cut off
midway holds its locks for ten seconds.
"""

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


class Tables(Protocol):
    """What is written; see `relay.queue.postgres.statements`."""

    def lease(self) -> int: ...

    def point(self) -> int: ...

    def back_to(self, point: int) -> None: ...

    def is_plain(self, batch: Sequence[Request]) -> bool: ...

    async def write_plain(self, db: Db, batch: Sequence[Request], n: int) -> bool: ...

    async def write(self, db: Db, batch: Sequence[Request]) -> None: ...

    async def write_alone(self, db: Db, request: Request) -> None: ...

    async def remove_untold(self, db: Db, batch: Sequence[Request]) -> None: ...

    def go_on_from(self, batch: Iterable[Request]) -> None: ...


class _Unknown(Exception):
    """The batch may be committed or not."""


@dataclass(slots=True)
class _Doubt:
    """A batch whose outcome is unknown, and what it was written as."""

    lease: int
    n: int
    batch: list[tuple[float, Request]]


class Writer:
    """`start` it; `close` ends it after all that was submitted."""

    def __init__(
        self,
        server: Server,
        tables: Tables,
        *,
        on_events: Callable[[list[StoredEvent]], None],
        on_lease_lost: Callable[[], None],
    ) -> None:
        self._server = server
        self._tables = tables
        self._on_events = on_events
        self._on_lease_lost = on_lease_lost
        self._waiting: deque[tuple[float, Request]] = deque()
        self._wake = asyncio.Event()
        self._db: Db | None = None
        self._n = 0
        self._taken: list[tuple[float, Request]] = []
        self._doubt: _Doubt | None = None
        self._warned = False
        self._trouble = ""
        self.unknown_commits = 0
        self._is_full = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="queue-writer")
        self._watch = asyncio.create_task(self._watch_patience(), name="queue-patience")

    @property
    def trouble(self) -> str:
        """What fails at the moment, "" for nothing."""
        return f"the queue's database cannot be written: {self._trouble}" if self._trouble else ""

    def submit(self, request: Request) -> None:
        """Have it written with the next batch."""
        if self._closing:
            raise SpoolError("the queue is closed")
        self._waiting.append((time.monotonic(), request))
        self._wake.set()

    async def close(self) -> None:
        """Write what was submitted, as far as the database answers, and let the connection go."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.shield(self._task)
        if self._watch is not None:
            self._watch.cancel()
        db, self._db = self._db, None
        if db is not None:
            with suppress(*ERRORS):
                await db.close(timeout=2.0)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting or self._doubt is not None:
                try:
                    await self._step()
                except Exception:
                    log.exception("the queue's writer met a mistake of its own")
                    self._drop()
                    self._fail([one for _, one in self._taken], SpoolError("internal trouble"))
            if self._closing:
                return

    async def _step(self) -> None:
        """Write the next batch; or find out about the last one; or wait for the database."""
        if self._doubt is not None and not await self._settle_doubt():
            await self._pause()
            return
        batch: list[Request] = []
        self._taken = []
        try:
            await self._connection()  # what waits may be given up meanwhile
            if batch := self._take():
                await self._write(batch)
        except LeaseLost as exc:
            self._fail(batch, exc)
            self._on_lease_lost()
        except NoServer as exc:
            # Nothing was written. Who came a moment ago may wait for a server that comes back.
            self._tell_trouble(str(exc))
            self._put_back(self._taken)
            self._give_up_the_old(exc)
            await self._pause()
        except QueueFull as exc:
            self._tell_full(exc)
            self._fail(batch, exc)
        except SpoolError as exc:
            self._tell_trouble(str(exc))
            self._fail(batch, exc)

    def _take(self) -> list[Request]:
        self._taken = []
        size_bytes = 0
        while self._waiting and len(self._taken) < _BATCH_REQUESTS and size_bytes < _BATCH_BYTES:
            began, request = self._waiting.popleft()
            if not request.is_given_up:
                self._taken.append((began, request))
                size_bytes += request.size_bytes
        return [request for _, request in self._taken]

    async def _watch_patience(self) -> None:
        """Nobody waits longer because the server has several hosts that hang one after the other,
        or because the last outcome cannot be learned. And trouble ends though nothing comes that
        is to be written.
        """
        while True:
            await asyncio.sleep(_GLANCE_SECONDS)
            if self._closing:
                continue
            until = time.monotonic() - PATIENCE
            if not self._is_connected and any(began <= until for began, _ in self._waiting):
                self._tell_trouble(self._trouble or "the server gives no connection")
            if self._trouble:
                self._give_up_the_old(SpoolError(self._trouble))
                if not self._waiting:
                    attempt = Request(function=_nothing)
                    attempt.future.add_done_callback(lambda future: future.exception())
                    self.submit(attempt)

    def _give_up_the_old(self, error: SpoolError) -> None:
        """Fail what has waited for too long, or everything where we are to end."""
        until = time.monotonic() - (0 if self._closing else PATIENCE)
        old = [request for began, request in self._waiting if began <= until]
        self._waiting = deque((began, one) for began, one in self._waiting if began > until)
        self._fail(old, error)
        if self._doubt is not None:
            # A result waits until its outcome is known; a client does not.
            old = [one for began, one in self._doubt.batch if began <= until]
            self._fail([one for one in old if one.takes_in or self._closing], error)
            if self._closing:
                self._doubt = None

    def _put_back(self, taken: Sequence[tuple[float, Request]]) -> None:
        """These are written with the next batch, as far as nobody was told of a failure."""
        left = [(began, request) for began, request in taken if not request.is_given_up]
        for _, request in left:
            request.error = None
            request.stored.clear()
        self._waiting.extendleft(reversed(left))

    def fail_waiting(self, error: SpoolError) -> None:
        """What waits was meant for a lease that is lost."""
        waiting, self._waiting = self._waiting, deque()
        self._fail([request for _, request in waiting], error)

    def _fail(self, batch: Sequence[Request], error: SpoolError) -> None:
        failed = [request for request in batch if not request.is_given_up]
        for request in failed:
            request.error = request.error or error
            request.is_given_up = True
        resolve(failed, self._on_events)

    async def _pause(self) -> None:
        await asyncio.sleep(_PAUSE_SECONDS)

    def _tell_trouble(self, text: str) -> None:
        if text != self._trouble:
            self._trouble = text
            log.error("the queue's database cannot be written: %s", text)

    def _tell_full(self, error: SpoolError) -> None:
        """No trouble of this node: its clients hear of it, and no other node has more room."""
        if not self._is_full:
            self._is_full = True
            log.error("no new mail is taken: %s", error)

    def _is_well(self, batch: Sequence[Request] = ()) -> None:
        if self._is_full and any(request.takes_in for request in batch):
            self._is_full = False
            log.warning("the database's disk has room for new mail again")
        if self._trouble:
            log.warning("the queue's database works again, after: %s", self._trouble)
            self._trouble = ""

    # One batch.

    async def _write(self, batch: list[Request]) -> None:
        """Commit a batch, or leave it in doubt. Raises `SpoolError` where nothing was written."""
        for repeat in range(_REPEATS):
            db = await self._connection()
            lease = self._tables.lease()
            self._n += 1
            point = self._tables.point()
            try:
                await self._guarded(db, self._commit(db, lease, batch))
            except _Unknown as exc:
                self._drop()
                self._tables.back_to(point)
                self.unknown_commits += 1
                self._doubt = _Doubt(lease, self._n, self._taken)
                self._tell_trouble(f"a commit has an unknown outcome ({exc})")
                self._wake.set()
                return
            except BaseException as exc:
                self._undone(point, batch)
                if repeat < _REPEATS - 1 and (may_repeat(exc) or self._refused_mail(batch, exc)):
                    continue
                if is_lost(exc):
                    self._drop()
                    raise NoServer(str(translated(exc))) from exc
                if isinstance(exc, ERRORS):
                    raise translated(exc) from exc
                if not isinstance(exc, SpoolError):
                    log.exception("the queue's writer met a mistake of its own")
                    self._drop()
                    self._fail(batch, SpoolError(f"internal trouble ({type(exc).__name__})"))
                    return
                raise
            self._is_well(batch)
            resolve(batch, self._on_events)
            return

    def _refused_mail(self, batch: list[Request], exc: BaseException) -> bool:
        """Where the disk is full, refuse new mail, which needs room, for what leaves, which makes
        some. Whether there is both.
        """
        mail = [request for request in batch if request.takes_in]
        is_full = isinstance(exc, asyncpg.DiskFullError)
        if not is_full or not mail or len(mail) == len(batch):
            return False
        self._tell_full(translated(exc))
        self._fail(mail, translated(exc))
        batch[:] = [request for request in batch if not request.takes_in]
        self._taken = [(began, one) for began, one in self._taken if not one.takes_in]
        return True

    def _undone(self, point: int, batch: Sequence[Request]) -> None:
        self._tables.back_to(point)
        for request in batch:
            request.stored.clear()

    async def _guarded(self, db: Db, work: Coroutine[Any, Any, None]) -> None:
        """Do the work; a connection that says nothing for long is ended, never cancelled."""
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait({task}, timeout=SILENCE)
        if not done:
            db.terminate()
        await task

    async def _commit(self, db: Db, lease: int, batch: list[Request]) -> None:
        self._warned = False
        point = self._tables.point()
        for request in batch:
            request.error = None
        if self._tables.is_plain(batch):
            try:
                written = await self._committing(self._tables.write_plain(db, batch, self._n))
            except (*_OWN_FAULTS, Refused):
                self._undone(point, batch)
            else:
                if not written:
                    raise LeaseLost("the lease of this node is lost")
                return
        try:
            await self._transact(db, lease, batch, alone=False)
        except (*_OWN_FAULTS, Refused):
            for request in batch:
                request.stored.clear()
            await self._transact(db, lease, batch, alone=True)

    async def _transact(self, db: Db, lease: int, batch: list[Request], *, alone: bool) -> None:
        """The batch as a transaction of several statements; `alone`: each request by itself."""
        point = self._tables.point()
        for request in batch:
            request.error = None
        await db.execute("BEGIN")
        try:
            await db.fetchrow(SAFE_COMMIT)
            if await db.fetchval(_MARK, lease, self._n) is None:
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

    async def _committing(self, work: Awaitable[Any]) -> Any:
        """What commits. An error that the server says is a commit that was not made."""
        try:
            result = await work
        except asyncpg.PostgresError as exc:
            if is_lost(exc) and not isinstance(exc, asyncpg.ReadOnlySQLTransactionError):
                raise _Unknown(translated(exc)) from exc
            raise
        except (asyncpg.InterfaceError, OSError, TimeoutError, asyncio.CancelledError) as exc:
            raise _Unknown(translated(exc)) from exc
        if self._warned:
            raise _Unknown("the server warned")
        return result

    # Unknown outcomes.

    async def _settle_doubt(self) -> bool:
        """Find out about the last batch; whether that is done."""
        doubt = self._doubt
        assert doubt is not None
        try:
            is_void = await self._ask_about(doubt)
        except (*ERRORS, SpoolError) as exc:
            self._drop()
            self._tell_trouble(str(translated(exc)))
            self._give_up_the_old(translated(exc))
            return self._doubt is None
        self._doubt = None
        if is_void:
            self._put_back(doubt.batch)
            return True
        log.warning("a commit with an unknown outcome was made")
        self._is_well()
        self._tables.go_on_from(request for _, request in doubt.batch)
        untold = [request for _, request in doubt.batch if request.is_given_up]
        resolve([one for _, one in doubt.batch if not one.is_given_up], self._on_events)
        if untold:
            removal = Request(function=lambda db: self._tables.remove_untold(db, untold))
            removal.future.add_done_callback(lambda future: future.exception())
            self._waiting.append((time.monotonic(), removal))
        return True

    async def _ask_about(self, doubt: _Doubt) -> bool:
        """Whether the batch can never commit; if not, it has, and is durable."""
        db = await self._connection()
        self._warned = False
        found: list[bool] = []

        async def ask() -> None:
            async with db.transaction():
                await db.fetchrow(SAFE_COMMIT)
                await db.execute(_MARK_VOID, doubt.lease, doubt.n)
                # A transaction that writes nothing waits for no sync: this one always writes.
                found.append(
                    await db.fetchval(
                        "UPDATE relay.batch SET void = void WHERE lease = $1 AND n = $2"
                        " RETURNING void",
                        doubt.lease,
                        doubt.n,
                    )
                )

        await self._guarded(db, ask())
        if self._warned:
            raise SpoolError("the server warned")
        return found[0]

    # The connection.

    @property
    def _is_connected(self) -> bool:
        return self._db is not None and not self._db.is_closed()

    async def _connection(self) -> Db:
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

    def _drop(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.terminate()

    def _hear(self, _: object, message: Any) -> None:
        """A warning in a batch may be that it is "committed locally": no standby has it."""
        if (message.severity_en or message.severity) == "WARNING":
            log.warning("the database warned: %s", message)
            self._warned = True


async def _nothing(_: Db) -> None:
    """The mark of the batch is all that is written."""


_OWN_FAULTS = (
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.DataError,
    asyncpg.UntranslatableCharacterError,
)
"""Errors that one request is to blame for, and not the database."""
