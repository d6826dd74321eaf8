"""The queue by destination, a window at a time: a function of a connection."""

from __future__ import annotations

import sqlite3

from relay.queue.destinations import DestinationPart, last_result
from relay.queue.entry import State
from relay.queue.rows import FINAL_NUMBER, STATE_NUMBER
from relay.queue.sqlite.schema import CLAIMED

_WINDOW = 5000
_TIME_DIGITS = 20

_QUEUED, _DEFERRED, _HELD = (
    STATE_NUMBER[state] for state in (State.QUEUED, State.DEFERRED, State.HELD)
)

_LAST = "CASE WHEN json_valid(data) THEN json_extract(data, '$[5]') END"
_LATEST = f"max(printf('%0{_TIME_DIGITS}d', json_extract({_LAST}, '$[0]')) || {_LAST})"
"""Of the largest time the whole attempt: the time stands in front of it in so many digits."""


def count_destinations(
    db: sqlite3.Connection, after: str
) -> tuple[list[DestinationPart], str | None]:
    """The recipients of the messages in the next window, by domain, and where it ended."""
    until, seen = db.execute(
        "SELECT max(queue_id), count(*) FROM"
        " (SELECT queue_id FROM recipient WHERE queue_id > ? ORDER BY queue_id LIMIT ?)",
        (after, _WINDOW),
    ).fetchone()
    if until is None:
        return [], None
    rows = db.execute(
        f"SELECT domain, sum(state = {_QUEUED}), sum(state = {_DEFERRED}), sum(state = {_HELD}),"
        f" sum(place = {CLAIMED}), min(queue_id), min(due), {_LATEST} FROM recipient"
        f" WHERE queue_id > ? AND queue_id <= ? AND state < {FINAL_NUMBER} GROUP BY domain",
        (after, until),
    )
    parts = [
        DestinationPart._make((*counts, last_result(last and last[_TIME_DIGITS:])))
        for *counts, last in rows
    ]
    return parts, until if seen == _WINDOW else None
