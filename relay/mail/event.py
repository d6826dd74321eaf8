"""An event of the delivery log, as the queue keeps it and the log writes it.

`relay.report.deliverylog` alone composes events; the store commits each one in the
transaction of the result it tells of and gives it a sequence number then. The named
fields are what events are searched by; `line` is the whole of it, one JSON object
in ASCII without a line end. `counted` is what the event adds to the statistics
(`relay.queue.statistics`); it is not kept with the event.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

__all__ = ["Counted", "Event", "Protection", "Result"]


class Result(StrEnum):
    """What became of a recipient's mail, as it is counted."""

    ACCEPTED = "accepted"
    DELIVERED = "delivered"
    DEFERRED = "deferred"
    """One attempt that failed and will be made again."""
    FAILED = "failed"


class Protection(StrEnum):
    """How a message went to the next hop."""

    VERIFIED = "verified"
    """In TLS, and the host's certificate was good."""
    ENCRYPTED = "encrypted"
    """In TLS with a host that proved nothing."""
    CLEAR = "clear"
    NOT_SENT = "not-sent"


class Counted(NamedTuple):
    """How many recipients of two domains had one result. `exception`: the sentence to be kept where
    it was not delivery over verified TLS; "" for none.
    """

    sender_domain: str
    recipient_domain: str
    result: Result
    protection: str
    policy: str
    reason: str = ""
    number: int = 1
    exception: str = ""


@dataclass(frozen=True, slots=True)
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
