"""How often a password or a key may be wrong before its client has to wait, and who is one client.
Pure.
"""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta
from typing import Protocol

from relay.mail.ip import canonical

__all__ = ["FailedElsewhere", "Failures", "counted_as"]


class FailedElsewhere(Protocol):
    """The wrong passwords that other workers of this node were told."""

    def failures_of(self, client: str, since: datetime) -> int:
        """How many of a client, if the last of them was not before `since`."""

    def failed(self, client: str, count: int, now: datetime) -> None:
        """Tell them how many there are here now."""


class Failures:
    """Wrong passwords by client, forgotten with time; too many, and the client has to wait.

    Bounded: beyond `remembered` clients the oldest is forgotten first. `total`: all there ever
    were.
    """

    def __init__(
        self,
        *,
        tolerated: int = 10,
        window: timedelta = timedelta(minutes=10),
        remembered: int = 10_000,
        elsewhere: FailedElsewhere | None = None,
    ) -> None:
        self._tolerated = tolerated
        self._window = window
        self._remembered = remembered
        self._counts: dict[str, tuple[int, datetime]] = {}
        self.total = 0
        self._elsewhere = elsewhere

    def note(self, client: str, now: datetime) -> int:
        """Count a failure; how many there are now."""
        self.total += 1
        count = self._recent(client, now) + 1
        self._counts.pop(client, None)
        self._counts[client] = (count, now)
        if self._elsewhere is not None:
            self._elsewhere.failed(client, count, now)
        if len(self._counts) > self._remembered:
            del self._counts[next(iter(self._counts))]
        return count

    def forgive(self, client: str) -> None:
        """A right password: what came before was a slip."""
        count, last = self._counts.pop(client, (0, None))
        if count and last is not None and self._elsewhere is not None:
            self._elsewhere.failed(client, 0, last)

    def must_wait(self, client: str, now: datetime) -> bool:
        """Whether a password from this client is not even looked at now."""
        count = self._recent(client, now)
        if self._elsewhere is not None:
            count += self._elsewhere.failures_of(client, now - self._window)
        return count >= self._tolerated

    def _recent(self, client: str, now: datetime) -> int:
        count, last = self._counts.get(client, (0, now))
        return count if now - last < self._window else 0


def counted_as(client: str) -> str:
    """A client as it is counted: an IPv4 address; of IPv6 the /64, all of which one client has."""
    client = canonical(client)
    if ":" not in client:
        return client
    return str(ipaddress.IPv6Network((client, 64), strict=False))
