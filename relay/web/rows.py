"""An event as a row of the log. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from relay.mail.duration import duration_text
from relay.mail.event import Event
from relay.mail.jsontext import JsonFields
from relay.report.words import operator_text, protection_of, sentence_of, shown_name
from relay.web.facts import FactGroup, groups_of


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of the log. `kind`: accepted, delivered, deferred, failed, operator."""

    seq: int
    at: datetime
    kind: str
    protection: str
    queue_id: str
    sender: str
    targets: str
    subject: str
    sentence: str
    again: str
    groups: tuple[FactGroup, ...]
    event: JsonFields


def row_of(seq: int, event: Event) -> EventRow:
    """The row of an event."""
    line = json.loads(event.line)
    envelope = line.get("envelope", {})
    kind = shown_name(line)
    is_operator = kind == "operator"
    return EventRow(
        seq=seq,
        at=event.at,
        kind=kind,
        protection="" if is_operator else protection_of(line) or "",
        queue_id=event.queue_id,
        sender=str(envelope.get("sender", "")) or ("" if is_operator else "<>"),
        targets=str(envelope.get("targets", "")),
        subject=str(line.get("message", {}).get("headers", {}).get("subject", "")),
        sentence=operator_text(line) if is_operator else _sentence(line),
        again=_again(line),
        groups=() if is_operator else groups_of(line),
        event=line,
    )


def _sentence(line: JsonFields) -> str:
    if line["event"] != "accepted":
        return sentence_of(line)
    client = str(line.get("client", ""))
    count = int(line.get("recipients", 1))
    number = "1 recipient" if count == 1 else f"{count} recipients"
    return f"from {client}, {number}" if client else number


def _again(line: JsonFields) -> str:
    seconds = line.get("delivery-status", {}).get("retry-seconds")
    return duration_text(seconds) if seconds else ""
