"""An event of the delivery log, as the queue keeps it and the log writes it.

Only `relay.report.deliverylog` composes events. The store commits each event in the same
transaction as the result that it reports, and gives it a sequence number there. A search
goes by the named fields; `line` is the complete event, one JSON object in ASCII without a
line end. `counted` is what the event adds to the statistics (`relay.queue.statistics`); it
is not kept with the event. Where several nodes share a queue, its store adds the name of the node
to the line (`of_node`): nobody else knows it.
"""

from __future__ import annotations

from dataclasses import field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from relay.mail.jsontext import to_json
from relay.mail.record import record


class EventResult(StrEnum):
    """The result for a recipient, as the statistics count it."""

    ACCEPTED = "accepted"
    DELIVERED = "delivered"
    DEFERRED = "deferred"
    """One attempt that failed and will be made again."""
    FAILED = "failed"


class Protection(StrEnum):
    """How a message went to the next hop."""

    VERIFIED = "verified"
    """In TLS with a host whose certificate was verified."""
    ENCRYPTED = "encrypted"
    """In TLS with a host whose certificate was not verified."""
    CLEAR = "clear"
    NOT_SENT = "not-sent"


class Counted(NamedTuple):
    """How many recipients had one result, for one pair of sender domain and recipient domain.

    `exception`: the sentence that the statistics keep where the result was not a delivery over
    verified TLS; "" for none.
    """

    sender_domain: str
    recipient_domain: str
    result: EventResult
    protection: str
    policy: str
    reason: str = ""
    number: int = 1
    exception: str = ""


@record(frozen=True, slots=True)
class Event:
    """One line of the delivery log. `name` is accepted | delivered | failed."""

    id: str
    at: datetime
    name: str
    queue_id: str
    sender: str
    recipient: str
    line: str
    counted: tuple[Counted, ...] = field(default=(), compare=False, repr=False)


def of_node(event: Event, node: str) -> Event:
    """The event with the name of the node that wrote it, in its line as "node".

    The id of an event about a message is not shared with any other. One that is about none has the
    node in its id, too: two nodes may do the same at the same moment.
    """
    event_id, line = event.id, event.line
    if not event.queue_id:
        event_id = f"{event.id}-{node}"
        line = line.replace(f'"id":{to_json(event.id)}', f'"id":{to_json(event_id)}', 1)
    return Event(
        event_id,
        event.at,
        event.name,
        event.queue_id,
        event.sender,
        event.recipient,
        f'{line[:-1]},"node":{to_json(node)}}}',
        event.counted,
    )
