"""The queue of a relay that does not run, for messages that leave it or come to it.

It is opened as a relay opens it: the directory is held by this process alone, what a crash left is
put right, and the queues of further workers are taken into the first one's. Every change is a
commit of the store's writer.
"""

from __future__ import annotations

import os
import pwd
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Self, TypeVar

from relay.mail.files import sync_directory
from relay.queue.api_state import CallsAbout, PendingCall
from relay.queue.move import EVENTS_AT_ONCE, REMEMBERED, Came, Taken
from relay.queue.move_directory import Arrival, Target
from relay.queue.move_file import (
    MovedMessage,
    MovedRecipient,
    MovedReport,
    new_stamp,
    part_damaged,
    stands,
)
from relay.queue.request import Request
from relay.queue.rows import micros
from relay.queue.sqlite.adopt import orphans
from relay.queue.sqlite.disk import DATABASE
from relay.queue.sqlite.files import CONTENT, pieces_of, write_whole
from relay.queue.sqlite.schema import LEAVING
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import CHUNK_BYTES, QueueFull, SpoolError

T = TypeVar("T")


class SqliteMove:
    """Open with `SqliteMove.open`; see `relay.queue.move.MovingQueue`."""

    def __init__(self, store: SqliteStore) -> None:
        self._store = store
        self._directory = store.spool.directory

    @classmethod
    async def open(cls, directory: Path, *, workers: str, make: bool) -> Self:
        """Take the directory. `workers`: how the queues of further workers begin. `make`: where
        there is no queue, too. `SpoolError` where a relay uses it, or it belongs to another user.
        """
        _expect_queue(directory, make=make)
        now = datetime.now(UTC)
        found = orphans(directory, workers, present=())  # none of a directory that is not there
        # Nothing is brought forward: a clock that was ahead is for the relay to judge.
        store = await SqliteStore.open(
            directory, now=now, max_wait=timedelta(days=3650), adopting=found
        )
        moving = cls(store)
        await moving._write(_forget_stamps, micros(now - REMEMBERED))
        return moving

    async def close(self) -> None:
        """Let the queue go."""
        await self._store.close()

    async def _write(self, function: Callable[..., T], *args: object) -> T:
        request = Request(function=lambda db: function(db, *args))
        self._store.writer.submit(request)
        result: T = await request.future
        return result

    # Away.

    async def quiet(self) -> None:
        """No relay runs."""

    async def unfinished(self, target: Target) -> list[MovedMessage]:
        """The messages that are leaving for this directory already."""
        return await self._write(_unfinished, target)

    async def take(self, target: Target, *, after: str, limit: int) -> Taken:
        """Note of the next messages that they are leaving."""
        return await self._write(_take, target, after, limit)

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces."""
        async for piece in self._store.read_content(queue_id):
            yield piece

    async def put_back(self, messages: Sequence[MovedMessage]) -> None:
        """These messages stay."""
        await self._write(_put_back, messages)

    async def remove(self, messages: Sequence[MovedMessage]) -> None:
        """These messages have left."""
        await self._write(_remove, messages)

    async def leaving_elsewhere(self, target: Target) -> list[str]:
        """Other directories that messages are leaving for."""
        return target.other_places(await self._write(_targets))

    async def count_messages(self) -> int:
        """How many messages there are."""
        return await self._write(_count)

    # Back.

    async def add(self, arrivals: Sequence[Arrival]) -> dict[str, Came]:
        """Commit messages. Their large content is in its files, synced, before that."""
        spool = self._store.spool
        needed = sum(one.content_bytes for one in arrivals)
        if spool.free_bytes() < spool.reserve_bytes + needed:
            raise QueueFull("too little space left for the queue")
        return await self._write(_add, self._directory, arrivals, micros(datetime.now(UTC)))

    # Calls.

    async def calls(self, about: CallsAbout, *, limit: int) -> list[PendingCall]:
        """The next calls; first those about events that no webhook has heard of yet."""
        state = self._store.api_state
        webhooks = await state.webhooks()
        while webhooks:
            seen = max(await state.calls_seen(), min(one.since for one in webhooks))
            events = await self._store.events_after(seen, limit=EVENTS_AT_ONCE)
            if not events:
                break
            await state.add_calls(about(webhooks, events), seen=events[-1].seq)
        return await state.calls_due(now=datetime(9999, 1, 1, tzinfo=UTC), limit=limit)

    async def remove_calls(self, calls: Sequence[PendingCall]) -> None:
        """These calls have left."""
        for call in calls:
            await self._store.api_state.settle_call(call, due=None)

    async def add_call(self, call: PendingCall, stamp: str) -> None:
        """Commit a call, unless its stamp was seen before."""
        await self._write(_add_call, call, stamp, micros(datetime.now(UTC)))


def _expect_queue(directory: Path, *, make: bool) -> None:
    """There is a queue, and it is ours: files of root would be in the way of the relay's user."""
    if not (make or (directory / DATABASE).exists()):
        raise SpoolError(f"{directory}: there is no queue")
    with suppress(FileNotFoundError):
        owner = directory.stat().st_uid
        if os.geteuid() == 0 != owner:
            try:
                name = pwd.getpwuid(owner).pw_name
            except KeyError:
                name = f"the user {owner}"
            raise SpoolError(f"{directory} belongs to {name}: run this as {name}")


