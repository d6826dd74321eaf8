"""The statements of a commit: all tables that mail is written to, and the numbers of events.

Rows of many requests go in one statement a table (`inserts`). `plain` writes them all in one
statement, for a batch of the kind that most are; see `transaction`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from relay.mail.event import Event
from relay.queue.batch import Row, Rows, joined
from relay.queue.numbering import EventNumbers
from relay.queue.postgres import plain
from relay.queue.postgres.connection import Db, changed_rows
from relay.queue.postgres.events import note_written
from relay.queue.postgres.inserts import (
    FINISHED_CONTENT,
    FINISHED_MESSAGES,
    FINISHED_RECIPIENTS,
    NEW_EVENTS,
    NEW_MESSAGES,
    NEW_PENDING,
    NEW_RECIPIENTS,
    columns,
    numbered,
)
from relay.queue.postgres.late_results import are_claimed, taken_late
from relay.queue.postgres.lease import Lease
from relay.queue.postgres.partitions import EventDays
from relay.queue.postgres.schema import ASIDE, CLAIMED, LEAVING
from relay.queue.postgres.statistics import MailCounter
from relay.queue.postgres.tls_sessions import SessionCounter, finish_reports
from relay.queue.request import Refused, Request, answer_settled, settled_messages
from relay.queue.rows import FINAL_NUMBER

AWAITED = (
    "SELECT 1 FROM relay.recipient WHERE recipient.queue_id = owed.queue_id"
    f" AND place <> {ASIDE} AND due <= owed.report_after"
)
"""An attempt that a pending report (a row of `owed`) waits for."""

_UPDATE = f"""UPDATE relay.recipient SET state = new.state, place = new.place, due = new.due,
        data = new.data, lease = NULL
    FROM unnest($1::text[], $2::integer[], $3::smallint[], $4::smallint[], $5::bigint[],
        $6::text[], $7::bigint[]) AS new (queue_id, idx, state, place, due, data, token)
    WHERE recipient.queue_id = new.queue_id AND recipient.idx = new.idx
    AND recipient.place = {CLAIMED} AND recipient.lease = new.token"""
_REPORTED = """DELETE FROM relay.owed USING unnest($1::text[], $2::integer[], $3::boolean[])
        AS sent (queue_id, idx, is_done)
    WHERE owed.queue_id = sent.queue_id AND owed.idx = sent.idx AND owed.is_done = sent.is_done
    AND owed.queue_id NOT IN (SELECT queue_id FROM relay.leaving)"""
_NOT_WHOLE = """SELECT queue_id FROM unnest($1::text[], $2::bigint[]) AS new (queue_id, size)
    WHERE size <> (SELECT coalesce(sum(length(content.data)), 0) FROM relay.content
        WHERE content.queue_id = new.queue_id)"""


class Tables:
    """What `relay.queue.postgres.transaction` writes with, under a lease."""

    def __init__(self, lease: Lease, numbers: EventNumbers) -> None:
        self._lease = lease
        self._numbers = numbers
        self._mail = MailCounter()
        self._sessions = SessionCounter(lease)
        self.event_days = EventDays()

    def mark_request(self) -> Request | None:
        """Writes how far the log file is, if that has changed.

        It is in a row of this node's: if every commit changed that, every commit would leave a dead
        row behind, and none would be a single statement.
        """
        mark, numbers = self._numbers.mark_to_write, self._numbers
        if mark is None:
            return None
        request = Request(
            function=lambda db: note_written(db, self._lease.node, mark),
            on_commit=lambda _: numbers.mark_is_written(mark),
        )
        request.future.add_done_callback(lambda future: future.exception())
        return request

    def lease(self) -> int:
        """The lease that is written under."""
        return self._lease.id

    async def load(self, db: Db, now: datetime) -> None:
        """Read where the numbers of this node's events go on. Its last lease commits nothing
        more.
        """
        await self.event_days.make_ahead(db, now)
        found = await db.fetchval(
            "SELECT coalesce(max(seq), 0) FROM relay.event WHERE node = $1", self._lease.node
        )
        mark = await db.fetchval("SELECT log_mark FROM relay.node WHERE id = $1", self._lease.node)
        self._numbers.load(found, mark)

    # One transaction.

    def point(self) -> int:
        """The last number that an event was given."""
        return self._numbers.last

    def back_to(self, point: int) -> None:
        """What was numbered since is undone."""
        self._numbers.last = point
        self._sessions.forget()
        self.event_days.forget()

    def go_on_from(self, batch: Iterable[Request]) -> None:
        """These are committed, as was not known before: their events have the last numbers."""
        for request in batch:
            for stored in request.stored:
                self._numbers.last = max(self._numbers.last, stored.seq)

    def is_plain(self, batch: Sequence[Request]) -> bool:
        """Whether a batch is only new mail with small content, and messages that leave whole."""
        rows = _rows_of(batch)
        return len(rows) == len(batch) and plain.is_plain(rows)

    async def write_plain(self, db: Db, batch: Sequence[Request], n: int) -> bool:
        """Write a plain batch as one statement, which is a transaction; whether the lease lives."""
        rows = _rows_of(batch)
        numbered_events = self._rows_of_events(batch)
        events = [event for one in rows for event in one.events]
        await self.event_days.make_for(db, events, within=False)
        counts = await self._mail.count(db, events)
        return await plain.write(db, self._lease, n, rows, numbered_events, counts)

    async def write(self, db: Db, batch: Sequence[Request]) -> None:
        """All rows of some requests, table by table."""
        rows = _rows_of(batch)
        if not rows:
            return
        await self._insert_messages(db, rows)
        await self._finish(db, rows)
        perhaps_done = joined(one.perhaps_done for one in rows)
        await _lock(db, [*perhaps_done, *(row[0] for one in rows for row in one.pending)])
        await self._update(db, rows)
        if pending := joined(one.pending for one in rows):
            await db.execute(numbered(NEW_PENDING, 1, 6), *columns(pending, 6))
        await _strike_out(db, joined(one.reported for one in rows))
        await remove_if_done(db, perhaps_done)
        events = [event for one in rows for event in one.events]
        await self._insert_events(db, self._rows_of_events(batch), events)
        await self._sessions.add(db, [one.sessions for one in rows if one.sessions])
        await finish_reports(db, self._lease.id, joined(one.tls_reports for one in rows))
        await _tell_whose_report_is_due(db, batch)

    async def write_alone(self, db: Db, request: Request) -> None:
        """The rows of one request, in a savepoint. A result whose claim is lost is taken where it
        saves a duplicate, or is refused with `ClaimLost`.
        """
        rows = request.rows
        assert rows is not None
        is_of_another_lease = rows.token not in (0, self._lease.id)
        if is_of_another_lease and not await are_claimed(db, rows):
            rows = request.rows = await taken_late(db, rows)
        await self.write(db, [request])

    async def remove_untold(self, db: Db, batch: Sequence[Request]) -> None:
        """Messages that were committed though their clients heard 451, as far as nobody else has
        begun on them.
        """
        ids = [row[0] for one in batch if one.rows is not None for row in one.rows.messages]
        if not ids:
            return
        gone = await db.fetch(
            f"""DELETE FROM relay.message WHERE queue_id = ANY($1) AND NOT EXISTS
            (SELECT 1 FROM relay.recipient WHERE recipient.queue_id = message.queue_id
             AND (place = {CLAIMED} AND lease <> $2 OR place = {LEAVING})) RETURNING queue_id""",
            ids,
            self._lease.id,
        )
        ids = [queue_id for (queue_id,) in gone]
        await _remove_rest(db, ids)
        await db.execute(
            "DELETE FROM relay.event WHERE node = $1 AND queue_id = ANY($2)", self._lease.node, ids
        )

    async def write_events(self, db: Db, request: Request, events: Iterable[Event]) -> None:
        """Add events within a request's function."""
        events = list(events)
        await self._insert_events(db, self._numbers.rows_of(request, events), events)

    async def _insert_messages(self, db: Db, rows: Sequence[Rows]) -> None:
        messages = joined(one.messages for one in rows)
        if not messages:
            return
        await db.execute(numbered(NEW_MESSAGES, 1, 8), *columns(messages, 8))
        recipients = columns(joined(one.recipients for one in rows), 7)
        await db.execute(numbered(NEW_RECIPIENTS, 1, 8), *recipients, self._lease.id)
        large = [(row[0], row[2]) for row in messages if row[4]]
        if large:
            if broken := await db.fetchval(_NOT_WHOLE, *columns(large, 2)):
                raise Refused(f"{broken}: its content is not whole")
            await db.execute(
                "DELETE FROM relay.staged WHERE queue_id = ANY($1)", [one[0] for one in large]
            )

    async def _finish(self, db: Db, rows: Sequence[Rows]) -> None:
        """Remove messages whose recipients are all claimed and all final now."""
        finished = [(*each, one.token) for one in rows for each in one.finished]
        if not finished:
            return
        ids = [queue_id for queue_id, _, _ in finished]
        tokens = [token for _, _, token in finished]
        gone = await db.execute(numbered(FINISHED_RECIPIENTS, 1, 2), ids, tokens)
        if changed_rows(gone) != sum(count for _, count, _ in finished):
            raise Refused("the recipients are not claimed")
        if changed_rows(await db.execute(numbered(FINISHED_MESSAGES, 1, 1), ids)) != len(ids):
            raise Refused("there is no such message")
        await db.execute(numbered(FINISHED_CONTENT, 1, 1), ids)

    async def _update(self, db: Db, rows: Sequence[Rows]) -> None:
        """Write what an attempt left of recipients that were claimed for it."""
        updates = [(*row, one.token) for one in rows for row in one.updates]
        if not updates:
            return
        if changed_rows(await db.execute(_UPDATE, *columns(updates, 7))) != len(updates):
            raise Refused("the recipients are not claimed")

    def _rows_of_events(self, batch: Sequence[Request]) -> list[Row]:
        """The rows of the events of a batch, each with the next number."""
        return [
            row
            for request in batch
            if request.rows is not None
            for row in self._numbers.rows_of(request, request.rows.events)
        ]

    async def _insert_events(self, db: Db, rows: Sequence[Row], events: Sequence[Event]) -> None:
        if rows:
            await self.event_days.make_for(db, events, within=True)
            await db.execute(numbered(NEW_EVENTS, 1, 9), *columns(rows, 8), self._lease.node)
            await self._mail.add(db, events)


