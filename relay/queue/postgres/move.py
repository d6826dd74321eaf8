"""The queue on a server, for messages that leave it or come to it, while nodes use it or not.

This is no node: it claims nothing under a lease. A message is taken in a transaction that locks its
row and those of its recipients, and only if no live lease has a claim of it; the nodes find it
nowhere afterwards. What a message of unknown outcome has become, the next run finds out.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from time import monotonic
from typing import Any, Self

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
from relay.queue.postgres.api_state import UnseenEvents, add_calls_about, unseen_events
from relay.queue.postgres.connection import SAFE_COMMIT, Db, Link, Server
from relay.queue.postgres.inserts import (
    NEW_MESSAGES,
    NEW_PENDING,
    NEW_RECIPIENTS,
    columns,
    numbered,
)
from relay.queue.postgres.lease import ask_to_give_back, others_that_hold
from relay.queue.postgres.reader import Reader
from relay.queue.postgres.schema import CLAIMED, LEAVING, migrate
from relay.queue.postgres.staging import INLINE_BYTES
from relay.queue.rows import micros, moment

_SECONDS = 120.0
_GIVE_BACK_SECONDS = 3.0
_GLANCE_SECONDS = 0.05
_LOST_SECONDS = 10.0
"""A lease that has been over for so long while we look is lost."""


class PostgresMove:
    """Open with `PostgresMove.open`; see `relay.queue.move.MovingQueue`."""

    def __init__(self, server: Server) -> None:
        self._link = Link(server, seconds=_SECONDS)
        self._reader = Reader(server)
        self._over_since: dict[int, float] = {}

    @classmethod
    async def open(cls, server: Server) -> Self:
        """Bring the tables up to date. `SpoolError` where the server cannot be used."""
        moving = cls(server)
        try:
            await moving._link.ask(migrate)
            now = await moving._link.ask(_now)
            await moving._link.ask(_forget_stamps, micros(now - REMEMBERED))
        except BaseException:
            await moving.close()
            raise
        return moving

    async def close(self) -> None:
        """Let the connections go."""
        await self._link.close()
        await self._reader.close()

    # Away.

    async def quiet(self) -> None:
        """Have the nodes give back what they have not begun on; and see which of them are lost."""
        ended = await self._link.ask(_ended_leases)
        self._over_since = {id: self._over_since.get(id, monotonic()) for id in ended}
        until = monotonic() - _LOST_SECONDS
        if lost := [id for id, since in self._over_since.items() if since <= until]:
            await self._link.ask(_mark_lost, lost)
        number = await self._link.ask(ask_to_give_back)
        for _ in range(round(_GIVE_BACK_SECONDS / _GLANCE_SECONDS)):
            if not await self._link.ask(others_that_hold, 0, number):
                return
            await asyncio.sleep(_GLANCE_SECONDS)

    async def unfinished(self, target: Target) -> list[MovedMessage]:
        """The messages that are leaving for this directory already."""
        return await self._link.ask(_unfinished, target)

    async def take(self, target: Target, *, after: str, limit: int) -> Taken:
        """Note of the next messages that they are leaving."""
        return await self._link.ask(_take, target, after, limit)

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces."""
        async for piece in self._reader.read_content(queue_id):
            yield piece

    async def put_back(self, messages: Sequence[MovedMessage]) -> None:
        """These messages stay."""
        await self._link.ask(_put_back_all, messages)

    async def remove(self, messages: Sequence[MovedMessage]) -> None:
        """These messages have left."""
        await self._link.ask(_remove, messages)

    async def leaving_elsewhere(self, target: Target) -> list[str]:
        """Other directories that messages are leaving for."""
        return target.other_places(await self._link.ask(_targets))

    async def count_messages(self) -> int:
        """How many messages there are."""
        return await self._link.ask(_count)

    # Back.

    async def add(self, arrivals: Sequence[Arrival]) -> dict[str, Came]:
        """Commit messages with their content. Live nodes deliver them at once."""
        return await self._link.ask(_add, arrivals)

    # Calls.

    async def calls(self, about: CallsAbout, *, limit: int) -> list[PendingCall]:
        """The next calls that no node is making; first those about events of nodes that are not
        there any more.
        """
        while (found := await self._link.ask(unseen_events, EVENTS_AT_ONCE, None)) is not None:
            await self._link.ask(_add_calls_about, found, about(found.webhooks, found.events))
        return await self._link.ask(_free_calls, limit)

    async def remove_calls(self, calls: Sequence[PendingCall]) -> None:
        """These calls have left."""
        await self._link.ask(_remove_calls, [call.number for call in calls])

    async def add_call(self, call: PendingCall, stamp: str) -> None:
        """Commit a call, unless its stamp was seen before."""
        await self._link.ask(_add_call, call, stamp)


