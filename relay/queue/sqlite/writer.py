"""The one thread that writes, and groups what waits into one commit.

A request is either `Rows` (rows to add, change and take away: what every message needs)
or a `Call` (a function given the connection: everything rare). Everything that waits goes
into one transaction and costs one sync together. The `Rows` of all requests are written
table by table with a few large statements; if one of them spoils that, the transaction is
done again with a savepoint for each request, so that only the guilty one fails.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from relay.mail.event import Event
from relay.queue.rows import FINAL_NUMBER, micros
from relay.queue.sqlite.disk import PAGE_BYTES, Spool, is_busy, is_full, open_writer, translated
from relay.queue.sqlite.files import sync_directory
from relay.queue.sqlite.reader import OWING
from relay.queue.sqlite.schema import CLAIMED
from relay.queue.store import QueueFull, SpoolError, StoredEvent

__all__ = ["Call", "Request", "Rows", "Writer", "commit_something", "unknown"]

log = logging.getLogger(__name__)

Row = tuple[Any, ...]

_BATCH_REQUESTS = 512
_BATCH_BYTES = 16 * 1024 * 1024
_MOST_ROWS = 32
_IDLE_SECONDS = 1.0
_FULL_PAUSE_SECONDS = 1.0
_AMPLE_BYTES = 256 * 1024 * 1024
_AMPLE_SECONDS = 0.1
_HARDLY_ANY_BYTES = 64 * 1024
_BALLAST_SECONDS = 1.0
_LINGER_SECONDS = 0.002
_RESULTS_SECONDS = 0.003
_WORTH_TRUNCATING_BYTES = 1024 * 1024


class _Refused(SpoolError):
    """A request asks for what the queue's state does not allow: its own fault, nobody else's."""


@dataclass(slots=True, eq=False)
class Request:
    """Something to be written. `on_commit` or `on_failure` runs on the event loop before the future
    ends.
    """

    future: asyncio.Future[Any]
    on_commit: Callable[[Any], None] | None = None
    on_failure: Callable[[], None] | None = None
    result: Any = None
    error: BaseException | None = None
    stored: list[StoredEvent] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Call(Request):
    """`function` does the writing and its value is the result."""

    function: Callable[[sqlite3.Connection], Any] = lambda _: None


@dataclass(slots=True, eq=False)
class Rows(Request):
    """Rows of new messages, and what an attempt changed.

    `finished`: messages whose recipients all became final now, with their number; they leave.
    `updates`: (queue_id, idx, state, place, due, data) of claimed recipients. `perhaps_done`:
    messages to leave if no recipient is open any more. `owed`: rows of what is to be reported
    later, `paid` what was, by (queue_id, idx, is_done). `settled`: a message of which the result
    tells whether its debts are to be paid now. `takes_in`: mail from outside, which is refused when
    room gets short.
    """

    messages: list[Row] = field(default_factory=list)
    recipients: list[Row] = field(default_factory=list)
    events: Sequence[Event] = ()
    finished: list[tuple[str, int]] = field(default_factory=list)
    updates: list[Row] = field(default_factory=list)
    perhaps_done: list[str] = field(default_factory=list)
    owed: list[Row] = field(default_factory=list)
    paid: list[tuple[str, int, bool]] = field(default_factory=list)
    settled: str = ""
    takes_in: bool = False
    size_bytes: int = 0


class Writer:
    """Starts with `start`, which opens the database; ends with `close`, after all that was
    submitted.

    `on_events` is called on the event loop with what was committed; `on_gone` on the writer's
    thread with the messages that have left and had a file; `on_well` on the event loop after a
    commit that follows on trouble.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        synchronous: str,
        prepare: Callable[[sqlite3.Connection], None],
        on_events: Callable[[list[StoredEvent]], None],
        on_gone: Callable[[list[str]], None],
        on_well: Callable[[], None],
    ) -> None:
        self._spool = spool
        self._synchronous = synchronous
        self._prepare = prepare
        self._on_events = on_events
        self._on_gone = on_gone
        self._on_well = on_well
        self._gone: list[str] = []
        self._wal_limit_bytes = spool.ballast_bytes
        self._loop = asyncio.get_running_loop()
        self._collected: list[Request] = []
        self._waiting: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._db: sqlite3.Connection | None = None
        self._thread = threading.Thread(target=self._run, name="queue-writer", daemon=True)
        self._last_seq = 0
        self._written_bytes = 0
        self._swell = 2.0
        self._full_until = 0.0
        self._ample_until = 0.0
        self._next_ballast = 0.0
        self._trouble = _Trouble()
        self._company = 0
        self._commit_seconds = 0.0
        self._mark = self._mark_written = 0
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._closed = False

    async def start(self) -> None:
        """Open the database; raises what `prepare` raises, translated."""
        self._thread.start()
        await asyncio.shield(self._started)

    def submit(self, request: Request) -> None:
        """Have it written with the next batch.

        What one turn of the event loop brings goes over together: the thread is woken once for it.
        """
        if self._closed:
            raise SpoolError("the queue is closed")
        self._collected.append(request)
        if len(self._collected) == 1:
            self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        collected, self._collected = self._collected, []
        if collected:
            self._waiting.put(collected)

    @property
    def mark(self) -> int:
        """What `note_mark` was last told."""
        return self._mark

    def note_mark(self, seq: int) -> None:
        """Write the mark of the log along with the next commit."""
        self._mark = max(self._mark, seq)

    async def close(self) -> None:
        """Write what was submitted, fold the WAL into the database and end the thread."""
        if not self._closed:
            self._closed = True
            self._hand_over()
            self._waiting.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    # The thread.

    def _run(self) -> None:
        try:
            self._begin()
            assert self._db is not None
            self._notice_who_leaves(self._db)
            self._last_seq = self._db.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()[
                0
            ]
            mark = self._db.execute("SELECT value FROM meta WHERE key = 'log_mark'").fetchone()
            self._mark = self._mark_written = mark[0] if mark else 0
            self._last_seq = max(self._last_seq, self._mark)
        except BaseException as exc:
            self._forget_connection()
            self._tell(self._ended, None)
            self._tell(self._started, translated(exc))
            return
        self._tell(self._started, None)
        try:
            while (batch := self._gather()) is not None:
                if batch:
                    began = time.monotonic()
                    self._write(batch)
                    self._company, self._commit_seconds = len(batch), time.monotonic() - began
                    self._call_loop(self._resolve, batch)
                self._maintain(idle=not batch)
            self._maintain(idle=True)
        finally:
            self._forget_connection()
            self._tell(self._ended, None)

    def _begin(self) -> None:
        """Open the database; on a full disk in the room of the ballast: what is queued can be
        delivered.
        """
        self._spool.create_database()
        try:
            self._db = self._open()
            self._prepare(self._db)
        except (sqlite3.Error, OSError) as exc:
            if not (self._wants_room(exc) and self._spool.drop_ballast()):
                raise
            log.warning("the disk of the queue is full: no new mail is taken until there is room")
            self._forget_connection()
            self._next_ballast = time.monotonic() + _BALLAST_SECONDS
            self._db = self._open()
            self._prepare(self._db)

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
            size_bytes += sum(request.size_bytes for request in some if isinstance(request, Rows))
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
        """How long a batch waits for company before it is written, in seconds.

        Results can: nobody stands at a counter for them. With the next message they cost no sync of
        their own, and do not keep it waiting. And where many came together last time, as many get a
        moment to come again, or the first to be answered would take a sync for itself while the
        others are still being told; that is short against what a commit costs on this disk.
        """
        if all(isinstance(request, Rows) and not request.takes_in for request in batch):
            return _RESULTS_SECONDS
        if len(batch) < self._company // 2:
            return min(_LINGER_SECONDS, self._commit_seconds / 4)
        return 0.0

    def _write(self, batch: list[Request]) -> None:
        """Commit the batch, or leave an error with each request that is not in it."""
        try:
            wanted = self._refuse_without_room(batch)
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
                if not self._wants_room(exc):
                    raise
                self._make_do(wanted)
        except BaseException as exc:
            error = translated(exc)
            for request in batch:
                request.error = request.error or error
            if not isinstance(exc, sqlite3.Error | OSError | SpoolError):
                log.exception("the queue's writer met a mistake of its own")
                self._forget_connection()

    def _wants_room(self, exc: BaseException) -> bool:
        """Whether it failed for want of space, which SQLite says in more than one way."""
        return is_full(exc) or (not is_busy(exc) and self._spool.free_bytes() < _HARDLY_ANY_BYTES)

    def _make_do(self, batch: list[Request]) -> None:
        """On a full disk mail can still leave, in the room of the ballast; new mail has to wait
        outside.
        """
        self._full_until = time.monotonic() + _FULL_PAUSE_SECONDS
        leaving = []
        for request in batch:
            if isinstance(request, Rows) and request.takes_in:
                request.error = QueueFull("no space left for the queue")
            else:
                leaving.append(request)
        self._spool.drop_ballast()
        self._next_ballast = self._full_until
        if leaving:
            try:
                self._commit(leaving)
            except (sqlite3.Error, OSError):
                self._recover()
                raise

    def _refuse_without_room(self, batch: list[Request]) -> list[Request]:
        """The requests that may go on; new mail only while there is room."""
        if not any(isinstance(request, Rows) and request.takes_in for request in batch):
            return batch
        if time.monotonic() >= self._full_until and self._has_room():
            return batch
        going = []
        for request in batch:
            if isinstance(request, Rows) and request.takes_in:
                request.error = QueueFull("too little space left for the queue")
            else:
                going.append(request)
        return going

    def _has_room(self) -> bool:
        if time.monotonic() < self._ample_until:
            return True
        room, reserve = self._spool.free_bytes(), self._spool.reserve_bytes
        if room >= reserve:
            if room >= reserve + _AMPLE_BYTES:
                self._ample_until = time.monotonic() + _AMPLE_SECONDS
            return True
        # The file does not shrink when mail leaves: what is free inside it is room too.
        try:
            free_pages: int = self._connection().execute("PRAGMA freelist_count").fetchone()[0]
        except (sqlite3.Error, OSError, SpoolError):
            return False
        return room + free_pages * PAGE_BYTES >= reserve

    # One transaction.

    def _commit(self, batch: list[Request]) -> None:
        db = self._connection()
        rows = [request for request in batch if isinstance(request, Rows)]
        first_seq = self._last_seq
        mark = self._mark
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                self._write_rows(db, rows)
            except Exception as exc:
                if not _is_own_fault(exc):
                    raise
                db.execute("ROLLBACK")
                self._last_seq = first_seq
                for one in rows:
                    one.stored.clear()
                db.execute("BEGIN IMMEDIATE")
                for one in rows:
                    self._alone(db, one, partial(self._write_one, one))
            for call in (request for request in batch if isinstance(request, Call)):
                self._alone(db, call, call.function)
            if mark != self._mark_written:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('log_mark', ?)", (mark,))
            gone = self._who_leaves(db)
            db.execute("COMMIT")
        except BaseException:
            self._last_seq = first_seq
            self._gone.clear()
            for request in batch:
                request.stored.clear()
            with contextlib.suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            raise
        self._mark_written = mark
        if gone:
            self._on_gone(gone)
        self._written_bytes += (
            sum(request.size_bytes for request in rows) + 2048 * len(batch) + 8 * PAGE_BYTES
        )

    def _alone(
        self, db: sqlite3.Connection, request: Request, write: Callable[[sqlite3.Connection], Any]
    ) -> None:
        """One request in a savepoint: its mistakes stay its own."""
        seq = self._last_seq
        db.execute("SAVEPOINT one")
        try:
            request.result = write(db)
        except Exception as exc:
            if not _is_own_fault(exc):
                raise
            db.execute("ROLLBACK TO one")
            self._last_seq = seq
            request.stored.clear()
            request.error = translated(exc)
        db.execute("RELEASE one")

    def _write_one(self, request: Rows, db: sqlite3.Connection) -> Any:
        self._write_rows(db, [request])
        return request.result

    def _write_rows(self, db: sqlite3.Connection, requests: Sequence[Rows]) -> None:
        """All rows of some requests, table by table."""
        if not requests:
            return
        _insert(db, "message", 8, _all(request.messages for request in requests))
        _insert(db, "recipient", 7, _all(request.recipients for request in requests))
        _finish(db, _all(request.finished for request in requests))
        _update(db, _all(request.updates for request in requests))
        _insert(db, "owed", 6, _all(request.owed for request in requests))
        _pay(db, _all(request.paid for request in requests))
        finish_if_done(db, _all(request.perhaps_done for request in requests))
        _insert(
            db,
            "event",
            8,
            [
                row
                for request in requests
                if request.events
                for row in self._number(request, request.events)
            ],
        )
        _tell_who_owes(db, [request for request in requests if request.settled])

    def _number(self, request: Request, events: Iterable[Event]) -> list[Row]:
        """The rows of a request's events, each with the next number."""
        rows = []
        for event in events:
            self._last_seq = seq = self._last_seq + 1
            request.stored.append(StoredEvent(seq, event))
            rows.append(event_row(seq, event))
        return rows

    def write_events(self, db: sqlite3.Connection, request: Call, events: Iterable[Event]) -> None:
        """Add events within a `Call`."""
        _insert(db, "event", 8, self._number(request, events))

    # Between transactions.

    def _connection(self) -> sqlite3.Connection:
        """The connection, opened again where it was given up."""
        if self._db is None:
            db = self._open()
            try:
                commit_something(db, self._spool.directory)
                self._notice_who_leaves(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _open(self) -> sqlite3.Connection:
        return open_writer(
            self._spool.path, synchronous=self._synchronous, wal_limit_bytes=self._wal_limit_bytes
        )

    def _notice_who_leaves(self, db: sqlite3.Connection) -> None:
        """Have every message with a file noticed that is removed, by whatever statement."""
        db.create_function("leaves", 1, self._gone.append)
        db.execute(
            "CREATE TEMP TRIGGER leaves AFTER DELETE ON main.message WHEN OLD.in_file"
            " BEGIN SELECT leaves(OLD.queue_id); END"
        )

    def _who_leaves(self, db: sqlite3.Connection) -> list[str]:
        """The messages with a file that this transaction removes; what was undone in it is left
        out.
        """
        gone = unknown(self._gone, db)
        self._gone.clear()
        return gone

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
        """Fold the WAL back when it has grown; when nothing waits, also shorten it."""
        if self._db is None:
            return
        try:
            if idle and self._mark != self._mark_written:
                self._commit([])
            if self._written_bytes * self._swell >= self._wal_limit_bytes or (
                idle and self._written_bytes
            ):
                self._checkpoint()
            if not self._spool.has_ballast and time.monotonic() >= self._next_ballast:
                self._next_ballast = time.monotonic() + _BALLAST_SECONDS
                self._spool.lay_ballast()
            # On a full disk the log keeps what it has: it may not get it again.
            if (
                idle
                and self._spool.has_ballast
                and self._spool.wal_bytes() > _WORTH_TRUNCATING_BYTES
            ):
                self._truncate()
        except (sqlite3.Error, OSError) as exc:
            # Nothing is lost: what could not be folded back is in the WAL, synced.
            self._trouble.began(exc)
            self._written_bytes = 0
            self._recover()

    def _checkpoint(self) -> None:
        """Fold the WAL back, and learn from its size how much a written octet swells there.

        How long the WAL is nobody tells us between checkpoints: its file keeps its size.
        """
        _, frames, folded = self._connection().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        wal_bytes = frames * PAGE_BYTES
        self._swell = min(
            max(wal_bytes / max(self._written_bytes, PAGE_BYTES), 0.9 * self._swell, 0.5), 50.0
        )
        self._written_bytes = 0 if folded == frames else self._written_bytes // 2
        if folded < frames and wal_bytes > 8 * self._wal_limit_bytes:
            log.warning(
                "the queue's write-ahead log has %d MiB: a reader holds it", wal_bytes >> 20
            )

    def _truncate(self) -> None:
        db = self._connection()
        db.execute("PRAGMA busy_timeout = 0")
        try:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            db.execute("PRAGMA busy_timeout = 5000")

    # On the event loop.

    def _resolve(self, batch: list[Request]) -> None:
        stored = [event for request in batch if request.error is None for event in request.stored]
        if stored:
            stored.sort(key=lambda one: one.seq)
            self._on_events(stored)
        for request in batch:
            future = request.future
            if request.error is None:
                if request.on_commit is not None:
                    request.on_commit(request.result)
                if not future.done():
                    future.set_result(request.result)
            else:
                if request.on_failure is not None:
                    request.on_failure()
                if not future.done():
                    future.set_exception(request.error)

    def _tell(self, future: asyncio.Future[None], error: BaseException | None) -> None:
        def tell() -> None:
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)

        self._call_loop(tell)

    def _call_loop(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function, *args)


