"""The statements that write rows of many requests in one go, as arrays (`unnest`), with the numbers
of their parameters left open: a batch of its own kind has several of them in one statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relay.queue.postgres.schema import CLAIMED

NEW_MESSAGES = """INSERT INTO relay.message
    (queue_id, arrived, size_bytes, recipients, in_pieces, reverse_path, data, content)
    SELECT * FROM unnest({0}::text[], {1}::bigint[], {2}::bigint[], {3}::integer[],
        {4}::boolean[], {5}::text[], {6}::text[], {7}::bytea[])"""
NEW_RECIPIENTS = f"""INSERT INTO relay.recipient
    (queue_id, idx, domain, state, place, due, data, lease)
    SELECT *, CASE WHEN place = {CLAIMED} THEN {{7}}::bigint END
    FROM unnest({{0}}::text[], {{1}}::integer[], {{2}}::text[], {{3}}::smallint[],
        {{4}}::smallint[], {{5}}::bigint[], {{6}}::text[])
        AS new (queue_id, idx, domain, state, place, due, data)"""
NEW_EVENTS = """INSERT INTO relay.event
    (node, seq, at, name, queue_id, sender, recipient, id, line)
    SELECT {8}::integer, * FROM unnest({0}::bigint[], {1}::bigint[], {2}::text[], {3}::text[],
        {4}::text[], {5}::text[], {6}::text[], {7}::text[])"""
NEW_PENDING = """INSERT INTO relay.owed (queue_id, idx, is_done, since, report_after, data)
    SELECT * FROM unnest({0}::text[], {1}::integer[], {2}::boolean[], {3}::bigint[], {4}::bigint[],
        {5}::text[])"""
COUNTED = """INSERT INTO relay.counted (recipient_domain, sender_domain, hour, result,
        protection, policy, reason, number)
    SELECT * FROM unnest({0}::text[], {1}::text[], {2}::integer[], {3}::text[], {4}::text[],
        {5}::text[], {6}::text[], {7}::bigint[])"""
EXCEPTIONS = """INSERT INTO relay.exception (recipient_domain, sender_domain, at, event_id,
        queue_id, result, protection, sentence)
    SELECT * FROM unnest({0}::text[], {1}::text[], {2}::bigint[], {3}::text[], {4}::text[],
        {5}::text[], {6}::text[], {7}::text[])"""
ONCE = " ON CONFLICT DO NOTHING"
"""An event that is told twice has one id."""
FINISHED_RECIPIENTS = f"""DELETE FROM relay.recipient USING
    unnest({{0}}::text[], {{1}}::bigint[]) AS done (queue_id, lease)
    WHERE recipient.queue_id = done.queue_id AND recipient.place = {CLAIMED}
    AND recipient.lease = done.lease"""
FINISHED_MESSAGES = """DELETE FROM relay.message USING unnest({0}::text[]) AS done (queue_id)
    WHERE message.queue_id = done.queue_id"""
FINISHED_CONTENT = """DELETE FROM relay.content USING unnest({0}::text[]) AS done (queue_id)
    WHERE content.queue_id = done.queue_id"""


def numbered(statement: str, begin: int, count: int) -> str:
    """A statement with the numbers of its parameters."""
    return statement.format(*(f"${number}" for number in range(begin, begin + count)))


def columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows as one list a column."""
    if not rows:
        return [[] for _ in range(width)]
    return [list(column) for column in zip(*rows, strict=True)]
