"""The statements of a commit: all tables that mail is written to, and the numbers of events.

Rows of many requests go in one statement a table, as arrays (`unnest`). `write_plain` is all of
them in one statement, for a batch of the kind that most are; see `commit`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from itertools import chain
from typing import Any, TypeVar

from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.queue.batch import Row, Rows
from relay.queue.due import Place
from relay.queue.entry import State
from relay.queue.postgres.commit import SAFE_COMMIT
from relay.queue.postgres.connection import Db
from relay.queue.postgres.events import note_written
from relay.queue.postgres.lease import Lease
from relay.queue.request import Refused, Request
from relay.queue.rows import FINAL_NUMBER, micros
from relay.queue.statistics import (
    CountKey,
    ExceptionRow,
    HourBounds,
    count_events,
    hours_counted,
)
from relay.queue.store import ClaimLost, StoredEvent
from relay.queue.tls_sessions import DayBounds, ReportResult, day_number, day_of, policy_data

__all__ = ["AWAITED", "Tables", "remove_if_done"]

log = logging.getLogger(__name__)

T = TypeVar("T")

WAITING, READY, CLAIMED, ASIDE = map(int, Place)

_HOURS_REMEMBERED = 3
_DAYS_REMEMBERED = 2
_HOUR_MICROS = 3_600_000_000

AWAITED = (
    "SELECT 1 FROM relay.recipient WHERE recipient.queue_id = owed.queue_id"
    f" AND place <> {ASIDE} AND due <= owed.report_after"
)
"""An attempt that a pending report (a row of `owed`) waits for."""

_TAKEN_LATE = frozenset({State.DELIVERED, State.BOUNCED})
"""States that are written though the claim is lost: they save a duplicate."""

_NEW_MESSAGES = """INSERT INTO relay.message
    (queue_id, arrived, size_bytes, recipients, in_pieces, reverse_path, data, content)
    SELECT * FROM unnest({0}::text[], {1}::bigint[], {2}::bigint[], {3}::integer[],
        {4}::boolean[], {5}::text[], {6}::text[], {7}::bytea[])"""
_NEW_RECIPIENTS = f"""INSERT INTO relay.recipient
    (queue_id, idx, domain, state, place, due, data, lease)
    SELECT *, CASE WHEN place = {CLAIMED} THEN {{7}}::bigint END
    FROM unnest({{0}}::text[], {{1}}::integer[], {{2}}::text[], {{3}}::smallint[],
        {{4}}::smallint[], {{5}}::bigint[], {{6}}::text[])
        AS new (queue_id, idx, domain, state, place, due, data)"""
_NEW_EVENTS = """INSERT INTO relay.event
    (node, seq, at, name, queue_id, sender, recipient, id, line)
    SELECT {8}::integer, * FROM unnest({0}::bigint[], {1}::bigint[], {2}::text[], {3}::text[],
        {4}::text[], {5}::text[], {6}::text[], {7}::text[])"""
_COUNTED = """INSERT INTO relay.counted (recipient_domain, sender_domain, hour, result,
        protection, policy, reason, number)
    SELECT * FROM unnest({0}::text[], {1}::text[], {2}::integer[], {3}::text[], {4}::text[],
        {5}::text[], {6}::text[], {7}::bigint[])"""
_EXCEPTIONS = """INSERT INTO relay.exception (recipient_domain, sender_domain, at, event_id,
        queue_id, result, protection, sentence)
    SELECT * FROM unnest({0}::text[], {1}::text[], {2}::bigint[], {3}::text[], {4}::text[],
        {5}::text[], {6}::text[], {7}::text[])"""
_ONCE = " ON CONFLICT DO NOTHING"
"""An event that is told twice has one id."""
_FINISHED_RECIPIENTS = f"""DELETE FROM relay.recipient USING
    unnest({{0}}::text[], {{1}}::bigint[]) AS done (queue_id, lease)
    WHERE recipient.queue_id = done.queue_id AND recipient.place = {CLAIMED}
    AND recipient.lease = done.lease"""
_FINISHED_MESSAGES = """DELETE FROM relay.message USING unnest({0}::text[]) AS done (queue_id)
    WHERE message.queue_id = done.queue_id"""
_FINISHED_CONTENT = """DELETE FROM relay.content USING unnest({0}::text[]) AS done (queue_id)
    WHERE content.queue_id = done.queue_id"""

_PENDING = """INSERT INTO relay.owed (queue_id, idx, is_done, since, report_after, data)
    SELECT * FROM unnest($1::text[], $2::integer[], $3::boolean[], $4::bigint[], $5::bigint[],
        $6::text[])"""
_UPDATE = f"""UPDATE relay.recipient SET state = new.state, place = new.place, due = new.due,
        data = new.data, lease = NULL
    FROM unnest($1::text[], $2::integer[], $3::smallint[], $4::smallint[], $5::bigint[],
        $6::text[], $7::bigint[]) AS new (queue_id, idx, state, place, due, data, token)
    WHERE recipient.queue_id = new.queue_id AND recipient.idx = new.idx
    AND recipient.place = {CLAIMED} AND recipient.lease = new.token"""
_REPORTED = """DELETE FROM relay.owed USING unnest($1::text[], $2::integer[], $3::boolean[])
        AS sent (queue_id, idx, is_done)
    WHERE owed.queue_id = sent.queue_id AND owed.idx = sent.idx AND owed.is_done = sent.is_done"""
_NOT_WHOLE = """SELECT queue_id FROM unnest($1::text[], $2::bigint[]) AS new (queue_id, size)
    WHERE size <> (SELECT coalesce(sum(length(content.data)), 0) FROM relay.content
        WHERE content.queue_id = new.queue_id)"""


def _numbered(statement: str, begin: int, count: int) -> str:
    """A statement with the numbers of its parameters."""
    return statement.format(*(f"${number}" for number in range(begin, begin + count)))


def _plain() -> str:
    """All that a plain batch writes, as one statement; its parameters are those of `write_plain`.

    A division by zero undoes it where what was finished is not claimed.
    """
    written = "AND EXISTS (SELECT FROM mark)"
    deletions = (
        ("gone_recipients", _numbered(_FINISHED_RECIPIENTS, 3, 2)),
        ("gone_messages", _numbered(_FINISHED_MESSAGES, 3, 1)),
        ("gone_content", _numbered(_FINISHED_CONTENT, 3, 1)),
    )
    insertions = (
        ("messages", _numbered(_NEW_MESSAGES, 7, 8)),
        ("recipients", _NEW_RECIPIENTS.format(*(f"${n}" for n in range(15, 22)), "$1")),
        ("events", _NEW_EVENTS.format(*(f"${n}" for n in range(22, 30)), "$30")),
        ("counts", _numbered(_COUNTED, 31, 8)),
        ("exceptions", _numbered(_EXCEPTIONS, 39, 8)),
    )
    parts = [
        f"""mark AS (INSERT INTO relay.batch (lease, n, void)
            SELECT holder.id, $2::bigint, false FROM
            (SELECT id FROM relay.lease WHERE id = $1::bigint AND lost IS NULL FOR KEY SHARE)
            AS holder, ({SAFE_COMMIT}) AS safe RETURNING lease)"""
    ]
    parts += [f"{name} AS ({text} {written} RETURNING 1)" for name, text in deletions]
    parts += [
        f"{name} AS ({text} WHERE EXISTS (SELECT FROM mark){_ONCE if name == 'exceptions' else ''})"
        for name, text in insertions
    ]
    return f"""WITH {", ".join(parts)}
        SELECT (SELECT count(*) FROM mark) AS marks,
        1 / (CASE WHEN NOT EXISTS (SELECT FROM mark)
            OR ((SELECT count(*) FROM gone_recipients) = $5
                AND (SELECT count(*) FROM gone_messages) = $6) THEN 1 ELSE 0 END)"""


_PLAIN = _plain()


@dataclass(slots=True)
class _Point:
    """What has to be as before when a transaction is undone."""

    last_seq: int


@dataclass(slots=True)
class _Counts:
    """What events add to the statistics."""

    numbers: Counter[CountKey] = field(default_factory=Counter)
    exceptions: list[ExceptionRow] = field(default_factory=list)


class Tables:
    """What `relay.queue.postgres.commit` writes with, under a lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._last_seq = 0
        self._hours: dict[int, HourBounds] = {}
        self._days: dict[int, DayBounds] = {}
        self._mark = self._mark_written = 0

    # The mark of the log. It is a row of this node's: if every commit changed it, every commit
    # would leave a dead row behind, and none would be a single statement.

    @property
    def mark(self) -> int:
        """What `note_mark` was last given."""
        return self._mark

    def note_mark(self, seq: int) -> None:
        """The log file has this node's events up to here."""
        self._mark = max(self._mark, seq)

    def mark_request(self) -> Request | None:
        """Writes the mark, if it has changed."""
        mark = self._mark
        if mark == self._mark_written:
            return None

        def written(_: object) -> None:
            self._mark_written = mark

        request = Request(
            function=lambda db: note_written(db, self._lease.node, mark), on_commit=written
        )
        request.future.add_done_callback(lambda future: future.exception())
        return request

    @property
    def last_seq(self) -> int:
        """The number of this node's last event."""
        return self._last_seq

    def lease(self) -> int:
        """The lease that is written under."""
        return self._lease.id

    async def load(self, db: Db) -> None:
        """Read where the numbers of this node's events go on. Its last lease commits nothing
        more.
        """
        found = await db.fetchval(
            "SELECT coalesce(max(seq), 0) FROM relay.event WHERE node = $1", self._lease.node
        )
        mark = await db.fetchval("SELECT log_mark FROM relay.node WHERE id = $1", self._lease.node)
        self._mark = self._mark_written = mark
        self._last_seq = max(found, mark)

    # One transaction.

    def point(self) -> _Point:
        return _Point(self._last_seq)

    def back_to(self, point: _Point) -> None:
        """What was numbered since is undone."""
        self._last_seq = point.last_seq
        self._days.clear()

    def go_on_from(self, batch: Iterable[Request]) -> None:
        """These are committed, as was not known before: their events have the last numbers."""
        numbers = [stored.seq for request in batch for stored in request.stored]
        self._last_seq = max(self._last_seq, *numbers) if numbers else self._last_seq

    def is_plain(self, batch: Sequence[Request]) -> bool:
        """Whether a batch is only new mail with small content, and messages that leave whole."""
        if not all(request.rows is not None and _is_plain(request.rows) for request in batch):
            return False
        rows = [request.rows for request in batch if request.rows is not None]
        # In one statement a message could come in the place of one that leaves.
        leaving = {queue_id for one in rows for queue_id, _ in one.finished}
        return not leaving.intersection(row[0] for one in rows for row in one.messages)

    async def write_plain(self, db: Db, batch: Sequence[Request], n: int) -> bool:
        """Write a plain batch as one statement, which is a transaction; whether the lease lives."""
        rows = [request.rows for request in batch if request.rows is not None]
        events = [row for request in batch for row in self._numbered_rows(request)]
        counts = await self._count(db, [event for one in rows for event in one.events])
        finished = [(*each, one.token) for one in rows for each in one.finished]
        row = await db.fetchrow(
            _PLAIN,
            self._lease.id,
            n,
            [queue_id for queue_id, _, _ in finished],
            [token for _, _, token in finished],
            sum(count for _, count, _ in finished),
            len(finished),
            *_columns(_all(one.messages for one in rows), 8),
            *_columns(_all(one.recipients for one in rows), 7),
            *_columns(events, 8),
            self._lease.node,
            *_columns([(*key, number) for key, number in counts.numbers.items()], 8),
            *_columns(counts.exceptions, 8),
        )
        return row is not None and row[0] == 1

    async def write(self, db: Db, batch: Sequence[Request]) -> None:
        """All rows of some requests, table by table."""
        requests = [request for request in batch if request.rows is not None]
        rows = [request.rows for request in requests if request.rows is not None]
        if not rows:
            return
        await self._insert_messages(db, rows)
        await self._finish(db, rows)
        perhaps_done = _all(one.perhaps_done for one in rows)
        await _lock(db, [*perhaps_done, *(row[0] for one in rows for row in one.pending)])
        await self._update(db, rows)
        if pending := _all(one.pending for one in rows):
            await db.execute(_PENDING, *_columns(pending, 6))
        await _strike_out(db, _all(one.reported for one in rows))
        await remove_if_done(db, perhaps_done)
        await self._insert_events(db, requests)
        await self._add_sessions(db, [one.sessions for one in rows if one.sessions])
        await self._finish_tls_reports(db, _all(one.tls_reports for one in rows))
        await _tell_whose_report_is_due(db, requests)

    async def write_alone(self, db: Db, request: Request) -> None:
        """The rows of one request, in a savepoint. A result whose claim is lost is taken where it
        saves a duplicate, or is refused with `ClaimLost`.
        """
        rows = request.rows
        assert rows is not None
        is_of_another_lease = rows.token not in (0, self._lease.id)
        if is_of_another_lease and not await _are_claimed(db, rows):
            rows = request.rows = await _taken_late(db, rows)
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
             AND place = {CLAIMED} AND lease <> $2) RETURNING queue_id""",
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
        numbered = self._numbers(request, events)
        await self._write_events(db, numbered, list(events))

    async def _insert_messages(self, db: Db, rows: Sequence[Rows]) -> None:
        messages = _all(one.messages for one in rows)
        if not messages:
            return
        await db.execute(_numbered(_NEW_MESSAGES, 1, 8), *_columns(messages, 8))
        recipients = _columns(_all(one.recipients for one in rows), 7)
        await db.execute(_numbered(_NEW_RECIPIENTS, 1, 8), *recipients, self._lease.id)
        large = [(row[0], row[2]) for row in messages if row[4]]
        if large:
            if broken := await db.fetchval(_NOT_WHOLE, *_columns(large, 2)):
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
        gone = await db.execute(_numbered(_FINISHED_RECIPIENTS, 1, 2), ids, tokens)
        if _count(gone) != sum(count for _, count, _ in finished):
            raise Refused("the recipients are not claimed")
        if _count(await db.execute(_numbered(_FINISHED_MESSAGES, 1, 1), ids)) != len(ids):
            raise Refused("there is no such message")
        await db.execute(_numbered(_FINISHED_CONTENT, 1, 1), ids)

    async def _update(self, db: Db, rows: Sequence[Rows]) -> None:
        """Write what an attempt left of recipients that were claimed for it."""
        updates = [(*row, one.token) for one in rows for row in one.updates]
        if updates and _count(await db.execute(_UPDATE, *_columns(updates, 7))) != len(updates):
            raise Refused("the recipients are not claimed")

    # Events and what they count.

    def _numbered_rows(self, request: Request) -> list[Row]:
        assert request.rows is not None
        return self._numbers(request, request.rows.events)

    def _numbers(self, request: Request, events: Iterable[Event]) -> list[Row]:
        """The rows of a request's events, each with the next number."""
        rows = []
        for event in events:
            self._last_seq = seq = self._last_seq + 1
            request.stored.append(StoredEvent(seq, event))
            rows.append(
                (
                    seq,
                    micros(event.at),
                    event.name,
                    event.queue_id,
                    event.sender,
                    event.recipient,
                    event.id,
                    event.line,
                )
            )
        return rows

    async def _insert_events(self, db: Db, requests: Sequence[Request]) -> None:
        rows = [row for request in requests for row in self._numbered_rows(request)]
        events = [event for one in requests if one.rows is not None for event in one.rows.events]
        await self._write_events(db, rows, events)

    async def _write_events(self, db: Db, rows: Sequence[Row], events: Sequence[Event]) -> None:
        if not rows:
            return
        await db.execute(_numbered(_NEW_EVENTS, 1, 9), *_columns(rows, 8), self._lease.node)
        counts = await self._count(db, events)
        numbers = [(*key, number) for key, number in counts.numbers.items()]
        if numbers:
            await db.execute(_numbered(_COUNTED, 1, 8), *_columns(numbers, 8))
        if counts.exceptions:
            await db.execute(_numbered(_EXCEPTIONS, 1, 8) + _ONCE, *_columns(counts.exceptions, 8))

    async def _count(self, db: Db, events: Sequence[Event]) -> _Counts:
        wanted = hours_counted(events)
        for hour in wanted - self._hours.keys():
            self._hours[hour] = await _read_bounds(db, hour)
        counts = _Counts(*count_events(events, self._hours))
        while len(self._hours) > _HOURS_REMEMBERED:
            del self._hours[min(self._hours)]
        return counts

    # What reports on TLS count.

    async def _add_sessions(
        self, db: Db, counted: Sequence[tuple[datetime, Sequence[TlsSession]]]
    ) -> None:
        numbers: Counter[tuple[int, str, str, str]] = Counter()
        policies: list[Row] = []
        for at, some in counted:
            day = day_number(day_of(at))
            bounds = await self._day_bounds(db, day)
            for session in some:
                admitted = bounds.admit(session)
                if admitted is None:
                    continue
                policy, id, failure, is_new = admitted
                numbers[day, session.domain, id, failure] += 1
                if is_new:
                    policies.append((day, session.domain, id, policy_data(policy)))
        if policies:
            await db.execute(
                "INSERT INTO relay.tls_policy SELECT * FROM"
                " unnest($1::integer[], $2::text[], $3::text[], $4::text[]) ON CONFLICT DO NOTHING",
                *_columns(policies, 4),
            )
        if numbers:
            rows = [(*key, self._lease.node, number) for key, number in sorted(numbers.items())]
            await db.execute(
                "INSERT INTO relay.tls_session SELECT * FROM unnest($1::integer[], $2::text[],"
                " $3::text[], $4::text[], $5::integer[], $6::bigint[])"
                " ON CONFLICT (day, domain, policy, failure, node)"
                " DO UPDATE SET number = tls_session.number + excluded.number",
                *_columns(rows, 6),
            )

    async def _day_bounds(self, db: Db, day: int) -> DayBounds:
        found = self._days.get(day)
        if found is None:
            found = self._days[day] = DayBounds()
            for row in await db.fetch(
                "SELECT DISTINCT domain, policy, failure FROM relay.tls_session WHERE day = $1", day
            ):
                found.note(*row)
            if len(self._days) > _DAYS_REMEMBERED:
                del self._days[min(self._days)]
        return found

    async def _finish_tls_reports(
        self, db: Db, finished: Sequence[tuple[date, str, str, ReportResult]]
    ) -> None:
        """Write down what became of claimed reports. What is not claimed is refused."""
        for day, domain, place, result in finished:
            changed = await db.execute(
                "UPDATE relay.tls_report SET result = $4"
                " WHERE day = $1 AND domain = $2 AND place = $3 AND result = '' AND lease = $5",
                day_number(day),
                domain,
                place,
                result.value,
                self._lease.id,
            )
            if not _count(changed):
                raise Refused(f"the report on TLS for {domain} of {day} to {place} is not claimed")


