"""Entries that wait for room at their hosts: how many of them may wait in memory. Pure.

An attempt that finds no room for a connection goes back to the head of its line, and where the
domain's mail leads is remembered for a moment. More entries than have a connection soon
(`Destinations.patience`) are given back to the queue, so that they keep no place from others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from relay.deliver.destinations import Destinations, Holder, NotNow, Use
from relay.deliver.lines import Lines, Rank
from relay.mail.outcome import Code, Deferred
from relay.queue.entry import Entry

__all__ = ["Room"]

_MOST_TURNED_AWAY = 10
"""How often an entry is tried again at once after a host turned its connection away."""

_BOUND_SECONDS = 5.0
"""How long a domain's mail is taken to lead where it led."""


class Room:
    """What waits in `lines` for a connection. `most`: `concurrency_per_destination`."""

    def __init__(
        self, lines: Lines, destinations: Destinations, most: int, monotonic: Callable[[], float]
    ) -> None:
        self._lines = lines
        self._destinations = destinations
        self._most = most
        self._monotonic = monotonic
        self._turned_away: Counter[Holder] = Counter()

    def is_to_be_asked(self, domain: str) -> bool:
        """Whether an attempt gets on at one of a domain's destinations, or none is known."""
        names = self._names(domain)
        return not names or any(map(self._destinations.is_to_be_asked, names))

    def reserve(self, entry: Entry) -> Use | None:
        """Take a connection for an entry at the first of its destinations that has room."""
        return self._destinations.reserve(self._names(entry.domain), entry.key)

    def was_too_often_turned_away(self, entry: Entry, why: NotNow) -> bool:
        """Count that an entry was turned away; whether that was too often to wait again."""
        if not why.turned_away:
            return False
        self._turned_away[entry.key] += 1
        return self._turned_away[entry.key] > _MOST_TURNED_AWAY

    def forget(self, entry: Entry) -> None:
        """The claim of an entry has ended."""
        self._turned_away.pop(entry.key, None)

    def wait(self, entry: Entry, why: NotNow, rank: Rank) -> None:
        """An entry waits at the head of its line."""
        self._lines.bind(entry.domain, why.names, self._monotonic() + _BOUND_SECONDS)
        self._lines.add(entry, rank, at_head=True)

    def has_short_line(self, domain: str) -> bool:
        """Whether so few wait for a domain that it is time to claim more."""
        if 2 * self._lines.length(domain) >= self._most:
            return False
        names = self._names(domain)
        return not names or any(self._excess_at(name) < 0 for name in names)

    def take_excess(self) -> list[tuple[Entry, float, Deferred]]:
        """Take out of the lines what would wait for long.

        With each entry: in how many seconds it is to come again, and its outcome if its sender is
        to hear of it before.
        """
        if not self._lines.waits_for_room:
            return []
        taken = []
        for domain in self._lines.domains():
            names = self._names(domain)
            excess = min(map(self._excess_at, names), default=0)
            for entry in self._lines.pop_last(domain, max(excess, 0)):
                seconds = min(map(self._destinations.next_turn, names))
                taken.append((entry, seconds, _no_room(names)))
        return taken

    def _names(self, domain: str) -> tuple[str, ...]:
        """The destinations that a domain's mail leads to, as far as that is known."""
        return self._lines.destinations(domain, self._monotonic())

    def _excess_at(self, name: str) -> int:
        """How many entries more wait for a destination than have a connection soon."""
        waiting = self._lines.waiting_at(name)
        return waiting - self._destinations.patience(name) if waiting else -1


def _no_room(names: Sequence[str]) -> Deferred:
    """The outcome of a message that still waits for a connection when a notice to it is due."""
    text = f"not tried: {' and '.join(names)} had no room for another connection"
    # RFC 3463 §3.5: X.4.5 is a mail system that is congested.
    return Deferred("4.4.5", Code.NO_CONNECTION, "", text)