# On the writer's thread.


def _forget_stamps(db: sqlite3.Connection, before: int) -> None:
    db.execute("DELETE FROM imported WHERE at < ?", (before,))


_MESSAGE = "SELECT queue_id, reverse_path, arrived, size_bytes, data FROM message"


def _rows(
    db: sqlite3.Connection, message: tuple[str, str, int, int, str], stamp: str
) -> MovedMessage:
    """A message of its row in `_MESSAGE`. What is damaged `part_damaged` refuses."""
    queue_id, reverse_path, arrived, size_bytes, data = message
    recipients = db.execute(
        "SELECT idx, domain, state, due, data FROM recipient WHERE queue_id = ? ORDER BY idx",
        (queue_id,),
    )
    reports = db.execute(
        "SELECT idx, is_done, since, report_after, data FROM owed WHERE queue_id = ?"
        " ORDER BY idx, is_done",
        (queue_id,),
    )
    return MovedMessage(
        queue_id,
        stamp,
        reverse_path,
        arrived,
        size_bytes,
        data,
        tuple(MovedRecipient(*row) for row in recipients),
        tuple(
            MovedReport(index, bool(is_done), since, report_after, text)
            for index, is_done, since, report_after, text in reports
        ),
    )


def _unfinished(db: sqlite3.Connection, target: Target) -> list[MovedMessage]:
    found = db.execute("SELECT queue_id, stamp, target FROM leaving ORDER BY queue_id").fetchall()
    messages = []
    for queue_id, stamp, noted in found:
        if target.is_meant(noted):
            row = db.execute(f"{_MESSAGE} WHERE queue_id = ?", (queue_id,)).fetchone()
            messages.append(_rows(db, row, stamp))
    return messages


def _take(db: sqlite3.Connection, target: Target, after: str, limit: int) -> Taken:
    rows = db.execute(
        f"{_MESSAGE} WHERE queue_id > ? AND queue_id NOT IN (SELECT queue_id FROM leaving)"
        " ORDER BY queue_id LIMIT ?",
        (after, limit),
    ).fetchall()
    taken, damaged = part_damaged(_rows(db, row, new_stamp()) for row in rows)
    db.executemany(
        "INSERT INTO leaving VALUES (?, ?, ?)",
        [(one.queue_id, one.stamp, str(target)) for one in taken],
    )
    db.executemany(
        f"UPDATE recipient SET place = {LEAVING} WHERE queue_id = ?",
        [(one.queue_id,) for one in taken],
    )
    return Taken(taken, rows[-1][0] if len(rows) == limit else None, damaged=damaged)


