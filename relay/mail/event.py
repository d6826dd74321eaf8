"""An event of the delivery log, as the queue keeps it and the log writes it.

`relay.report.deliverylog` alone composes events; the store commits each one in the
transaction of the result it tells of and gives it a sequence number then. The named
fields are what events are searched by; `line` is the whole of it, one JSON object
in ASCII without a line end.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

__all__ = ["Event"]


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
