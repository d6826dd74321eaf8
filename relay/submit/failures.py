"""How often a password or a key may be wrong before its client has to wait. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

__all__ = ["Failures"]


class Failures:
    """Wrong passwords by client, forgotten with time; too many, and the client has to wait.

    Bounded: beyond `remembered` clients the oldest is forgotten first. `total`: all there ever were.
    """

    def __init__(
        self,
        *,
        tolerated: int = 10,
        window: timedelta = timedelta(minutes=10),
        remembered: int = 10_000,
    ) -> None:
        self._tolerated = tolerated
        self._window = window
        self._remembered = remembered
        self._counts: dict[str, tuple[int, datetime]] = {}
        self.total = 0

    def note(self, client: str, now: datetime) -> int:
        """Count a failure; how many there are now."""
        self.total += 1
        count = self._recent(client, now) + 1
        self._counts.pop(client, None)
        self._counts[client] = (count, now)
        if len(self._counts) > self._remembered:
            del self._counts[next(iter(self._counts))]
        return count

    def forgive(self, client: str) -> None:
        """A right password: what came before was a slip."""
        self._counts.pop(client, None)

    def must_wait(self, client: str, now: datetime) -> bool:
        """Whether a password from this client is not even looked at now."""
        return self._recent(client, now) >= self._tolerated

    def _recent(self, client: str, now: datetime) -> int:
        count, last = self._counts.get(client, (0, now))
        return count if now - last < self._window else 0
