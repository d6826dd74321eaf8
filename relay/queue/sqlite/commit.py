"""The one thread that writes, and groups what waits into one commit. It knows no table.

A request is either rows (what every message needs) or a function that is given the connection
(everything rare). Everything that waits goes into one transaction and costs one sync together. The
rows of all requests are written table by table with a few large statements (`Tables.write`). If
something fails because of a single request, the transaction is done again with a savepoint for
each request, so that only that one fails. So a function may be called twice. Without a savepoint
SQLite has no need to copy the pages that a transaction changes.

A future is resolved after the commit, on the event loop, once a batch. A request runs to its
end whatever becomes of the task that awaits it.

When something fails that is no request's fault the whole batch fails and the connection is
opened again. After a failed sync nobody knows what the disk holds: the pages count as clean
and a second sync would succeed without writing them. The frames of the failed commit are still
in the WAL, and a recovery would make them true; so the first thing a new connection does is a
commit that overwrites them, and nothing else is written before that has been synced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence

from relay.queue.request import Request, resolve, without_new_mail
from relay.queue.sqlite.disk import Spool, is_busy, open_writer, translated
from relay.queue.sqlite.disk_space import DiskSpace, Trouble
from relay.queue.sqlite.statements import Tables
from relay.queue.sqlite.wal import WriteAheadLog
from relay.queue.store import SpoolError, StoredEvent

log = logging.getLogger(__name__)

_BATCH_REQUESTS = 512
_BATCH_BYTES = 16 * 1024 * 1024
_IDLE_SECONDS = 1.0
_LINGER_SECONDS = 0.002
_RESULTS_SECONDS = 0.003


class Writer:
    """Starts with `start`, which opens the database; ends with `close`, after all that was
    submitted.

    `prepare` is called on the thread with the first connection, before anything else; `on_events`
    on the event loop with what was committed; `on_well` on the event loop after a commit that
    follows trouble.
    """

    def __init__(
        self,
        spool: Spool,
        tables: Tables,
        *,
        synchronous: str,
        prepare: Callable[[sqlite3.Connection], None],
        on_events: Callable[[list[StoredEvent]], None],
        on_well: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._tables = tables
        self._synchronous = synchronous
        self._prepare = prepare
        self._on_events = on_events
        self._on_well = on_well
        self._loop = asyncio.get_running_loop()
        self._collected: list[Request] = []
        self._handing_over: asyncio.Handle | None = None
        self._is_urgent = False
        self._waiting: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._db: sqlite3.Connection | None = None
        self.thread = threading.Thread(target=self._run, name="queue-writer", daemon=True)
        self.disk_space = DiskSpace(spool, self._connection)
        self._wal = WriteAheadLog(spool)
        self._trouble = Trouble()
        self._last_batch = 0
        self._commit_seconds = 0.0
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._closed = False

    async def start(self) -> None:
        """Open the database; raises what `prepare` raises, translated."""
        self.thread.start()
        await asyncio.shield(self._started)

    def submit(self, request: Request) -> None:
        """Have it written with the next batch.

        What one turn of the event loop brings goes over together: the thread is woken once for it.
        Results can wait, since no client does: they go over with the next message, and cost no
        sync of their own, and do not wake the thread. If no message comes, they wait for a moment.
        """
        if self._closed:
            raise SpoolError("the queue is closed")
        self._collected.append(request)
        if request.is_result:
            if self._handing_over is None:
                self._handing_over = self._loop.call_later(_RESULTS_SECONDS, self._hand_over)
        elif not self._is_urgent:
            self._is_urgent = True
            if self._handing_over is not None:
                self._handing_over.cancel()
            self._handing_over = self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._handing_over, self._is_urgent = None, False
        collected, self._collected = self._collected, []
        if collected:
            self._waiting.put(collected)

    async def close(self) -> None:
        """Write what was submitted, fold the log into the database and end the thread."""
        if not self._closed:
            self._closed = True
            if self._handing_over is not None:
                self._handing_over.cancel()
            self._hand_over()
            self._waiting.put(None)
        await asyncio.shield(self._ended)
        self.thread.join()

    # The thread.

    def _run(self) -> None:
        try:
            self._tables.load(self._begin())
        except BaseException as exc:
            self._forget_connection()
            self._tell(self._ended, None)
            self._tell(self._started, translated(exc))
            return
        self._tell(self._started, None)
        try:
            while (batch := self._gather()) is not None:
                if not batch:
                    self._maintain(idle=True)
                    continue
                began = time.monotonic()
                self._write(batch)
                self._last_batch, self._commit_seconds = len(batch), time.monotonic() - began
                # The event loop wakes up at once. Until this thread waits, it holds the interpreter
                # lock, so what can be done before is done before.
                is_due = self._wal.is_long or not self._spool.has_ballast
                self._call_loop(resolve, batch, self._on_events)
                if is_due:
                    self._maintain(idle=False)
            self._maintain(idle=True)
        finally:
            self._forget_connection()
            self._tell(self._ended, None)

    def _begin(self) -> sqlite3.Connection:
        """Open the database; on a full disk in the room of the ballast: what is queued can be
        delivered.
        """
        self._spool.create_database()
        try:
            self._db = self._open()
            self._prepare(self._db)
        except (sqlite3.Error, OSError) as exc:
            if not (self.disk_space.is_wanted(exc) and self.disk_space.give_up_ballast()):
                raise
            log.warning("the disk of the queue is full: no new mail is taken until there is room")
            self._forget_connection()
            self._db = self._open()
            self._prepare(self._db)
        self._tables.connected(self._db)
        return self._db

    def _gather(self) -> list[Request] | None:
        """All that waits, up to a bound; [] after a while of nothing, None at the end."""
        try:
            some = self._waiting.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            return []
        began = time.monotonic()
        batch: list[Request] = []
        size_bytes = 0
        while some is not None:
            batch += some
            size_bytes += sum(request.size_bytes for request in some)
            if len(batch) >= _BATCH_REQUESTS or size_bytes >= _BATCH_BYTES:
                return batch
            left = began + self._patience(batch) - time.monotonic()
            try:
                some = self._waiting.get(timeout=left) if left > 0 else self._waiting.get_nowait()
            except queue.Empty:
                return batch
        if not batch:
            return None
        self._waiting.put(None)  # the end comes after this batch
        return batch

    def _patience(self, batch: list[Request]) -> float:
        """How long a batch waits for other requests before it is written, in seconds.

        Where many requests came together last time, as many get a moment to come again, or the
        first client to be answered would take a sync for its next message alone while the others
        are still being answered; the moment is short against what a commit costs on this disk.
        """
        if len(batch) < self._last_batch // 2:
            return min(_LINGER_SECONDS, self._commit_seconds / 4)
        return 0.0

    def _write(self, batch: list[Request]) -> None:
        """Commit the batch, or leave an error with each request that is not in it."""
        try:
            wanted = batch
            if any(request.takes_in for request in batch) and not self.disk_space.is_enough():
                wanted = without_new_mail(batch, "too little space left for the queue")
            if not wanted:
                return
            try:
                self._commit(wanted)
                if self._trouble.ended():
                    self._call_loop(self._on_well)
            except (sqlite3.Error, OSError) as exc:
                self._trouble.began(exc)
                if not is_busy(exc):
                    self._recover()
                if not self.disk_space.is_wanted(exc):
                    raise
                self._make_do(wanted)
        except BaseException as exc:
            error = translated(exc)
            for request in batch:
                request.error = request.error or error
            if not isinstance(exc, sqlite3.Error | OSError | SpoolError):
                log.exception("the queue's writer met a mistake of its own")
                self._forget_connection()

    def _make_do(self, batch: list[Request]) -> None:
        """On a full disk mail can still leave, in the room of the ballast; new mail has to wait
        outside.
        """
        self.disk_space.was_full()
        leaving = without_new_mail(batch, "no space left for the queue")
        if leaving:
            try:
                self._commit(leaving)
            except (sqlite3.Error, OSError):
                self._recover()
                raise

    # One transaction.

    def _commit(self, batch: list[Request]) -> None:
        db, tables = self._connection(), self._tables
        point = tables.point()
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                tables.write(db, batch)
                for request in batch:
                    if request.function is not None:
                        request.result = request.function(db)
            except Exception as exc:
                if not _is_own_fault(exc):
                    raise
                db.execute("ROLLBACK")
                _undone(tables, point, batch)
                db.execute("BEGIN IMMEDIATE")
                for request in sorted(batch, key=lambda one: one.rows is None):
                    self._alone(db, request)
            tables.last(db)
            db.execute("COMMIT")
        except BaseException:
            _undone(tables, point, batch)
            with contextlib.suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            raise
        tables.committed()
        self._wal.written(sum(request.size_bytes for request in batch), len(batch))

    def _alone(self, db: sqlite3.Connection, request: Request) -> None:
        """One request in a savepoint: if it fails, no other does."""
        point = self._tables.point()
        db.execute("SAVEPOINT one")
        try:
            if request.function is not None:
                request.result = request.function(db)
            else:
                self._tables.write(db, [request])
        except Exception as exc:
            if not _is_own_fault(exc):
                raise
            db.execute("ROLLBACK TO one")
            _undone(self._tables, point, [request])
            request.error = translated(exc)
        db.execute("RELEASE one")

    # Between transactions.

    def _connection(self) -> sqlite3.Connection:
        """The connection, opened again where it was given up."""
        if self._db is None:
            db = self._open()
            try:
                self._tables.commit_something(db)
                self._tables.connected(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _open(self) -> sqlite3.Connection:
        return open_writer(
            self._spool.path, synchronous=self._synchronous, wal_limit_bytes=self._wal.limit_bytes
        )

    def _recover(self) -> None:
        """Let go of a connection that failed and overwrite what it may have left; see above."""
        self._forget_connection()
        try:
            self._connection()
        except (sqlite3.Error, OSError, SpoolError) as exc:
            log.debug("the queue's database cannot be opened again yet: %s", exc)

    def _forget_connection(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    def _maintain(self, *, idle: bool) -> None:
        if self._db is None:
            return
        try:
            if idle and self._tables.has_more:
                self._commit([])
            self._wal.checkpoint(self._db, idle=idle)
            self.disk_space.lay_ballast()
            if idle:
                self._wal.truncate(self._db)
        except (sqlite3.Error, OSError) as exc:
            # Nothing is lost: what could not be folded back is in the log, synced.
            self._trouble.began(exc)
            self._wal.forget()
            self._recover()

    # On the event loop.

    def _tell(self, future: asyncio.Future[None], error: BaseException | None) -> None:
        def tell() -> None:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

        self._call_loop(tell)

    def _call_loop(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *args)


def _undone(tables: Tables, point: int, batch: Sequence[Request]) -> None:
    tables.back_to(point)
    for request in batch:
        request.stored.clear()


def _is_own_fault(exc: BaseException) -> bool:
    """Whether one request is to blame, and not the disk."""
    if isinstance(exc, sqlite3.OperationalError):
        return False
    if isinstance(exc, sqlite3.DatabaseError):
        # NOTADB and CORRUPT come as the plain class.
        return type(exc) is not sqlite3.DatabaseError
    return not isinstance(exc, OSError | MemoryError)
