"""Questions about the events of the delivery log: functions of a connection, each answered in one
short read.
"""

from __future__ import annotations

import sqlite3

from relay.queue.answers import EVENT_COLUMNS, numbers_behind, stored_event
from relay.queue.conditions import all_of, event_conditions, indexed_conditions
from relay.queue.rows import micros
from relay.queue.sqlite.matching import SqliteValues
from relay.queue.store import EventFilter, StoredEvent

_WINDOW = 1000
_FAR = 1 << 62


def events_after(db: sqlite3.Connection, seq: int, limit: int) -> list[StoredEvent]:
    """The next events."""
    rows = db.execute(
        f"SELECT {EVENT_COLUMNS} FROM event WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)
    ).fetchall()
    return [stored_event(row) for row in rows]


def event_bounds(
    db: sqlite3.Connection, wanted: EventFilter, after: int, ascending: bool
) -> tuple[int, int]:
    """The first and the last number that can match. Events commit in any order of their times, so
    those of a period are found by a walk through its part of the index.
    """
    if wanted.begin is None and wanted.end is None:
        # Each is one step in the index; asked for together they would be a walk through all.
        low, high = db.execute(
            "SELECT (SELECT min(seq) FROM event), (SELECT max(seq) FROM event)"
        ).fetchone()
    else:
        low, high = db.execute(
            "SELECT min(seq), max(seq) FROM event INDEXED BY event_at WHERE at >= ? AND at <= ?",
            (
                micros(wanted.begin) if wanted.begin is not None else -_FAR,
                micros(wanted.end) if wanted.end is not None else _FAR,
            ),
        ).fetchone()
    return numbers_behind(low, high, after, ascending=ascending)


def events_within(
    db: sqlite3.Connection, wanted: EventFilter, low: int, high: int, limit: int, ascending: bool
) -> tuple[list[StoredEvent], int]:
    """The first that match between two numbers, and the end of the window that was searched."""
    values = SqliteValues({"low": low, "high": high, "limit": limit, "width": _WINDOW})
    where = event_conditions(wanted, values)
    narrow = ["seq BETWEEN :low AND :high", *indexed_conditions(wanted, values)]
    source = "event NOT INDEXED"
    if wanted.recipient:
        source = "event INDEXED BY event_recipient"
    if wanted.queue_id:
        source = "event INDEXED BY event_queue_id"
    last, order = ("max", "ASC") if ascending else ("min", "DESC")
    reached, seen = db.execute(
        f"SELECT {last}(seq), count(*) FROM (SELECT seq FROM {source}"
        f" WHERE {all_of(narrow)} ORDER BY seq {order} LIMIT :width)",
        values.all,
    ).fetchone()
    if seen < _WINDOW:
        reached = high if ascending else low
    values.all["low" if not ascending else "high"] = reached
    rows = db.execute(
        f"SELECT {EVENT_COLUMNS} FROM {source} WHERE {all_of(narrow + where)}"
        f" ORDER BY seq {order} LIMIT :limit",
        values.all,
    ).fetchall()
    return [stored_event(row) for row in rows], reached
