"""The delivery log: its dictionary, and the file it is written to.

`dictionary` composes the events and is pure. `file` appends the lines of the events that the store
has committed; only it uses the disk.
"""

from __future__ import annotations

from relay.report.deliverylog.dictionary import (
    accepted,
    accepted_events,
    operated,
    removed,
    settled,
)
from relay.report.deliverylog.file import DeliveryLog, EventSource, NumberedEvent

__all__ = [
    "DeliveryLog",
    "EventSource",
    "NumberedEvent",
    "accepted",
    "accepted_events",
    "operated",
    "removed",
    "settled",
]