def unknown(queue_ids: Iterable[str], db: sqlite3.Connection) -> list[str]:
    """Those of which there is no message in the queue."""
    asked = "SELECT 1 FROM message WHERE queue_id = ?"
    return [queue_id for queue_id in queue_ids if db.execute(asked, (queue_id,)).fetchone() is None]


def commit_something(db: sqlite3.Connection, directory: Path) -> None:
    """A commit of its own. The sync it ends with is one of all that lies in the log before it, too.

    SQLite syncs the name of a new log along with it, and overlooks it where that fails.
    """
    db.execute("BEGIN IMMEDIATE")
    db.execute(
        "INSERT INTO meta VALUES ('reopened', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1"
    )
    db.execute("COMMIT")
    sync_directory(directory)


class _Trouble:
    """Says once that the disk fails, and once that it works again; a full disk is not to fill the
    log too.
    """

    def __init__(self) -> None:
        self._said = ""

    def began(self, exc: BaseException) -> None:
        if str(exc) != self._said:
            self._said = str(exc)
            log.error("the queue's database failed, nothing was changed: %s", exc)

    def ended(self) -> bool:
        """All is well; whether it was not."""
        said, self._said = self._said, ""
        if said:
            log.warning("the queue's database works again, after: %s", said)
        return bool(said)


