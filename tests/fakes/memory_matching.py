"""What the filters of `relay.queue.store` mean, for the store in memory."""

from __future__ import annotations

import json
from datetime import datetime

from relay.mail.address import domain_spellings, spellings
from relay.mail.event import Event
from relay.queue.entry import QueuedMessage, QueuedRecipient
from relay.queue.store import EventFilter, QueueFilter


def message_matches(message: QueuedMessage, wanted: QueueFilter, now: datetime) -> bool:
    return (
        (not wanted.queue_ids or message.queue_id in wanted.queue_ids)
        and (not wanted.sender or message.reverse_path.lower() in spellings(wanted.sender))
        and (wanted.older_than is None or message.arrived <= now - wanted.older_than)
    )


def recipient_matches(one: QueuedRecipient, wanted: QueueFilter) -> bool:
    return (not wanted.domain or one.domain.lower() in domain_spellings(wanted.domain)) and (
        wanted.state is None or one.state is wanted.state
    )


def event_matches(event: Event, wanted: EventFilter) -> bool:
    sender_domain = event.sender.lower().rpartition("@")[2]
    return (
        (wanted.begin is None or event.at >= wanted.begin)
        and (wanted.end is None or event.at <= wanted.end)
        and (not wanted.names or event.name in wanted.names)
        and (
            not wanted.recipient
            or (event.recipient != "" and event.recipient.lower() in spellings(wanted.recipient))
        )
        and (not wanted.sender or event.sender.lower() in spellings(wanted.sender))
        and (not wanted.queue_id or event.queue_id == wanted.queue_id)
        and (not wanted.sender_domain or sender_domain in domain_spellings(wanted.sender_domain))
        and (
            not wanted.recipient_domain
            or any(
                recipient.rpartition("@")[2].lower() in domain_spellings(wanted.recipient_domain)
                for recipient in _recipients(event)
            )
        )
        and all(_field_matches(json.loads(event.line), *one) for one in wanted.fields)
    )


def _recipients(event: Event) -> list[str]:
    if event.recipient:
        return [event.recipient]
    return str(json.loads(event.line).get("envelope", {}).get("targets", "")).split(",")


def _field_matches(line: dict[str, object], name: str, value: str) -> bool:
    if name == "severity":
        return line.get("severity") == value
    if name == "tag":
        tags = line.get("tags")
        return isinstance(tags, list) and value in tags
    message = line.get("message")
    headers = message.get("headers") if isinstance(message, dict) else None
    text = str(headers.get(name, "")) if isinstance(headers, dict) else ""
    return text == value if name == "message-id" else value.lower() in text.lower()
