"""A batch of the kind that most are, written as one statement, which is a transaction.

Plain is a batch of nothing but new mail with small content, and messages that leave whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from relay.queue.batch import Row, Rows, joined
from relay.queue.postgres.commit import SAFE_COMMIT
from relay.queue.postgres.connection import Db
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
    numbered,
)
from relay.queue.postgres.lease import Lease
from relay.queue.postgres.statistics import Counts

__all__ = ["is_plain", "write"]


def _statement() -> str:
    """All that a plain batch writes, as one statement; its parameters are those of `write`.

    A division by zero undoes it where what was finished is not claimed.
    """
    written = "AND EXISTS (SELECT FROM mark)"
    deletions = (
        ("gone_recipients", numbered(FINISHED_RECIPIENTS, 3, 2)),
        ("gone_messages", numbered(FINISHED_MESSAGES, 3, 1)),
        ("gone_content", numbered(FINISHED_CONTENT, 3, 1)),
    )
    insertions = (
        ("messages", numbered(NEW_MESSAGES, 7, 8)),
        ("recipients", NEW_RECIPIENTS.format(*(f"${n}" for n in range(15, 22)), "$1")),
        ("events", NEW_EVENTS.format(*(f"${n}" for n in range(22, 30)), "$30")),
        ("counts", numbered(COUNTED, 31, 8)),
        ("exceptions", numbered(EXCEPTIONS, 39, 8)),
    )
    parts = [
        f"""mark AS (INSERT INTO relay.batch (lease, n, void)
            SELECT holder.id, $2::bigint, false FROM
            (SELECT id FROM relay.lease WHERE id = $1::bigint AND lost IS NULL FOR KEY SHARE)
            AS holder, ({SAFE_COMMIT}) AS safe RETURNING lease)"""
    ]
    parts += [f"{name} AS ({text} {written} RETURNING 1)" for name, text in deletions]
    parts += [
        f"{name} AS ({text} WHERE EXISTS (SELECT FROM mark){ONCE if name == 'exceptions' else ''})"
        for name, text in insertions
    ]
    return f"""WITH {", ".join(parts)}
        SELECT (SELECT count(*) FROM mark) AS marks,
        1 / (CASE WHEN NOT EXISTS (SELECT FROM mark)
            OR ((SELECT count(*) FROM gone_recipients) = $5
                AND (SELECT count(*) FROM gone_messages) = $6) THEN 1 ELSE 0 END)"""


_STATEMENT = _statement()


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
    row = await db.fetchrow(
        _STATEMENT,
        lease.id,
        n,
        [queue_id for queue_id, _, _ in finished],
        [token for _, _, token in finished],
        sum(count for _, count, _ in finished),
        len(finished),
        *columns(joined(rows.messages for rows in batch), 8),
        *columns(joined(rows.recipients for rows in batch), 7),
        *columns(events, 8),
        lease.node,
        *columns(counts.numbers, 8),
        *columns(counts.exceptions, 8),
    )
    return row is not None and row[0] == 1
