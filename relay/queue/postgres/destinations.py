"""The queue by destination, a window at a time: a function of a connection."""

from __future__ import annotations

from relay.queue.destinations import DestinationPart, last_result
from relay.queue.entry import State
from relay.queue.postgres.connection import Db
from relay.queue.postgres.matching import as_json
from relay.queue.postgres.schema import CLAIMED
from relay.queue.rows import FINAL_NUMBER, STATE_NUMBER

_WINDOW = 5000

_QUEUED, _DEFERRED, _HELD = (
    STATE_NUMBER[state] for state in (State.QUEUED, State.DEFERRED, State.HELD)
)

_LAST = f"{as_json('data')} -> 5"
"""The last attempt (`relay.queue.rows.recipient_data`)."""


async def count_destinations(db: Db, after: str) -> tuple[list[DestinationPart], str | None]:
    """The recipients of the messages in the next window, by domain, and where it ended."""
    window = await db.fetchrow(
        "SELECT max(queue_id), count(*) FROM (SELECT queue_id FROM relay.recipient"
        " WHERE queue_id > $1 ORDER BY queue_id LIMIT $2) AS part",
        after,
        _WINDOW,
    )
    assert window is not None
    until, seen = window
    if until is None:
        return [], None
    rows = await db.fetch(
        f"""SELECT domain, count(*) FILTER (WHERE state = {_QUEUED}),
            count(*) FILTER (WHERE state = {_DEFERRED}), count(*) FILTER (WHERE state = {_HELD}),
            count(*) FILTER (WHERE place = {CLAIMED}), min(queue_id), min(due),
            (array_agg({_LAST} ORDER BY ({_LAST} ->> 0)::bigint DESC NULLS LAST))[1]
        FROM relay.recipient WHERE queue_id > $1 AND queue_id <= $2 AND state < {FINAL_NUMBER}
        GROUP BY domain""",
        after,
        until,
    )
    parts = [DestinationPart._make((*row[:7], last_result(row[7]))) for row in rows]
    return parts, until if seen == _WINDOW else None