def _rows_of(batch: Sequence[Request]) -> list[Rows]:
    return [request.rows for request in batch if request.rows is not None]


async def _lock(db: Db, ids: Iterable[str]) -> None:
    """Have results of one message come one after the other: the last sees that no other is left."""
    if wanted := sorted(set(ids)):
        await db.execute(
            "SELECT 1 FROM relay.message WHERE queue_id = ANY($1) ORDER BY queue_id FOR UPDATE",
            wanted,
        )


async def _strike_out(db: Db, reported: Sequence[tuple[str, int, bool]]) -> None:
    """Remove what is reported now from what is pending; nothing is reported twice."""
    if not reported:
        return
    if changed_rows(await db.execute(_REPORTED, *columns(reported, 3))) != len(reported):
        raise Refused(f"{reported[0][0]}: this was reported before")


async def remove_if_done(db: Db, ids: Sequence[str]) -> None:
    """Remove messages that have no open recipient left and about which no report is pending."""
    if not ids:
        return
    gone = await db.fetch(
        f"""DELETE FROM relay.message WHERE queue_id = ANY($1)
        AND NOT EXISTS (SELECT 1 FROM relay.recipient
            WHERE recipient.queue_id = message.queue_id AND state < {FINAL_NUMBER})
        AND NOT EXISTS (SELECT 1 FROM relay.owed WHERE owed.queue_id = message.queue_id)
        RETURNING queue_id""",
        list(ids),
    )
    await _remove_rest(db, [queue_id for (queue_id,) in gone])


async def _remove_rest(db: Db, gone: Sequence[str]) -> None:
    """What belongs to messages that were removed."""
    if gone:
        await db.execute("DELETE FROM relay.recipient WHERE queue_id = ANY($1)", gone)
        await db.execute("DELETE FROM relay.content WHERE queue_id = ANY($1)", gone)


async def _tell_whose_report_is_due(db: Db, requests: Sequence[Request]) -> None:
    """Answer the requests that settled a message of which a report is pending."""
    settled = settled_messages(requests)
    if settled:
        rows = await db.fetch(
            "SELECT DISTINCT queue_id FROM relay.owed WHERE queue_id = ANY($1)"
            f" AND NOT EXISTS ({AWAITED})",
            [queue_id for _, queue_id in settled],
        )
        answer_settled(settled, {queue_id for (queue_id,) in rows})
