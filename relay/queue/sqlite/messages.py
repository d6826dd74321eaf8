"""Questions about messages and recipients: functions of a connection, each answered in one short
read.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Sequence
from datetime import datetime

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
from relay.queue.rows import FINAL_NUMBER, micros, moment
from relay.queue.shown import shown_message, shown_recipient
from relay.queue.sqlite.matching import SqliteValues
from relay.queue.sqlite.schema import READY, WAITING
from relay.queue.sqlite.statements import AWAITED
from relay.queue.store import ListedMessage, PendingReport, QueuedItem, QueueFilter, SpoolError

_WINDOW = 5000
_DUE_WINDOW = 1000


def content_of(db: sqlite3.Connection, queue_id: str) -> tuple[bytes, int, int]:
    row: tuple[bytes, int, int] | None = db.execute(
        "SELECT content, in_file, size_bytes FROM message WHERE queue_id = ?", (queue_id,)
    ).fetchone()
    if row is None:
        raise SpoolError(f"{queue_id}: there is no such message")
    content, in_file, _ = row
    if not in_file and not isinstance(content, bytes):
        raise SpoolError(f"{queue_id}: its content is damaged")
    return row


def find_ids(
    db: sqlite3.Connection, wanted: QueueFilter, now: datetime, after: str, limit: int
) -> tuple[list[str], str | None]:
    """The ids of the next messages that match, and up to where that looked; None: to the end.

    Not more of them than have `PAGE_RECIPIENTS` together. Who asks about recipients looks through
    theirs: a message's row, which has its content in it, is many times longer.
    """
    values = SqliteValues()
    of_message = message_conditions(wanted, now, values)
    of_recipient = recipient_conditions(wanted, values)
    table = "recipient" if of_recipient else "message"
    width = _WINDOW if of_message or of_recipient else limit
    until = max(wanted.queue_ids) if wanted.queue_ids else _end_of_window(db, table, after, width)
    bound = "" if until is None else " AND {}.queue_id <= :until"
    among = (
        ""
        if not of_recipient
        else " AND m.queue_id IN (SELECT r.queue_id FROM recipient r"
        f" WHERE r.queue_id > :after{bound.format('r')} AND {all_of(of_recipient)})"
    )
    rows = db.execute(
        "SELECT m.queue_id, m.recipients FROM message m"
        f" WHERE m.queue_id > :after{bound.format('m')} AND {all_of(of_message)}{among}"
        " ORDER BY m.queue_id LIMIT :limit",
        values.all | {"after": after, "until": until, "limit": limit},
    ).fetchall()
    return ids_of_page(rows, limit, None if wanted.queue_ids else until)


def _end_of_window(db: sqlite3.Connection, table: str, after: str, width: int) -> str | None:
    """Up to where so many rows reach; None: there are not so many."""
    row = db.execute(
        f"SELECT queue_id FROM {table} WHERE queue_id > ? ORDER BY queue_id LIMIT 1 OFFSET ?",
        (after, width - 1),
    ).fetchone()
    return None if row is None else str(row[0])


def item_of(db: sqlite3.Connection, queue_id: str) -> QueuedItem | None:
    """A message as the operator sees it."""
    row = db.execute(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data FROM message WHERE queue_id = ?",
        (queue_id,),
    ).fetchone()
    if row is None:
        return None
    recipients = db.execute(
        "SELECT idx, domain, state, due, data FROM recipient WHERE queue_id = ? ORDER BY idx",
        (queue_id,),
    )
    return QueuedItem(shown_message(*row), tuple(shown_recipient(*one) for one in recipients))


def listed(db: sqlite3.Connection, ids: Sequence[str]) -> list[ListedMessage]:
    """Messages in a listing."""
    return listed_messages(
        db.execute(
            "SELECT m.queue_id, m.reverse_path, m.arrived, m.size_bytes,"
            " r.idx, r.domain, r.state, r.due, r.data"
            " FROM message m LEFT JOIN recipient r ON r.queue_id = m.queue_id"
            " WHERE m.queue_id IN (SELECT value FROM json_each(?)) ORDER BY m.queue_id, r.idx",
            (json.dumps(ids),),
        )
    )


def find_change(db: sqlite3.Connection, step: WantedStep, limit: int) -> FoundStep:
    """What `find_ids` finds, and the event of each recipient that is not final.

    In one transaction: after each commit of the writer SQLite forgets the pages that it has read.
    """
    if step.event_of is None:
        return FoundStep(*find_ids(db, step.wanted, step.now, step.after, limit), {})
    db.execute("BEGIN")
    try:
        ids, until = find_ids(db, step.wanted, step.now, step.after, limit)
        rows = db.execute(
            "SELECT m.queue_id, m.reverse_path, m.arrived, m.size_bytes, m.data,"
            " r.idx, r.domain, r.state, r.due, r.data"
            " FROM message m JOIN recipient r ON r.queue_id = m.queue_id"
            f" WHERE m.queue_id IN (SELECT value FROM json_each(?)) AND r.state < {FINAL_NUMBER}"
            " ORDER BY m.queue_id, r.idx",
            (json.dumps(ids),),
        ).fetchall()
    finally:
        db.execute("ROLLBACK")  # nothing was written
    return FoundStep(ids, until, events_of_rows(rows, step.event_of))


def count_states(db: sqlite3.Connection) -> dict[State, int]:
    """Recipients in each state that is not final, counted.

    Counted as columns: for `GROUP BY` SQLite would sort all recipients in memory, since no index
    has them by state.
    """
    numbers = range(FINAL_NUMBER)
    counts = ", ".join(f"count(*) FILTER (WHERE state = {number})" for number in numbers)
    row = db.execute(f"SELECT {counts} FROM recipient").fetchone()
    return state_counts(dict(zip(numbers, row, strict=True)))


def next_due(db: sqlite3.Connection, skip: Collection[str]) -> datetime | None:
    """Ready domains are few steps apart; of those that wait only the first stretch is looked at,
    since too early an answer costs one look more, and too late a one a delay.
    """
    skipped = json.dumps(list(skip))
    ready = db.execute(
        f"""WITH RECURSIVE ready (domain) AS (
            SELECT min(domain) FROM recipient WHERE place = {READY}
            UNION ALL
            SELECT (SELECT min(domain) FROM recipient
                    WHERE place = {READY} AND domain > ready.domain)
            FROM ready WHERE ready.domain IS NOT NULL)
        SELECT (SELECT min(due) FROM recipient WHERE place = {READY} AND domain = ready.domain)
        FROM ready
        WHERE domain IS NOT NULL AND domain NOT IN (SELECT value FROM json_each(?)) LIMIT 1""",
        (skipped,),
    ).fetchone()
    waiting = (
        db.execute(
            f"""SELECT due FROM
            (SELECT due, domain FROM recipient WHERE place = {WAITING} ORDER BY due LIMIT ?)
            WHERE domain NOT IN (SELECT value FROM json_each(?)) LIMIT 1""",
            (_DUE_WINDOW, skipped),
        ).fetchone()
        or db.execute(
            f"SELECT due FROM recipient WHERE place = {WAITING} ORDER BY due LIMIT 1 OFFSET ?",
            (_DUE_WINDOW,),
        ).fetchone()
    )
    found = [row[0] for row in (ready, waiting) if row is not None and isinstance(row[0], int)]
    return moment(min(found)) if found else None


def pending_reports(
    db: sqlite3.Connection, *, now: datetime, pending_since: datetime, limit: int = 100
) -> list[str]:
    """What was written by a clock that was ahead has waited long enough, too."""
    rows = db.execute(
        "SELECT DISTINCT queue_id FROM owed"
        f" WHERE (since <= ? OR since > ? OR NOT EXISTS ({AWAITED}))"
        " AND queue_id NOT IN (SELECT queue_id FROM leaving) LIMIT ?",
        (micros(pending_since), micros(now), limit),
    ).fetchall()
    return [row[0] for row in rows]


def pending_report(db: sqlite3.Connection, queue_id: str) -> PendingReport | None:
    """What the sender of a message is still to be told."""
    rows = db.execute(
        "SELECT is_done, owed.data, idx, domain, state, due, recipient.data"
        " FROM owed JOIN recipient USING (queue_id, idx) WHERE queue_id = ? ORDER BY idx",
        (queue_id,),
    ).fetchall()
    message = db.execute(
        "SELECT queue_id, reverse_path, arrived, size_bytes, data FROM message WHERE queue_id = ?",
        (queue_id,),
    ).fetchone()
    return report_of_rows(message, rows)


def leaving(db: sqlite3.Connection) -> tuple[int, str | None]:
    """How many messages are on their way to another queue, and to which directory."""
    count, target = db.execute("SELECT count(*), min(target) FROM leaving").fetchone()
    return count, target
