"""Questions about the events of the delivery log: functions of a connection, each answered in one
short read. Each node's events are a stream of their own, by its number.
"""

from __future__ import annotations

from typing import Any

from relay.mail.address import domain_spellings, spellings
from relay.mail.event import Event
from relay.queue.postgres.connection import Db
from relay.queue.postgres.matching import Values, as_json
from relay.queue.rows import micros, moment
from relay.queue.store import EventFilter, StoredEvent

__all__ = [
    "event_bounds",
    "events_after",
    "events_within",
    "nodes",
    "note_written",
    "unwritten",
]

_WINDOW = 1000

_COLUMNS = "seq, at, name, queue_id, sender, recipient, id, line"
_LINE = as_json("line")

_FIELD_IS = {
    "severity": f"{_LINE} ->> 'severity' = :value",
    "about": f"{_LINE} ->> 'about' = :value",
    "message-id": f"{_LINE} #>> '{{message,headers,message-id}}' = :value",
    "tag": f"{_LINE} -> 'tags' ? :value",
    "protection": (
        f"CASE WHEN {_LINE} -> 'delivery-status' IS NULL THEN ''"
        f" WHEN name <> 'delivered' OR {_LINE} #>> '{{delivery-status,tls}}' IS NULL"
        " THEN 'not-sent'"
        f" WHEN {_LINE} #>> '{{delivery-status,tls}}' <> 'true' THEN 'clear'"
        f" WHEN {_LINE} #>> '{{delivery-status,certificate-verified}}' = 'true' THEN 'verified'"
        " ELSE 'encrypted' END = :value"
    ),
    "policy-source": (
        f"({_LINE} #>> '{{policy,require-tls-source}}' = :value"
        f" OR {_LINE} #>> '{{policy,skip-verification-source}}' = :value)"
    ),
    "text": (
        "strpos(lower(queue_id || ' ' || id || ' ' || sender || ' ' || recipient || ' '"
        f" || coalesce({_LINE} #>> '{{envelope,targets}}', '') || ' '"
        f" || coalesce({_LINE} #>> '{{message,headers,subject}}', '') || ' '"
        f" || coalesce({_LINE} #>> '{{message,headers,message-id}}', '')),"
        " lower(:value)) > 0"
    ),
} | {
    field: f"strpos(lower({_LINE} #>> '{{message,headers,{field}}}'), lower(:value)) > 0"
    for field in ("from", "to", "subject")
}
"""Conditions on fields of the event; few searches have them, so no column holds these fields."""


def _event(row: Any) -> StoredEvent:
    seq, at, name, queue_id, sender, recipient, event_id, line = row
    return StoredEvent(seq, Event(event_id, moment(at), name, queue_id, sender, recipient, line))


async def nodes(db: Db) -> list[int]:
    """The numbers of all nodes that ever were, oldest first."""
    return [row[0] for row in await db.fetch("SELECT id FROM relay.node ORDER BY id")]


async def events_after(db: Db, node: int, seq: int, limit: int) -> list[StoredEvent]:
    rows = await db.fetch(
        f"SELECT {_COLUMNS} FROM relay.event WHERE node = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        node,
        seq,
        limit,
    )
    return [_event(row) for row in rows]


async def event_bounds(
    db: Db, node: int, wanted: EventFilter, after: int, ascending: bool
) -> tuple[int, int]:
    """The first and the last number that can match. Events commit in any order of their times, so
    those of a period are found by a walk through its part of the index.
    """
    values = Values()
    where = [f"node = {values.add(node)}"]
    if wanted.begin is not None:
        where.append(f"at >= {values.add(micros(wanted.begin))}")
    if wanted.end is not None:
        where.append(f"at <= {values.add(micros(wanted.end))}")
    found = await db.fetchrow(
        f"SELECT min(seq), max(seq) FROM relay.event WHERE {' AND '.join(where)}", *values.all
    )
    assert found is not None
    low, high = found
    if low is None:
        return 1, 0
    if after:
        low, high = (max(low, after + 1), high) if ascending else (low, min(high, after - 1))
    return low, high


async def events_within(
    db: Db, node: int, wanted: EventFilter, low: int, high: int, limit: int, ascending: bool
) -> tuple[list[StoredEvent], int]:
    """The first that match between two numbers, and the end of the window that was searched."""
    values = Values()
    narrow = [f"node = {values.add(node)}"]
    if wanted.recipient:
        narrow.append(values.is_one_of("recipient", spellings(wanted.recipient)))
        narrow.append("recipient <> ''")  # so that the partial index can serve
    if wanted.queue_id:
        narrow.append(f"queue_id = {values.add(wanted.queue_id)}")
    last, order = ("max", "ASC") if ascending else ("min", "DESC")
    window = Values()
    window.all = list(values.all)
    found = await db.fetchrow(
        f"SELECT {last}(seq), count(*) FROM (SELECT seq FROM relay.event WHERE"
        f" {' AND '.join(narrow)} AND seq BETWEEN {window.add(low)} AND {window.add(high)}"
        f" ORDER BY seq {order} LIMIT {window.add(_WINDOW)}::integer) AS part",
        *window.all,
    )
    assert found is not None
    reached, seen = found
    if seen < _WINDOW:
        reached = high if ascending else low
    where = [*narrow, *_conditions(wanted, values)]
    between = (low, reached) if ascending else (reached, high)
    rows = await db.fetch(
        f"SELECT {_COLUMNS} FROM relay.event WHERE {' AND '.join(where)}"
        f" AND seq BETWEEN {values.add(between[0])} AND {values.add(between[1])}"
        f" ORDER BY seq {order} LIMIT {values.add(limit)}::integer",
        *values.all,
    )
    return [_event(row) for row in rows], reached


def _conditions(wanted: EventFilter, values: Values) -> list[str]:
    where: list[str] = []
    if wanted.begin is not None:
        where.append(f"at >= {values.add(micros(wanted.begin))}")
    if wanted.end is not None:
        where.append(f"at <= {values.add(micros(wanted.end))}")
    if wanted.names:
        where.append(f"name = ANY({values.add(sorted(wanted.names))}::text[])")
    if wanted.sender:
        where.append(values.is_one_of("sender", spellings(wanted.sender)))
    if wanted.sender_domain:
        where.append(_ends_in("sender", wanted.sender_domain, values))
    if wanted.recipient_domain:
        one = _ends_in("recipient", wanted.recipient_domain, values)
        several = _ends_in("target", wanted.recipient_domain, values)
        # An accepted message with several recipients names them all in its line.
        where.append(
            f"CASE recipient WHEN '' THEN EXISTS (SELECT 1 FROM unnest(string_to_array("
            f"{_LINE} #>> '{{envelope,targets}}', ',')) AS target WHERE {several})"
            f" ELSE {one} END"
        )
    for field, value in wanted.fields:
        where.append(_FIELD_IS[field].replace(":value", f"{values.add(value)}::text"))
    return where


def _ends_in(column: str, domain: str, values: Values) -> str:
    """The condition that an address is in a domain, however its name is spelled."""
    names = [f"@{name}".lower() for name in domain_spellings(domain)]
    # The part behind the last "@", with it.
    return f"lower(substring({column} FROM '@[^@]*$')) = ANY({values.add(names)}::text[])"


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
