"""The delivery log: its dictionary, and the file it is written to.

`dictionary` has one function for each thing the log tells, and is pure. `file` appends
the lines of what the store committed, and is the only part that touches the disk.
"""

from __future__ import annotations

from relay.report.deliverylog.dictionary import (
    accepted,
    operated,
    removed,
    settled,
    taken_in,
)
from relay.report.deliverylog.file import DeliveryLog, EventSource, NumberedEvent

__all__ = [
    "DeliveryLog",
    "EventSource",
    "NumberedEvent",
    "accepted",
    "operated",
    "removed",
    "settled",
    "taken_in",
]