async def _now(db: Db) -> datetime:
    now: datetime = await db.fetchval("SELECT now()")
    return now.astimezone(UTC)


async def _forget_stamps(db: Db, before: int) -> None:
    await db.execute("DELETE FROM relay.imported WHERE at < $1", before)


async def _ended_leases(db: Db) -> list[int]:
    rows = await db.fetch("SELECT id FROM relay.lease WHERE lost IS NULL AND expires < now()")
    return [row[0] for row in rows]


async def _mark_lost(db: Db, ids: list[int]) -> None:
    async with db.transaction():
        # Waits for a batch that is being committed, as a node does.
        await db.execute(
            "SELECT 1 FROM relay.lease WHERE id = ANY($1) AND expires < now() ORDER BY id"
            " FOR UPDATE",
            ids,
        )
        await db.execute(
            "UPDATE relay.lease SET lost = now() WHERE id = ANY($1) AND expires < now()", ids
        )


_MESSAGE = "queue_id, reverse_path, arrived, size_bytes, data"


async def _rows_of(db: Db, messages: Sequence[Any], stamps: dict[str, str]) -> list[MovedMessage]:
    """Messages of their rows, with recipients and reports."""
    ids = [row[0] for row in messages]
    recipients = await db.fetch(
        "SELECT queue_id, idx, domain, state, due, data FROM relay.recipient"
        " WHERE queue_id = ANY($1) ORDER BY queue_id, idx",
        ids,
    )
    reports = await db.fetch(
        "SELECT queue_id, idx, is_done, since, report_after, data FROM relay.owed"
        " WHERE queue_id = ANY($1) ORDER BY queue_id, idx, is_done",
        ids,
    )
    recipients_of, reports_of = _by_message(recipients), _by_message(reports)
    return [
        MovedMessage(
            queue_id,
            stamps[queue_id],
            reverse_path,
            arrived,
            size_bytes,
            data,
            tuple(MovedRecipient(*row) for row in recipients_of.get(queue_id, ())),
            tuple(MovedReport(*row) for row in reports_of.get(queue_id, ())),
        )
        for queue_id, reverse_path, arrived, size_bytes, data in messages
    ]