def event_row(seq: int, event: Event) -> Row:
    """The columns of an event."""
    return (
        seq,
        micros(event.at),
        event.name,
        event.queue_id,
        event.sender,
        event.recipient,
        event.id,
        event.line,
    )


def _is_own_fault(exc: BaseException) -> bool:
    """Whether one request is to blame, and not the disk."""
    if isinstance(exc, sqlite3.OperationalError):
        return False
    if isinstance(exc, sqlite3.DatabaseError):
        # NOTADB and CORRUPT come as the plain class.
        return type(exc) is not sqlite3.DatabaseError
    return not isinstance(exc, OSError | MemoryError)


def _all(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


# Statements for many rows at once: each execution lets go of the interpreter lock and has to
# get it back from a busy event loop, so there are few of them. There is one for each number of
# rows, so that number has a bound: all of them stay prepared.


def _pieces(rows: Sequence[Any]) -> Iterable[Sequence[Any]]:
    for start in range(0, len(rows), _MOST_ROWS):
        yield rows[start : start + _MOST_ROWS]


@lru_cache(maxsize=256)
def _values(width: int, count: int) -> str:
    row = f"({','.join('?' * width)})"
    return ",".join([row] * count)


@lru_cache(maxsize=256)
def _insert_statement(table: str, width: int, count: int) -> str:
    return f"INSERT INTO {table} VALUES {_values(width, count)}"


def _insert(db: sqlite3.Connection, table: str, width: int, rows: Sequence[Row]) -> None:
    for piece in _pieces(rows):
        db.execute(_insert_statement(table, width, len(piece)), list(chain.from_iterable(piece)))


@lru_cache(maxsize=256)
def _in_statement(statement: str, count: int) -> str:
    return statement.replace("(?)", f"({','.join('?' * count)})")


def _for_ids(db: sqlite3.Connection, statement: str, ids: Sequence[str]) -> int:
    """Run a statement that ends in `IN (?)` for many ids; how many rows it changed."""
    changed = 0
    for piece in _pieces(ids):
        changed += db.execute(_in_statement(statement, len(piece)), piece).rowcount
    return changed


def _finish(db: sqlite3.Connection, finished: Sequence[tuple[str, int]]) -> None:
    """Let messages go whose recipients are all claimed and all final now."""
    if not finished:
        return
    ids = [queue_id for queue_id, _ in finished]
    gone = _for_ids(db, f"DELETE FROM recipient WHERE place = {CLAIMED} AND queue_id IN (?)", ids)
    if gone != sum(count for _, count in finished):
        raise _Refused("the recipients are not claimed")
    if _for_ids(db, "DELETE FROM message WHERE queue_id IN (?)", ids) != len(ids):
        raise _Refused("there is no such message")


@lru_cache(maxsize=64)
def _update_statement(count: int) -> str:
    # It has to begin with UPDATE: sqlite3 counts no rows for a statement that begins with WITH.
    return (
        "UPDATE recipient SET state = new.column3, place = new.column4, due = new.column5, data = new.column6"
        f" FROM (VALUES {_values(6, count)}) AS new"
        " WHERE recipient.queue_id = new.column1 AND recipient.idx = new.column2"
        f" AND recipient.place = {CLAIMED}"
    )


def _update(db: sqlite3.Connection, updates: Sequence[Row]) -> None:
    """Write what an attempt left of recipients that were claimed for it."""
    for piece in _pieces(updates):
        if db.execute(
            _update_statement(len(piece)), list(chain.from_iterable(piece))
        ).rowcount != len(piece):
            raise _Refused("the recipients are not claimed")


def _pay(db: sqlite3.Connection, paid: Sequence[tuple[str, int, bool]]) -> None:
    """Strike out what has been reported; what nobody owes is not reported again."""
    strike = "DELETE FROM owed WHERE queue_id = ? AND idx = ? AND is_done = ?"
    for debt in paid:
        if not db.execute(strike, debt).rowcount:
            raise _Refused(f"{debt[0]}: nothing is owed about recipient {debt[1]}")


def _tell_who_owes(db: sqlite3.Connection, requests: Sequence[Rows]) -> None:
    """Whether each of these is the one to pay: decided in the commit, so that exactly one is told.

    Of those of one message that are written together it is the last.
    """
    owing: set[str] = set()
    for piece in _pieces([request.settled for request in requests]):
        owing.update(row[0] for row in db.execute(_in_statement(OWING, len(piece)), piece))
    for request in reversed(requests):
        request.result = request.settled in owing
        owing.discard(request.settled)


def finish_if_done(db: sqlite3.Connection, ids: Sequence[str]) -> None:
    """Let messages go that have no open recipient left, and about which nothing is owed."""
    if not ids:
        return
    gone = _for_ids(
        db,
        "DELETE FROM message WHERE NOT EXISTS (SELECT 1 FROM recipient"
        f" WHERE recipient.queue_id = message.queue_id AND state < {FINAL_NUMBER})"
        " AND NOT EXISTS (SELECT 1 FROM owed WHERE owed.queue_id = message.queue_id) AND queue_id IN (?)",
        ids,
    )
    if gone:
        _for_ids(
            db,
            "DELETE FROM recipient WHERE NOT EXISTS (SELECT 1 FROM message"
            " WHERE message.queue_id = recipient.queue_id) AND queue_id IN (?)",
            ids,
        )
