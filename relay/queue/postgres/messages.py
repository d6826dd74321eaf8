"""Questions about messages and recipients: functions of a connection, each answered in one short
read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime

from relay.mail.event import Event
from relay.queue.answers import (
    events_of_rows,
    ids_of_page,
    listed_messages,
    report_of_rows,
    state_counts,
)
from relay.queue.change_steps import FoundStep, WantedStep
from relay.queue.conditions import all_of, message_conditions, recipient_conditions
from relay.queue.entry import State
from relay.queue.postgres.connection import Db
from relay.queue.postgres.matching import PostgresValues
from relay.queue.postgres.schema import READY, WAITING
from relay.queue.postgres.statements import AWAITED
from relay.queue.rows import FINAL_NUMBER, micros, moment
from relay.queue.shown import shown_message, shown_recipient
from relay.queue.store import (
    EventOfChange,
    ListedMessage,
    PendingReport,
    QueuedItem,
    QueueFilter,
    SpoolError,
)

_WINDOW = 5000
_DUE_WINDOW = 1000
_EVENTS_AT_ONCE = 200
_READY_PAGE = 20

_MESSAGE = "queue_id, reverse_path, arrived, size_bytes, data"


async def content_of(db: Db, queue_id: str) -> tuple[bytes, bool, int]:
    """The content, where it lies with its message; whether it lies in pieces; its size."""
    row = await db.fetchrow(
        "SELECT content, in_pieces, size_bytes FROM relay.message WHERE queue_id = $1", queue_id
    )
    if row is None:
        raise SpoolError(f"{queue_id}: there is no such message")
    return row[0] or b"", row[1], row[2]


async def piece_of(db: Db, queue_id: str, offset: int) -> bytes:
    """The piece of content that begins at an octet."""
    piece: bytes | None = await db.fetchval(
        "SELECT data FROM relay.content WHERE queue_id = $1 AND n = $2", queue_id, offset
    )
    if not piece:
        raise SpoolError(f"{queue_id}: its content is not whole")
    return piece


async def find_ids(
    db: Db, wanted: QueueFilter, now: datetime, after: str, limit: int
) -> tuple[list[str], str | None]:
    """The ids of the next messages that match, and up to where that looked; None: to the end.

    Not more of them than have `PAGE_RECIPIENTS` together. Who asks about recipients looks through
    theirs: a message's row, which has its content in it, is many times longer.
    """
    values = PostgresValues()
    of_message = message_conditions(wanted, now, values)
    of_recipient = recipient_conditions(wanted, values)
    table = "recipient" if of_recipient else "message"
    width = _WINDOW if of_message or of_recipient else limit
    until: str | None
    if wanted.queue_ids:
        until, seen = max(wanted.queue_ids), 0
    else:
        window = await db.fetchrow(
            "SELECT max(queue_id), count(*) FROM (SELECT queue_id"
            f" FROM relay.{table} WHERE queue_id > $1 ORDER BY queue_id LIMIT $2) AS part",
            after,
            width,
        )
        assert window is not None
        until, seen = window
    behind, reached, most = values.add(after), values.add(until), values.add(limit)
    among = (
        ""
        if not of_recipient
        else " AND m.queue_id IN (SELECT r.queue_id FROM relay.recipient r"
        f" WHERE r.queue_id > {behind} AND r.queue_id <= {reached} AND {all_of(of_recipient)})"
    )
    rows = await db.fetch(
        "SELECT m.queue_id, m.recipients FROM relay.message m WHERE m.queue_id > "
        f"{behind}::text AND m.queue_id <= {reached}::text AND {all_of(of_message)}{among}"
        f" ORDER BY m.queue_id LIMIT {most}::integer",
        *values.all,
    )
    return ids_of_page(rows, limit, until if seen == width else None)


async def item_of(db: Db, queue_id: str) -> QueuedItem | None:
    """A message as the operator sees it."""
    row = await db.fetchrow(f"SELECT {_MESSAGE} FROM relay.message WHERE queue_id = $1", queue_id)
    if row is None:
        return None
    recipients = await db.fetch(
        "SELECT idx, domain, state, due, data FROM relay.recipient WHERE queue_id = $1"
        " ORDER BY idx",
        queue_id,
    )
    return QueuedItem(shown_message(*row), tuple(shown_recipient(*one) for one in recipients))


async def listed(db: Db, ids: Sequence[str]) -> list[ListedMessage]:
    """Messages in a listing."""
    return listed_messages(
        await db.fetch(
            "SELECT m.queue_id, m.reverse_path, m.arrived, m.size_bytes,"
            " r.idx, r.domain, r.state, r.due, r.data"
            " FROM relay.message m LEFT JOIN relay.recipient r ON r.queue_id = m.queue_id"
            " WHERE m.queue_id = ANY($1) ORDER BY m.queue_id, r.idx",
            list(ids),
        )
    )


async def find_change(db: Db, step: WantedStep, limit: int) -> FoundStep:
    """What `find_ids` finds, and the event of each recipient that is not final.

    A few at a time: the event loop makes them, and mail waits for it.
    """
    ids, until = await find_ids(db, step.wanted, step.now, step.after, limit)
    events: dict[tuple[str, int], Event] = {}
    if step.event_of is not None:
        for start in range(0, len(ids), _EVENTS_AT_ONCE):
            some = ids[start : start + _EVENTS_AT_ONCE]
            events |= await _events_of(db, some, step.event_of)
    return FoundStep(ids, until, events)


async def _events_of(
    db: Db, ids: Sequence[str], event_of: EventOfChange
) -> dict[tuple[str, int], Event]:
    """The event of each recipient that is not final."""
    rows = await db.fetch(
        "SELECT m.queue_id, m.reverse_path, m.arrived, m.size_bytes, m.data,"
        " r.idx, r.domain, r.state, r.due, r.data"
        " FROM relay.message m JOIN relay.recipient r ON r.queue_id = m.queue_id"
        f" WHERE m.queue_id = ANY($1) AND r.state < {FINAL_NUMBER} ORDER BY m.queue_id, r.idx",
        list(ids),
    )
    return events_of_rows(rows, event_of)


async def count_states(db: Db) -> dict[State, int]:
    """Recipients in each state that is not final, counted."""
    rows = await db.fetch(
        f"SELECT state, count(*) FROM relay.recipient WHERE state < {FINAL_NUMBER} GROUP BY state"
    )
    return state_counts(dict(rows))


async def next_due(db: Db, skip: Collection[str], serves: Callable[[str], bool]) -> datetime | None:
    """Ready domains are few steps apart; of those that wait only the first stretch is looked at,
    since too early an answer costs one look more, and too late a one a delay.
    """
    skipped = list(skip)
    ready = await _first_ready(db, skipped, serves)
    waiting = await db.fetchval(
        f"""SELECT coalesce(
            (SELECT due FROM (SELECT due, domain FROM relay.recipient WHERE place = {WAITING}
                ORDER BY due LIMIT {_DUE_WINDOW}) AS first
            WHERE domain <> ALL($1) LIMIT 1),
            (SELECT due FROM relay.recipient WHERE place = {WAITING}
            ORDER BY due LIMIT 1 OFFSET {_DUE_WINDOW}))""",
        skipped,
    )
    found = [due for due in (ready, waiting) if due is not None]
    return moment(min(found)) if found else None


async def _first_ready(db: Db, skipped: Sequence[str], serves: Callable[[str], bool]) -> int | None:
    """When something is due of the first ready domain that is served, a step in the index each."""
    low = ""
    while True:
        rows = await db.fetch(
            f"""WITH RECURSIVE ready (domain) AS (
                SELECT min(domain) FROM relay.recipient
                WHERE place = {READY} AND domain > $2
                UNION ALL
                SELECT (SELECT min(domain) FROM relay.recipient
                        WHERE place = {READY} AND recipient.domain > ready.domain)
                FROM ready WHERE ready.domain IS NOT NULL)
            SELECT domain, (SELECT min(due) FROM relay.recipient
                    WHERE place = {READY} AND recipient.domain = ready.domain)
            FROM ready WHERE domain IS NOT NULL AND domain <> ALL($1) LIMIT {_READY_PAGE}""",
            skipped,
            low,
        )
        for domain, due in rows:
            if serves(domain):
                found: int = due
                return found
        if len(rows) < _READY_PAGE:
            return None
        low = rows[-1][0]


async def pending_reports(
    db: Db, *, now: datetime, pending_since: datetime, limit: int = 100
) -> list[str]:
    """What was written by a clock that was ahead has waited long enough, too."""
    rows = await db.fetch(
        "SELECT DISTINCT queue_id FROM relay.owed"
        f" WHERE (since <= $1 OR since > $2 OR NOT EXISTS ({AWAITED}))"
        " AND queue_id NOT IN (SELECT queue_id FROM relay.leaving) LIMIT $3",
        micros(pending_since),
        micros(now),
        limit,
    )
    return [queue_id for (queue_id,) in rows]


async def pending_report(db: Db, queue_id: str) -> PendingReport | None:
    """What the sender of a message is still to be told."""
    rows = await db.fetch(
        "SELECT is_done, owed.data, idx, domain, state, due, recipient.data"
        " FROM relay.owed JOIN relay.recipient USING (queue_id, idx) WHERE queue_id = $1"
        " ORDER BY idx",
        queue_id,
    )
    message = await db.fetchrow(
        f"SELECT {_MESSAGE} FROM relay.message WHERE queue_id = $1", queue_id
    )
    return report_of_rows(message, rows)


async def leaving(db: Db) -> tuple[int, str | None]:
    """How many messages are on their way to another queue, and to which directory."""
    count, target = await db.fetchrow("SELECT count(*), min(target) FROM relay.leaving")
    return count, target
