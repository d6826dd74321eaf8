"""An event as a row of the log, and the story of a message from its events. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from relay.mail.event import Event
from relay.report.words import operator_text, protection_of, sentence_of, shown_name

__all__ = ["Recipient", "Row", "Story", "row_of", "setting_text", "story_of"]

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """What a row shows. `kind`: accepted, delivered, deferred, failed, operator."""

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
    facts: tuple[tuple[str, str], ...]
    event: Fields


def row_of(seq: int, event: Event) -> Row:
    """The row of an event."""
    line = json.loads(event.line)
    envelope = line.get("envelope", {})
    kind = shown_name(line)
    is_operator = kind == "operator"
    return Row(
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
        facts=() if is_operator else tuple(_facts(line)),
        event=line,
    )


def _sentence(line: Fields) -> str:
    if line["event"] != "accepted":
        return sentence_of(line)
    client = str(line.get("client", ""))
    count = int(line.get("recipients", 1))
    said = "1 recipient" if count == 1 else f"{count} recipients"
    return f"from {client}, {said}" if client else said


def _again(line: Fields) -> str:
    seconds = line.get("delivery-status", {}).get("retry-seconds")
    return _span(int(seconds)) if seconds else ""


def _span(seconds: int) -> str:
    """A duration as a person says it."""
    for length, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            count = round(seconds / length)
            return f"{count} {name}{'s' if count != 1 else ''}"
    return f"{seconds} seconds"


def setting_text(policy: Fields) -> str:
    """Both settings with who spoke for them."""
    return ", ".join(
        f"{name.replace('-', '_')}: {'true' if policy[name] else 'false'}"
        f" ({policy[f'{name}-source']})"
        for name in ("require-tls", "skip-verification")
    )


_FACTS = (
    ("Host", "mx-host"),
    ("Address", "mx-ip"),
    ("TLS version", "tls-version"),
    ("Cipher", "tls-cipher"),
    ("Verified by", "verified-by"),
    ("Reply code", "code"),
    ("Enhanced status", "enhanced-code"),
    ("Reply", "message"),
    ("Description", "description"),
    ("No DKIM signature", "dkim-unsigned"),
    ("Attempt", "attempt-no"),
)


def _facts(line: Fields) -> list[tuple[str, str]]:
    """What a row shows when it is opened."""
    headers = line.get("message", {}).get("headers", {})
    found = [
        ("Subject", headers.get("subject")),
        ("Message-ID", headers.get("message-id")),
        ("Size", f"{line['message']['size']:,} octets" if "message" in line else None),
        ("Rule", setting_text(line["policy"]) if "policy" in line else None),
    ]
    status = line.get("delivery-status", {})
    found += [(name, status.get(key)) for name, key in _FACTS]
    if downgrade := status.get("downgrade"):
        found.append(("Downgrade", f"from {downgrade['from']}: {downgrade['error']}"))
    published = [status.get(f"policy-{part}") for part in ("type", "mode", "result")]
    if published[0] not in (None, "no-policy-found"):
        found.append(("Published policy", ", ".join(str(one) for one in published if one)))
    if certificate := status.get("certificate"):
        found += [
            ("Certificate of", certificate["subject"]),
            ("issued by", certificate["issuer"]),
            ("for", ", ".join(certificate["names"])),
            ("valid", f"{certificate['not-before']} to {certificate['not-after']}"),
            ("SHA-256", certificate["sha256"]),
        ]
    if "session-seconds" in status:
        found.append(("Session", f"{status['session-seconds']} s"))
    found += [("Host tried before", host) for host in status.get("hosts", ())]
    return [(name, str(value)) for name, value in found if value not in (None, "", 0)]


@dataclass(slots=True)
class Recipient:
    """A recipient of a message, with each attempt."""

    address: str
    policy: str = ""
    attempts: list[Row] = field(default_factory=list)
    state: str = ""
    next_attempt: datetime | None = None

    @property
    def outcome(self) -> str:
        """The state now: that of the queue, or what the last attempt came to."""
        return self.state or (self.attempts[-1].kind if self.attempts else "unknown")


@dataclass(slots=True)
class Story:
    """A message from its acceptance to its end."""

    queue_id: str
    sender: str = ""
    subject: str = ""
    message_id: str = ""
    from_: str = ""
    to: str = ""
    size_bytes: int = 0
    client: str = ""
    origin: str = ""
    accepted: datetime | None = None
    recipients: dict[str, Recipient] = field(default_factory=dict)
    header: str = ""
    is_queued: bool = False


def story_of(queue_id: str, rows: Sequence[Row], item: Fields | None) -> Story | None:
    """The story, from the events that are kept and, while it is queued, from the queue."""
    if not rows and item is None:
        return None
    story = Story(queue_id)
    for row in rows:
        _tell(story, row)
    if item is not None:
        _add_item(story, item)
    return story


def _tell(story: Story, row: Row) -> None:
    line = row.event
    headers = line["message"]["headers"]
    story.sender, story.subject = row.sender, headers["subject"]
    story.message_id, story.from_, story.to = headers["message-id"], headers["from"], headers["to"]
    story.size_bytes = line["message"]["size"]
    if row.kind == "accepted":
        story.accepted = row.at
        story.client, story.origin = str(line.get("client", "")), str(line.get("method", ""))
        for address in row.targets.split(","):
            one = story.recipients.setdefault(address, Recipient(address))
            if "policy" in line:
                one.policy = setting_text(line["policy"])
            elif policy := line.get("policies", {}).get(address.rpartition("@")[2].lower()):
                one.policy = setting_text(policy)
        return
    one = story.recipients.setdefault(line["recipient"], Recipient(line["recipient"]))
    one.policy = setting_text(line["policy"])
    one.attempts.append(row)


def _add_item(story: Story, item: Fields) -> None:
    story.is_queued = True
    story.sender = item["sender"] or "<>"
    story.size_bytes, story.header = item["size"], item["header"]
    story.client, story.origin = item["client"], item["origin"]
    story.accepted = story.accepted or datetime.fromisoformat(item["arrived"]).astimezone(UTC)
    message = item["message"]
    story.subject, story.message_id = message["subject"], message["message-id"]
    story.from_, story.to = message["from"], message["to"]
    rules = {one["recipient"]: one for one in item["settings"]}
    for said in item["recipients"]:
        one = story.recipients.setdefault(said["address"], Recipient(said["address"]))
        one.state = said["state"]
        due = said["next-attempt"]
        one.next_attempt = datetime.fromisoformat(due) if due else None
        if rule := rules.get(said["address"]):
            one.policy = _rule_text(rule)


def _rule_text(rule: Fields) -> str:
    parts = []
    for name in ("require-tls", "skip-verification"):
        source, named = rule[f"{name}-source"], rule[f"{name}-rule"]
        who = source if named in ("", source) else f"{source} {named}"
        parts.append(f"{name.replace('-', '_')}: {'true' if rule[name] else 'false'} ({who})")
    return ", ".join(parts)
