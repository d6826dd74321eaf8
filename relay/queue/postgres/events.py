"""Questions about the events of the delivery log: functions of a connection, each answered in one
short read. Each node's events are a stream of their own, by its number.
"""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from relay.queue.answers import EVENT_COLUMNS, numbers_behind, stored_event
from relay.queue.conditions import all_of, event_conditions, indexed_conditions, period_conditions
from relay.queue.event_matching import event_matches
from relay.queue.postgres.connection import Db
from relay.queue.postgres.matching import PostgresValues
from relay.queue.store import EventFilter, StoredEvent

_WINDOW = 1000


async def nodes(db: Db) -> list[int]:
    """The numbers of all nodes that ever were, oldest first."""
    return [row[0] for row in await db.fetch("SELECT id FROM relay.node ORDER BY id")]


async def events_after(db: Db, node: int, seq: int, limit: int) -> list[StoredEvent]:
    rows = await db.fetch(
        f"SELECT {EVENT_COLUMNS} FROM relay.event WHERE node = $1 AND seq > $2"
        " ORDER BY seq LIMIT $3",
        node,
        seq,
        limit,
    )
    return [stored_event(row) for row in rows]


async def event_bounds(
    db: Db, node: int, wanted: EventFilter, after: int, ascending: bool
) -> tuple[int, int]:
    """The first and the last number that can match. Events commit in any order of their times, so
    those of a period are found by a walk through its part of the index.
    """
    values = PostgresValues()
    where = [f"node = {values.add(node)}", *period_conditions(wanted, values)]
    found = await db.fetchrow(
        f"SELECT min(seq), max(seq) FROM relay.event WHERE {all_of(where)}", *values.all
    )
    assert found is not None
    low, high = found
    return numbers_behind(low, high, after, ascending=ascending)


async def events_within(
    db: Db, node: int, wanted: EventFilter, low: int, high: int, limit: int, ascending: bool
) -> tuple[list[StoredEvent], int]:
    """The first that match between two numbers, and the end of the window that was searched."""
    values = PostgresValues()
    narrow = [f"node = {values.add(node)}", *indexed_conditions(wanted, values)]
    last, order = ("max", "ASC") if ascending else ("min", "DESC")
    window = values.copy()
    part = await db.fetchrow(
        f"SELECT {last}(seq), count(*) FROM (SELECT seq FROM relay.event WHERE"
        f" {all_of(narrow)} AND seq BETWEEN {window.add(low)} AND {window.add(high)}"
        f" ORDER BY seq {order} LIMIT {window.add(_WINDOW)}::integer) AS part",
        *window.all,
    )
    assert part is not None
    reached, seen = part
    if seen < _WINDOW:
        reached = high if ascending else low
    between = (low, reached) if ascending else (reached, high)
    all_values = values.copy()
    conditions = [*narrow, *event_conditions(wanted, all_values)]
    try:
        found = await _between(db, conditions, all_values, between, order, limit)
    except asyncpg.DataError:
        # A damaged line makes the server refuse all of them: so each is read here.
        found = [
            one
            for one in await _between(db, narrow, values, between, order, _WINDOW)
            if _matches(one, wanted)
        ][:limit]
    return found, reached


async def _between(
    db: Db,
    conditions: Sequence[str],
    values: PostgresValues,
    between: tuple[int, int],
    order: str,
    limit: int,
) -> list[StoredEvent]:
    rows = await db.fetch(
        f"SELECT {EVENT_COLUMNS} FROM relay.event WHERE {all_of(conditions)}"
        f" AND seq BETWEEN {values.add(between[0])} AND {values.add(between[1])}"
        f" ORDER BY seq {order} LIMIT {values.add(limit)}::integer",
        *values.all,
    )
    return [stored_event(row) for row in rows]


def _matches(stored: StoredEvent, wanted: EventFilter) -> bool:
    """Whether an event is asked for; one whose line is damaged is not."""
    try:
        return event_matches(stored.event, wanted)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


async def unwritten(db: Db, lease: int) -> tuple[int, int] | None:
    """A node without a lease, some of whose events are in no log file, and how far that is. The
    node with the oldest lease is told, and no other.
    """
    row = await db.fetchrow(
        """SELECT node.id, node.log_mark FROM relay.node
        WHERE $1 = (SELECT min(id) FROM relay.lease WHERE lost IS NULL AND expires > now())
        AND NOT EXISTS (SELECT 1 FROM relay.lease WHERE lease.node = node.id AND lost IS NULL)
        AND EXISTS (SELECT 1 FROM relay.event
            WHERE event.node = node.id AND event.seq > node.log_mark)
        ORDER BY node.id LIMIT 1""",
        lease,
    )
    return None if row is None else (row[0], row[1])


async def note_written(db: Db, node: int, seq: int) -> None:
    """A log file holds the events of a node up to `seq`."""
    await db.execute(
        "UPDATE relay.node SET log_mark = greatest(log_mark, $2) WHERE id = $1", node, seq
    )
