"""Questions about the events of the delivery log: functions of a connection, each answered in one
short read.
"""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from relay.mail.address import domain_spellings, spellings
from relay.mail.event import Event
from relay.queue.rows import micros, moment
from relay.queue.sqlite.matching import is_one_of
from relay.queue.store import EventFilter, StoredEvent

__all__ = ["event_bounds", "events_after", "events_within"]

_WINDOW = 1000
_FAR = 1 << 62

_EVENT_COLUMNS = "seq, at, name, queue_id, sender, recipient, id, line"

_FIELD_IS = {
    "severity": "json_extract(line, '$.severity') = :value",
    "about": "json_extract(line, '$.about') = :value",
    "message-id": "json_extract(line, '$.message.headers.message-id') = :value",
    "tag": "EXISTS (SELECT 1 FROM json_each(line, '$.tags') WHERE value = :value)",
    "protection": (
        "CASE WHEN json_type(line, '$.delivery-status') IS NULL THEN ''"
        " WHEN name <> 'delivered' OR json_extract(line, '$.delivery-status.tls') IS NULL"
        " THEN 'not-sent'"
        " WHEN NOT json_extract(line, '$.delivery-status.tls') THEN 'clear'"
        " WHEN json_extract(line, '$.delivery-status.certificate-verified') THEN 'verified'"
        " ELSE 'encrypted' END = :value"
    ),
    "policy-source": (
        "(json_extract(line, '$.policy.require-tls-source') = :value"
        " OR json_extract(line, '$.policy.skip-verification-source') = :value)"
    ),
    "text": (
        "instr(lower(queue_id || ' ' || id || ' ' || sender || ' ' || recipient || ' '"
        " || coalesce(json_extract(line, '$.envelope.targets'), '') || ' '"
        " || coalesce(json_extract(line, '$.message.headers.subject'), '') || ' '"
        " || coalesce(json_extract(line, '$.message.headers.message-id'), '')),"
        " lower(:value)) > 0"
    ),
} | {
    field: f"instr(lower(json_extract(line, '$.message.headers.{field}')), lower(:value)) > 0"
    for field in ("from", "to", "subject")
}
"""Conditions on fields of the event; few searches have them, so no column holds these fields."""


_HAS_RECIPIENT_IN = (
    "EXISTS (SELECT 1 FROM json_each(:recipient_domain) WHERE CASE recipient WHEN ''"
    " THEN instr(lower(json_extract(line, '$.envelope.targets')) || ',', value || ',') > 0"
    " ELSE lower(substr(recipient, -length(value))) = value END)"
)
"""An accepted message with several recipients names them all in its line."""


def _event(row: tuple[Any, ...]) -> StoredEvent:
    seq, at, name, queue_id, sender, recipient, event_id, line = row
    return StoredEvent(seq, Event(event_id, moment(at), name, queue_id, sender, recipient, line))


def events_after(db: sqlite3.Connection, seq: int, limit: int) -> list[StoredEvent]:
    """The next events."""
    rows = db.execute(
        f"SELECT {_EVENT_COLUMNS} FROM event WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit)
    ).fetchall()
    return [_event(row) for row in rows]


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
    if low is None:
        return 1, 0
    if after:
        low, high = (max(low, after + 1), high) if ascending else (low, min(high, after - 1))
    return low, high


def events_within(
    db: sqlite3.Connection, wanted: EventFilter, low: int, high: int, limit: int, ascending: bool
) -> tuple[list[StoredEvent], int]:
    """The first that match between two numbers, and the end of the window that was searched."""
    where = ["seq BETWEEN :low AND :high"]
    values: dict[str, object] = {"low": low, "high": high, "limit": limit, "width": _WINDOW}
    if wanted.begin is not None:
        where.append("at >= :begin")
        values["begin"] = micros(wanted.begin)
    if wanted.end is not None:
        where.append("at <= :end")
        values["end"] = micros(wanted.end)
    if wanted.names:
        where.append("name IN (SELECT value FROM json_each(:names))")
        values["names"] = json.dumps(sorted(wanted.names))
    if wanted.sender:
        where.append(is_one_of("sender", spellings(wanted.sender), values))
    if wanted.sender_domain:
        where.append(
            "EXISTS (SELECT 1 FROM json_each(:sender_domain)"
            " WHERE lower(substr(sender, -length(value))) = value)"
        )
        domains = domain_spellings(wanted.sender_domain)
        values["sender_domain"] = json.dumps([f"@{domain}" for domain in domains])
    if wanted.recipient_domain:
        where.append(_HAS_RECIPIENT_IN)
        domains = domain_spellings(wanted.recipient_domain)
        values["recipient_domain"] = json.dumps([f"@{domain}" for domain in domains])
    for number, (field, value) in enumerate(wanted.fields):
        where.append(_FIELD_IS[field].replace(":value", f":field{number}"))
        values[f"field{number}"] = value
    source, narrow = "event NOT INDEXED", ""
    if wanted.recipient:
        is_recipient = is_one_of("recipient", spellings(wanted.recipient), values)
        narrow = f" AND {is_recipient} AND recipient <> ''"  # so that the partial index can serve
        source = "event INDEXED BY event_recipient"
    if wanted.queue_id:
        narrow += " AND queue_id = :queue_id"
        source, values["queue_id"] = "event INDEXED BY event_queue_id", wanted.queue_id
    last, order = ("max", "ASC") if ascending else ("min", "DESC")
    reached, seen = db.execute(
        f"SELECT {last}(seq), count(*) FROM (SELECT seq FROM {source}"
        f" WHERE seq BETWEEN :low AND :high{narrow} ORDER BY seq {order} LIMIT :width)",
        values,
    ).fetchone()
    if seen < _WINDOW:
        reached = high if ascending else low
    values["low" if not ascending else "high"] = reached
    rows = db.execute(
        f"SELECT {_EVENT_COLUMNS} FROM {source} WHERE {' AND '.join(where)}{narrow}"
        f" ORDER BY seq {order} LIMIT :limit",
        values,
    ).fetchall()
    return [_event(row) for row in rows], reached
