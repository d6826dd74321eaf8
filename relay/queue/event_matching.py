"""Whether an event is one that a filter asks for: what `EventFilter` means, for those that follow
the log and see each event once. An engine says the same in its own words. Pure.
"""

from __future__ import annotations

import json

from relay.mail.address import domain_spellings, spellings
from relay.mail.event import Event
from relay.mail.jsontext import JsonFields
from relay.queue.store import EventFilter


def event_matches(event: Event, wanted: EventFilter) -> bool:
    """Every field of the filter that is set has to match. Only some of them need the line read."""
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
        and (
            not wanted.sender_domain
            or event.sender.lower().rpartition("@")[2] in domain_spellings(wanted.sender_domain)
        )
        and (not wanted.recipient_domain or _has_recipient_in(event, wanted.recipient_domain))
        and (not wanted.fields or _fields_match(event, wanted.fields))
    )


def _has_recipient_in(event: Event, domain: str) -> bool:
    if event.recipient:
        recipients = [event.recipient]
    else:
        recipients = str(json.loads(event.line).get("envelope", {}).get("targets", "")).split(",")
    names = domain_spellings(domain)
    return any(recipient.rpartition("@")[2].lower() in names for recipient in recipients)


def _fields_match(event: Event, fields: tuple[tuple[str, str], ...]) -> bool:
    line = json.loads(event.line)
    return all(_field_matches(event, line, name, value) for name, value in fields)


def _field_matches(event: Event, line: JsonFields, name: str, value: str) -> bool:
    headers = line.get("message", {}).get("headers", {})
    match name:
        case "severity":
            return bool(line.get("severity") == value)
        case "about":
            return bool(line.get("about") == value)
        case "tag":
            return value in line.get("tags", ())
        case "message-id":
            return bool(headers.get("message-id") == value)
        case "protection":
            return _protection(event, line.get("delivery-status")) == value
        case "policy-source":
            policy = line.get("policy", {})
            keys = ("require-tls-source", "skip-verification-source")
            return any(policy.get(key) == value for key in keys)
        case "text":
            return value.lower() in _text(event, line).lower()
        case _:
            return value.lower() in str(headers.get(name, "")).lower()


def _protection(event: Event, status: JsonFields | None) -> str:
    if status is None:
        return ""
    if event.name != "delivered" or status.get("tls") is None:
        return "not-sent"
    if not status["tls"]:
        return "clear"
    return "verified" if status.get("certificate-verified") else "encrypted"


def _text(event: Event, line: JsonFields) -> str:
    headers = line.get("message", {}).get("headers", {})
    return " ".join(
        (
            event.queue_id,
            event.id,
            event.sender,
            event.recipient,
            str(line.get("envelope", {}).get("targets", "")),
            str(headers.get("subject", "")),
            str(headers.get("message-id", "")),
        )
    )