def _by_message(rows: Sequence[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for queue_id, *row in rows:
        found.setdefault(queue_id, []).append(row)
    return found


async def _unfinished(db: Db, target: Target) -> list[MovedMessage]:
    noted = await db.fetch("SELECT queue_id, stamp, target FROM relay.leaving")
    stamps = {row["queue_id"]: row["stamp"] for row in noted if target.is_meant(row["target"])}
    rows = await db.fetch(
        f"SELECT {_MESSAGE} FROM relay.message WHERE queue_id = ANY($1) ORDER BY queue_id",
        list(stamps),
    )
    return await _rows_of(db, rows, stamps)


async def _take(db: Db, target: Target, after: str, limit: int) -> Taken:
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        rows = await db.fetch(
            f"SELECT {_MESSAGE} FROM relay.message WHERE queue_id > $1"
            " AND queue_id NOT IN (SELECT queue_id FROM relay.leaving)"
            " ORDER BY queue_id LIMIT $2 FOR UPDATE",
            after,
            limit,
        )
        until = rows[-1][0] if len(rows) == limit else None
        busy = await _tried(db, [row[0] for row in rows])
        free = [row for row in rows if row[0] not in busy]
        stamps = {row[0]: new_stamp() for row in free}
        taken, damaged = part_damaged(await _rows_of(db, free, stamps))
        ids = [one.queue_id for one in taken]
        await db.execute(
            "INSERT INTO relay.leaving (queue_id, stamp, target)"
            " SELECT *, $3 FROM unnest($1::text[], $2::text[])",
            ids,
            [one.stamp for one in taken],
            str(target),
        )
        await db.execute(
            f"UPDATE relay.recipient SET place = {LEAVING}, lease = NULL WHERE queue_id = ANY($1)",
            ids,
        )
    return Taken(taken, until, busy=len(busy), damaged=damaged)


async def _tried(db: Db, ids: list[str]) -> set[str]:
    """The messages of which a node is trying a recipient. The rows of all recipients are locked."""
    rows = await db.fetch(
        "SELECT queue_id, place, lease FROM relay.recipient WHERE queue_id = ANY($1)"
        " ORDER BY queue_id, idx FOR UPDATE",
        ids,
    )
    claims = [(row["queue_id"], row["lease"]) for row in rows if row["place"] == CLAIMED]
    # Asked after the locks: a node may have come while they were waited for.
    live = await db.fetch(
        "SELECT id FROM relay.lease WHERE id = ANY($1) AND lost IS NULL",
        [lease for _, lease in claims],
    )
    alive = {row[0] for row in live}
    return {queue_id for queue_id, lease in claims if lease in alive}


async def _put_back_all(db: Db, messages: Sequence[MovedMessage]) -> None:
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        for one in messages:
            await _put_back(db, one)


async def _put_back(db: Db, message: MovedMessage) -> None:
    places = [stands(one) for one in message.recipients]
    await db.execute(
        "UPDATE relay.recipient SET place = new.place, due = new.due"
        " FROM unnest($2::integer[], $3::smallint[], $4::bigint[]) AS new (idx, place, due)"
        " WHERE queue_id = $1 AND recipient.idx = new.idx",
        message.queue_id,
        [one.index for one in message.recipients],
        [int(place) for place, _ in places],
        [due for _, due in places],
    )
    await db.execute("DELETE FROM relay.leaving WHERE queue_id = $1", message.queue_id)


async def _remove(db: Db, messages: Sequence[MovedMessage]) -> None:
    ids = [one.queue_id for one in messages]
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        for table in ("message", "recipient", "content", "owed", "leaving"):
            await db.execute(f"DELETE FROM relay.{table} WHERE queue_id = ANY($1)", ids)


async def _targets(db: Db) -> list[str]:
    rows = await db.fetch("SELECT DISTINCT target FROM relay.leaving ORDER BY target")
    return [row[0] for row in rows]


async def _count(db: Db) -> int:
    count: int = await db.fetchval("SELECT count(*) FROM relay.message")
    return count


async def _add(db: Db, arrivals: Sequence[Arrival]) -> dict[str, Came]:
    """A second try after a cut waits at the stamps for what the first may still commit."""
    came = dict.fromkeys((one.message.queue_id for one in arrivals), Came.BEFORE)
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        at = micros(await _now(db))
        fresh = await db.fetch(
            "INSERT INTO relay.imported (queue_id, stamp, at)"
            " SELECT *, $3::bigint FROM unnest($1::text[], $2::text[])"
            " ON CONFLICT DO NOTHING RETURNING queue_id",
            [one.message.queue_id for one in arrivals],
            [one.message.stamp for one in arrivals],
            at,
        )
        ids = [row[0] for row in fresh]
        there = {
            row["queue_id"]: row
            for row in await db.fetch(
                f"SELECT {_MESSAGE} FROM relay.message WHERE queue_id = ANY($1)"
                " ORDER BY queue_id FOR UPDATE",
                ids,
            )
        }
        new: list[Arrival] = []
        for one in arrivals:
            queue_id = one.message.queue_id
            if queue_id in there:
                came[queue_id] = await _meet(db, one, there[queue_id])
            elif queue_id in ids:
                came[queue_id] = Came.ADDED
                new.append(one)
        await _insert(db, new)
    return came


async def _meet(db: Db, one: Arrival, there: Any) -> Came:
    """A message of this queue id is in the queue."""
    message = one.message
    leaving = await db.fetchval(
        "SELECT stamp FROM relay.leaving WHERE queue_id = $1", message.queue_id
    )
    if leaving == message.stamp:
        await _put_back(db, message)
        return Came.BEFORE
    [known] = await _rows_of(db, [there], {message.queue_id: ""})
    if one.is_same(known, await _digest(db, message.queue_id)):
        return Came.BEFORE
    await db.execute(
        "DELETE FROM relay.imported WHERE queue_id = $1 AND stamp = $2",
        message.queue_id,
        message.stamp,
    )
    return Came.OTHER_THERE


async def _digest(db: Db, queue_id: str) -> str:
    found = sha256()
    content, in_pieces = await db.fetchrow(
        "SELECT content, in_pieces FROM relay.message WHERE queue_id = $1", queue_id
    )
    if not in_pieces:
        found.update(content)
        return found.hexdigest()
    numbers = await db.fetch("SELECT n FROM relay.content WHERE queue_id = $1 ORDER BY n", queue_id)
    for (number,) in numbers:
        found.update(
            await db.fetchval(
                "SELECT data FROM relay.content WHERE queue_id = $1 AND n = $2", queue_id, number
            )
        )
    return found.hexdigest()


async def _insert(db: Db, arrivals: Sequence[Arrival]) -> None:
    for one in arrivals:
        message = one.message
        in_pieces = one.content_bytes > INLINE_BYTES
        row = (
            message.queue_id,
            message.arrived,
            message.size_bytes,
            len(message.recipients),
            in_pieces,
            message.reverse_path,
            message.data,
            None if in_pieces else b"".join(one.content()),
        )
        await db.execute(numbered(NEW_MESSAGES, 1, 8), *columns([row], 8))
        offset = 0
        for piece in one.content() if in_pieces else ():
            await db.execute(
                "INSERT INTO relay.content VALUES ($1, $2, $3)", message.queue_id, offset, piece
            )
            offset += len(piece)
    recipients = [row for one in arrivals for row in one.message.recipient_rows]
    await db.execute(numbered(NEW_RECIPIENTS, 1, 8), *columns(recipients, 7), None)
    reports = [row for one in arrivals for row in one.message.report_rows]
    await db.execute(numbered(NEW_PENDING, 1, 6), *columns(reports, 6))


async def _add_calls_about(db: Db, unseen: UnseenEvents, calls: Sequence[PendingCall]) -> None:
    async with db.transaction():
        await add_calls_about(db, unseen, calls)


async def _free_calls(db: Db, limit: int) -> list[PendingCall]:
    rows = await db.fetch(
        "SELECT url, line, due, attempts, number FROM relay.call WHERE lease IS NULL"
        " OR lease NOT IN (SELECT id FROM relay.lease WHERE lost IS NULL AND expires > now())"
        " ORDER BY number LIMIT $1",
        limit,
    )
    return [
        PendingCall(url, line, moment(due), attempts, number)
        for url, line, due, attempts, number in rows
    ]


async def _remove_calls(db: Db, numbers: list[int]) -> None:
    await db.execute("DELETE FROM relay.call WHERE number = ANY($1)", numbers)


async def _add_call(db: Db, call: PendingCall, stamp: str) -> None:
    async with db.transaction():
        await db.fetchrow(SAFE_COMMIT)
        fresh = await db.fetchval(
            "INSERT INTO relay.imported (queue_id, stamp, at) VALUES ('', $1, $2)"
            " ON CONFLICT DO NOTHING RETURNING stamp",
            stamp,
            micros(await _now(db)),
        )
        if fresh is not None:
            await db.execute(
                "INSERT INTO relay.call (due, attempts, url, line) VALUES ($1, $2, $3, $4)",
                micros(call.due),
                call.attempts,
                call.url,
                call.line,
            )
