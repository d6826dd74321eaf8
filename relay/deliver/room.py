"""Entries that wait for room at their hosts: how many of them may wait in memory. Pure.

An attempt that finds no room for a connection goes back to the head of its line, and where the
domain's mail leads is remembered for a moment. Where the mail of a next hop leads is known from the
configuration: none of its entries is tried before there is room for it. More entries than have a
connection soon (`Destinations.patience`) are given back to the queue, so that they keep no slot
from others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf

from relay.deliver.destinations import Destinations, NotNow, Use
from relay.deliver.hop_limits import Holder
from relay.deliver.lines import Lines, Rank, line_of_hop
from relay.mail.outcome import Code, Deferred
from relay.queue.entry import Entry
from relay.route.next_hop import NextHop

_MOST_TURNED_AWAY = 10
"""How often an entry is tried again at once after a host turned its connection away."""

_BOUND_SECONDS = 5.0
"""How long a domain's mail is taken to lead where it led."""


class Room:
    """What waits in `lines` for a connection. `leads_to`: the operator's next hop for an entry;
    None where the DNS says where its mail goes.
    """

    def __init__(
        self,
        lines: Lines,
        destinations: Destinations,
        monotonic: Callable[[], float],
        leads_to: Callable[[Entry], NextHop | None] = lambda entry: None,
    ) -> None:
        self._lines = lines
        self._destinations = destinations
        self._monotonic = monotonic
        self._leads_to = leads_to
        self._turned_away: Counter[Holder] = Counter()
        self._hops: dict[str, NextHop] = {}
        """By line, as the configuration was when an entry came last."""
        self._limited: dict[str, NextHop] = {}
        """Those of them that the operator has limited."""
        destinations.limits.waiting = lambda name: lines.length(line_of_hop(name))

    def line_of(self, entry: Entry) -> str:
        """The line that an entry waits in."""
        hop = self._leads_to(entry)
        if hop is None:
            return entry.domain
        line = line_of_hop(hop.name)
        if self._hops.get(line) is not hop:
            self._hops[line] = hop
            self._limited.pop(line, None)
            if hop.is_limited:
                self._limited[line] = hop
            self._lines.bind(line, (hop.destination,), inf)
        return line

    def part_of(self, line: str) -> int:
        """How many attempts a line may have; 0: it is not this node's."""
        hop, parts = self._hops.get(line), self._destinations.parts
        return parts.of_domain(line) if hop is None else parts.of_hop(hop)

    def limited_lines(self) -> list[str]:
        """The lines of next hops whose operator has limited them."""
        return list(self._limited)

    def forget_hops(self) -> None:
        """Routes have changed: no line leads to a next hop, for all that is known."""
        for line in self._hops:
            self._lines.unbind(line)
        self._hops.clear()
        self._limited.clear()

    def needs_no_connection(self, line: str) -> bool:
        """Whether an attempt gets on without a reserved connection: it is not known where a line's
        mail leads, or one of its destinations is silent, which ends the attempt at once.
        """
        names, silence_of = self._names(line), self._destinations.silence_of
        return not names or any(silence_of(name) is not None for name in names)

    def reserve(self, line: str, entry: Entry) -> Use | None:
        """Take a connection for an entry at the first of its destinations that has room."""
        return self._destinations.reserve(self._names(line), entry.key, self._hops.get(line))

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
        line = self.line_of(entry)
        if line not in self._hops:
            self._lines.bind(line, why.names, self._monotonic() + _BOUND_SECONDS)
        self._lines.add(line, entry, rank, at_head=True)

    def has_short_line(self, line: str) -> bool:
        """Whether so few wait in a line that it is time to claim more."""
        if 2 * self._lines.length(line) >= self.part_of(line):
            return False
        names = self._names(line)
        return not names or any(self._excess_at(line, name) < 0 for name in names)

    def has_excess(self, lines: Iterable[str]) -> bool:
        """Whether more wait in one of these lines of next hops than have a connection soon."""
        return any(self._excess(line) > 0 for line in lines if line in self._hops)

    def take_excess(self) -> list[tuple[Entry, float, Deferred]]:
        """Take out of the lines what would wait for long.

        With each entry: in how many seconds it is to come again, and its outcome if its sender is
        to hear of it before.
        """
        if not self._lines.waits_for_room:
            return []
        taken = []
        for line in self._lines.names():
            names, hop = self._names(line), self._hops.get(line)
            for entry in self._lines.pop_last(line, max(self._excess(line), 0)):
                seconds = min(self._destinations.next_turn(name, hop) for name in names)
                taken.append((entry, seconds, _no_room(names)))
        return taken

    def room_in(self) -> float | None:
        """In how many seconds one of the next hops that mail waits for is to be asked again."""
        if not self._limited:
            return None
        limits, length = self._destinations.limits, self._lines.length
        found = (limits.room_in(hop.name) for line, hop in self._limited.items() if length(line))
        return min((seconds for seconds in found if seconds is not None), default=None)

    def _names(self, line: str) -> tuple[str, ...]:
        """The destinations that a line's mail leads to, as far as that is known."""
        return self._lines.destinations(line, self._monotonic())

    def _excess(self, line: str) -> int:
        """How many entries of a line more wait than have a connection soon."""
        return min((self._excess_at(line, name) for name in self._names(line)), default=0)

    def _excess_at(self, line: str, name: str) -> int:
        """The same at one destination, with those of other lines that lead to it."""
        hop = self._hops.get(line)
        if hop is not None and hop.is_limited:
            return self._lines.length(line) - self._destinations.patience(name, hop)
        waiting = self._lines.waiting_at(name)
        return waiting - self._destinations.patience(name) if waiting else -1


def _no_room(names: Sequence[str]) -> Deferred:
    """The outcome of a message that still waits for a connection when a notice to it is due."""
    text = f"not tried: {' and '.join(names)} had no room for another connection"
    # RFC 3463 §3.5: X.4.5 is a mail system that is congested.
    return Deferred("4.4.5", Code.NO_CONNECTION, "", text)
