"""The story of a message, made of its events and, while it is queued, of the queue. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from relay.mail.jsontext import JsonFields
from relay.queue.entry import TLS_REPORT
from relay.web.facts import rule_text, setting_text
from relay.web.rows import EventRow


@dataclass(slots=True)
class RecipientStory:
    """A recipient of a message, with all attempts."""

    address: str
    policy: str = ""
    attempts: list[EventRow] = field(default_factory=list)
    state: str = ""
    next_attempt: datetime | None = None

    @property
    def outcome(self) -> str:
        """The state in the queue, or else the result of the last attempt."""
        return self.state or (self.attempts[-1].kind if self.attempts else "unknown")


@dataclass(slots=True)
class Story:
    """A message from its acceptance to its end. `about`: the queue id of the message that it
    reports on. `reports`: the acceptances of the reports on this message.
    """

    queue_id: str
    sender: str = ""
    subject: str = ""
    message_id: str = ""
    from_: str = ""
    to: str = ""
    size_bytes: int = 0
    client: str = ""
    client_tls: str = ""
    client_user: str = ""
    origin: str = ""
    about: str = ""
    accepted: datetime | None = None
    recipients: dict[str, RecipientStory] = field(default_factory=dict)
    header: str = ""
    is_queued: bool = False
    reports: tuple[EventRow, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether the relay itself composed the message."""
        return self.origin in _OWN


_OWN = ("dsn", TLS_REPORT)


def story_of(
    queue_id: str,
    rows: Sequence[EventRow],
    item: JsonFields | None,
    reports: Sequence[EventRow] = (),
) -> Story | None:
    """The story; None where neither the events nor the queue have the message."""
    if not rows and item is None:
        return None
    story = Story(queue_id, reports=tuple(reports))
    for row in rows:
        _tell(story, row)
    if item is not None:
        _add_item(story, item)
    return story


def _tell(story: Story, row: EventRow) -> None:
    line = row.event
    headers = line["message"]["headers"]
    story.sender, story.subject = row.sender, headers["subject"]
    story.message_id, story.from_, story.to = headers["message-id"], headers["from"], headers["to"]
    story.size_bytes = line["message"]["size"]
    if row.kind == "accepted":
        story.accepted = row.at
        story.client, story.origin = str(line.get("client", "")), str(line.get("method", ""))
        story.client_tls = str(line.get("client-tls", ""))
        story.client_user = str(line.get("client-user", ""))
        story.about = str(line.get("about", ""))
        for address in row.targets.split(","):
            one = story.recipients.setdefault(address, RecipientStory(address))
            if "policy" in line:
                one.policy = rule_text(line)
            elif policy := line.get("policies", {}).get(address.rpartition("@")[2].lower()):
                one.policy = setting_text(policy)
        return
    one = story.recipients.setdefault(line["recipient"], RecipientStory(line["recipient"]))
    one.policy = rule_text(line)
    one.attempts.append(row)


def _add_item(story: Story, item: JsonFields) -> None:
    story.is_queued = True
    story.sender = item["sender"] or "<>"
    story.size_bytes, story.header = item["size"], item["header"]
    story.client, story.origin = item["client"], item["origin"]
    story.client_tls, story.client_user = item["client-tls"], item["client-user"]
    story.accepted = story.accepted or datetime.fromisoformat(item["arrived"]).astimezone(UTC)
    message = item["message"]
    story.subject, story.message_id = message["subject"], message["message-id"]
    story.from_, story.to = message["from"], message["to"]
    rules = {one["recipient"]: one for one in item["settings"]}
    for said in item["recipients"]:
        one = story.recipients.setdefault(said["address"], RecipientStory(said["address"]))
        one.state = said["state"]
        due = said["next-attempt"]
        one.next_attempt = datetime.fromisoformat(due) if due else None
        if rule := rules.get(said["address"]):
            one.policy = setting_text(rule)
