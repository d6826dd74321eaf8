"""A batch of the kind that most are, written as one statement, which is a transaction.

Plain is a batch of nothing but new mail with small content, and messages that leave whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from relay.queue.batch import Row, Rows, joined
from relay.queue.postgres.connection import SAFE_COMMIT, Db
from relay.queue.postgres.inserts import (
    COUNTED,
    EXCEPTIONS,
    FINISHED_CONTENT,
    FINISHED_MESSAGES,
    FINISHED_RECIPIENTS,
    NEW_EVENTS,
    NEW_MESSAGES,
    NEW_RECIPIENTS,
    ONCE,
    columns,
)
from relay.queue.postgres.lease import Lease
from relay.queue.postgres.statistics import Counts


@cache
def _statement(*, finishes: bool, takes_in: bool, counts: bool, excepts: bool) -> str:
    """What a plain batch writes, as one statement; its parameters are those of `write`.

    A part that has nothing to do would cost as much as one that has little, so it is left out. A
    division by zero undoes the statement where what was finished is not claimed.
    """
    parts = [
        f"""mark AS (INSERT INTO relay.batch (lease, n, void)
            SELECT holder.id, $2::bigint, false FROM
            (SELECT id FROM relay.lease WHERE id = $1::bigint AND lost IS NULL FOR KEY SHARE)
            AS holder, ({SAFE_COMMIT}) AS safe RETURNING lease)"""
    ]
    last, is_whole = 3, "1"  # $3: the node

    def add(name: str, text: str, count: int, end: str, *, more: Sequence[str] = ()) -> None:
        nonlocal last
        values = [f"${last + number}" for number in range(1, count + 1)]
        last += count
        parts.append(f"{name} AS ({text.format(*values, *more)} {end})")

    if finishes:
        written = "AND EXISTS (SELECT FROM mark) RETURNING 1"
        add("gone_recipients", FINISHED_RECIPIENTS, 2, written)
        ids = f"${last - 1}"
        add("gone_messages", FINISHED_MESSAGES, 0, written, more=[ids])
        add("gone_content", FINISHED_CONTENT, 0, written, more=[ids])
        is_whole = f"""1 / (CASE WHEN NOT EXISTS (SELECT FROM mark)
            OR ((SELECT count(*) FROM gone_recipients) = ${last + 1}
                AND (SELECT count(*) FROM gone_messages) = ${last + 2}) THEN 1 ELSE 0 END)"""
        last += 2
    written = "WHERE EXISTS (SELECT FROM mark)"
    if takes_in:
        add("messages", NEW_MESSAGES, 8, written)
        add("recipients", NEW_RECIPIENTS, 7, written, more=["$1"])
    add("events", NEW_EVENTS, 8, written, more=["$3"])
    if counts:
        add("counts", COUNTED, 8, written)
    if excepts:
        add("exceptions", EXCEPTIONS, 8, written + ONCE)
    return f"WITH {', '.join(parts)} SELECT (SELECT count(*) FROM mark) AS marks, {is_whole}"


def is_plain(batch: Sequence[Rows]) -> bool:
    """Whether a batch may be written by `write`."""
    if not all(map(_is_plain, batch)):
        return False
    # In one statement a message could come in the place of one that leaves.
    leaving = {queue_id for rows in batch for queue_id, _ in rows.finished}
    return not leaving.intersection(row[0] for rows in batch for row in rows.messages)


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


async def write(
    db: Db, lease: Lease, n: int, batch: Sequence[Rows], events: Sequence[Row], counts: Counts
) -> bool:
    """Write a plain batch as number `n` of this lease; whether the lease lives."""
    finished = [(*each, rows.token) for rows in batch for each in rows.finished]
    messages = joined(rows.messages for rows in batch)
    values: list[Any] = [lease.id, n, lease.node]
    if finished:
        values += [[queue_id for queue_id, _, _ in finished], [token for _, _, token in finished]]
        values += [sum(count for _, count, _ in finished), len(finished)]
    if messages:
        values += columns(messages, 8)
        values += columns(joined(rows.recipients for rows in batch), 7)
    values += columns(events, 8)
    if counts.numbers:
        values += columns(counts.numbers, 8)
    if counts.exceptions:
        values += columns(counts.exceptions, 8)
    statement = _statement(
        finishes=bool(finished),
        takes_in=bool(messages),
        counts=bool(counts.numbers),
        excepts=bool(counts.exceptions),
    )
    row = await db.fetchrow(statement, *values)
    return row is not None and row[0] == 1
