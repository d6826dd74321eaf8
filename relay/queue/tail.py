"""The newest events, in memory: those that follow the log need no look at the store. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from relay.queue.store import StoredEvent

_MOST = 4096


class EventTail:
    """Events in the order of their commits, without gaps in their numbers."""

    def __init__(self) -> None:
        self._events: list[StoredEvent] = []

    def add(self, stored: Sequence[StoredEvent]) -> None:
        """These were committed."""
        if not stored:
            return
        follows = not self._events or stored[0].seq == self._events[-1].seq + 1
        if not follows or stored[-1].seq - stored[0].seq + 1 != len(stored):
            self._events.clear()  # a gap: those that follow the log look at the store
            return
        self._events += stored
        if len(self._events) > 2 * _MOST:
            del self._events[:-_MOST]

    def after(self, seq: int, limit: int) -> list[StoredEvent] | None:
        """The events after `seq`; None where they begin before those that are here."""
        if not self._events or seq + 1 < self._events[0].seq:
            return None
        start = seq + 1 - self._events[0].seq
        return self._events[start : start + limit]

    def clear(self) -> None:
        """Some were removed."""
        self._events.clear()