def _is_plain(rows: Rows) -> bool:
    return not (
        rows.updates
        or rows.pending
        or rows.reported
        or rows.perhaps_done
        or rows.sessions
        or rows.tls_reports
        or any(row[4] for row in rows.messages)
    )


def _all(parts: Iterable[list[T]]) -> list[T]:
    return list(chain.from_iterable(parts))


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as one list a column."""
    if not rows:
        return [[] for _ in range(width)]
    return [list(column) for column in zip(*rows, strict=True)]


def _count(status: str) -> int:
    """How many rows a statement changed."""
    return int(status.rpartition(" ")[2])


async def _read_bounds(db: Db, hour: int) -> HourBounds:
    """What the hour has already: it may have begun before this process did."""
    pairs = await db.fetch(
        "SELECT DISTINCT recipient_domain, sender_domain FROM"
        " (SELECT recipient_domain, sender_domain, hour FROM relay.statistic"
        " UNION ALL SELECT recipient_domain, sender_domain, hour FROM relay.counted) AS every"
        " WHERE hour = $1 AND recipient_domain <> ''",
        hour,
    )
    counted = await db.fetch(
        "SELECT recipient_domain, sender_domain, count(*) FROM relay.exception"
        " WHERE at >= $1 AND at < $2 GROUP BY 1, 2",
        hour * _HOUR_MICROS,
        (hour + 1) * _HOUR_MICROS,
    )
    exceptions = Counter({(recipient, sender): number for recipient, sender, number in counted})
    return HourBounds({(pair[0], pair[1]) for pair in pairs}, exceptions, exceptions.total())


async def _lock(db: Db, ids: Iterable[str]) -> None:
    """Have results of one message come one after the other: the last sees that no other is left."""
    if wanted := sorted(set(ids)):
        await db.execute(
            "SELECT 1 FROM relay.message WHERE queue_id = ANY($1) ORDER BY queue_id FOR UPDATE",
            wanted,
        )


async def _strike_out(db: Db, reported: Sequence[tuple[str, int, bool]]) -> None:
    """Remove what is reported now from what is pending; nothing is reported twice."""
    if reported and _count(await db.execute(_REPORTED, *_columns(reported, 3))) != len(reported):
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
    """Whether a request's pending report is due: decided in the commit, so that one attempt gets
    True. Of the attempts for one message that are written together it is the last.
    """
    settled = [(one, one.rows.settled) for one in requests if one.rows and one.rows.settled]
    if not settled:
        return
    rows = await db.fetch(
        "SELECT DISTINCT queue_id FROM relay.owed WHERE queue_id = ANY($1)"
        f" AND NOT EXISTS ({AWAITED})",
        [queue_id for _, queue_id in settled],
    )
    due = {queue_id for (queue_id,) in rows}
    for request, queue_id in reversed(settled):
        request.result = queue_id in due
        due.discard(queue_id)


# Results that come late.


async def _are_claimed(db: Db, rows: Rows) -> bool:
    """Whether what a result is about is still claimed for it; its rows are locked then."""
    if rows.finished:
        [(queue_id, count)] = rows.finished
        found = await db.fetch(
            "SELECT place, lease FROM relay.recipient WHERE queue_id = $1 FOR UPDATE", queue_id
        )
        held = sum(row["place"] == CLAIMED and row["lease"] == rows.token for row in found)
        return bool(held == count)
    if not rows.updates:
        return True
    found = await db.fetch(
        "SELECT idx, place, lease FROM relay.recipient WHERE queue_id = $1 AND idx = ANY($2)"
        " FOR UPDATE",
        rows.updates[0][0],
        [row[1] for row in rows.updates],
    )
    held = sum(row["place"] == CLAIMED and row["lease"] == rows.token for row in found)
    return bool(held == len(rows.updates))


async def _taken_late(db: Db, rows: Rows) -> Rows:
    """The rows of a result whose claim is lost: those that are final by a host's word, if nobody
    holds the recipient now and it is not final. Raises `ClaimLost` if not all of them are such.
    """
    queue_id = rows.settled or rows.finished[0][0]
    found = await db.fetch(
        "SELECT idx, state, place FROM relay.recipient WHERE queue_id = $1 FOR UPDATE", queue_id
    )
    free: Mapping[int, bool] = {
        row["idx"]: row["place"] != CLAIMED and row["state"] < FINAL_NUMBER for row in found
    }
    settlement = rows.settlement
    after = [change.recipient for change in settlement.changes] if settlement else []
    if not after or not all(
        free.get(one.index, False) and one.state in _TAKEN_LATE for one in after
    ):
        raise ClaimLost("the claim is lost: another node has, or had, the message")
    # They become claimed for this result, which is then written as any other.
    await db.execute(
        f"UPDATE relay.recipient SET place = {CLAIMED}, lease = $3"
        " WHERE queue_id = $1 AND idx = ANY($2)",
        queue_id,
        [one.index for one in after],
        rows.token,
    )
    log.warning("%s: a result is recorded though its claim was lost", queue_id)
    return rows