def _put_back(db: sqlite3.Connection, messages: Sequence[MovedMessage]) -> None:
    for one in messages:
        db.executemany(
            "UPDATE recipient SET place = ?, due = ? WHERE queue_id = ? AND idx = ?",
            [(*stands(each), one.queue_id, each.index) for each in one.recipients],
        )
        db.execute("DELETE FROM leaving WHERE queue_id = ?", (one.queue_id,))


def _remove(db: sqlite3.Connection, messages: Sequence[MovedMessage]) -> None:
    ids = [(one.queue_id,) for one in messages]
    for table in ("recipient", "owed", "message", "leaving"):
        db.executemany(f"DELETE FROM {table} WHERE queue_id = ?", ids)


def _targets(db: sqlite3.Connection) -> list[str]:
    return [row[0] for row in db.execute("SELECT DISTINCT target FROM leaving ORDER BY target")]


def _count(db: sqlite3.Connection) -> int:
    count: int = db.execute("SELECT count(*) FROM message").fetchone()[0]
    return count


def _add(
    db: sqlite3.Connection, directory: Path, arrivals: Sequence[Arrival], now: int
) -> dict[str, Came]:
    came = {one.message.queue_id: _come(db, directory, one, now) for one in arrivals}
    sync_directory(directory / CONTENT)
    return came


def _come(db: sqlite3.Connection, directory: Path, one: Arrival, now: int) -> Came:
    message = one.message
    queue_id, stamp = message.queue_id, message.stamp
    key = (queue_id, stamp)
    if db.execute("SELECT 1 FROM imported WHERE queue_id = ? AND stamp = ?", key).fetchone():
        return Came.BEFORE
    there = db.execute(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data, in_file, content FROM message"
        " WHERE queue_id = ?",
        (queue_id,),
    ).fetchone()
    leaving = db.execute("SELECT stamp FROM leaving WHERE queue_id = ?", (queue_id,)).fetchone()
    if there is not None and leaving != (stamp,):
        known = _rows(db, there[:5], stamp)
        in_file, content = there[5:]
        if in_file:
            digest = _digest(directory / CONTENT / queue_id, known.size_bytes)
        else:
            digest = sha256(content).hexdigest()
        if not one.is_same(known, digest):
            return Came.OTHER_THERE
    db.execute("INSERT INTO imported VALUES (?, ?, ?)", (queue_id, stamp, now))
    if there is not None:
        if leaving == (stamp,):
            _put_back(db, [message])
        return Came.BEFORE
    _insert(db, directory, one)
    return Came.ADDED


def _digest(path: Path, size_bytes: int) -> str:
    found = sha256()
    for piece in pieces_of(path, size_bytes):
        found.update(piece)
    return found.hexdigest()


def _insert(db: sqlite3.Connection, directory: Path, one: Arrival) -> None:
    message = one.message
    in_file = one.content_bytes > CHUNK_BYTES
    if in_file:
        write_whole(directory / CONTENT / message.queue_id, one.content())
    db.execute(
        "INSERT INTO message VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            message.queue_id,
            message.arrived,
            message.size_bytes,
            len(message.recipients),
            in_file,
            message.reverse_path,
            message.data,
            None if in_file else b"".join(one.content()),
        ),
    )
    db.executemany("INSERT INTO recipient VALUES (?, ?, ?, ?, ?, ?, ?)", message.recipient_rows)
    db.executemany("INSERT INTO owed VALUES (?, ?, ?, ?, ?, ?)", message.report_rows)


def _add_call(db: sqlite3.Connection, call: PendingCall, stamp: str, now: int) -> None:
    if db.execute(
        "INSERT INTO imported VALUES ('', ?, ?) ON CONFLICT DO NOTHING", (stamp, now)
    ).rowcount:
        db.execute(
            "INSERT INTO call (due, attempts, url, line) VALUES (?, ?, ?, ?)",
            (micros(call.due), call.attempts, call.url, call.line),
        )
