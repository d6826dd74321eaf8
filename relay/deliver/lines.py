"""Claimed entries that wait for a place, each in the line of its domain. Pure.

The lines are of three classes (`Rank`), and within each class the domains take turns. Once a
domain's mail had to wait for a connection to a destination, the domain is bound to it, so that the
entries that wait for the destination can be counted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from relay.queue.entry import Entry

__all__ = ["Lines", "Rank"]

_MOST_BOUND = 10_000


class Rank(IntEnum):
    """The class of domains that a line belongs to."""

    PROVEN = 0
    """Domains whose hosts answered recently."""
    NEW = 1
    """Domains whose hosts did not answer recently, or were not tried."""
    BULK = 2
    """Like `NEW`, where each waiting message is for very many domains."""


@dataclass(eq=False, slots=True)
class _Line:
    rank: Rank
    entries: deque[Entry]


class Lines:
    """The entries that wait."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._turns: dict[Rank, dict[str, None]] = {rank: {} for rank in Rank}
        self._waiting = dict.fromkeys(Rank, 0)
        self._waiting_at: Counter[str] = Counter()
        self._bound: dict[str, tuple[tuple[str, ...], float]] = {}

    def __len__(self) -> int:
        """How many entries wait."""
        return sum(self._waiting.values())

    def __bool__(self) -> bool:
        """Whether any waits."""
        return bool(self._lines)

    def waiting(self, *ranks: Rank) -> int:
        """How many entries wait of some classes of domains."""
        return sum(self._waiting[rank] for rank in ranks)

    def waiting_at(self, name: str) -> int:
        """How many entries wait that are known to lead to a destination."""
        return self._waiting_at[name]

    @property
    def waits_for_room(self) -> bool:
        """Whether any entry is known to lead to a destination."""
        return bool(self._waiting_at)

    def length(self, domain: str) -> int:
        """How many entries wait for a domain."""
        line = self._lines.get(domain)
        return 0 if line is None else len(line.entries)

    def domains(self) -> list[str]:
        """The domains that entries wait for."""
        return list(self._lines)

    def turns(self, rank: Rank) -> Iterator[str]:
        """Each domain of a class once; those that were asked go behind the others."""
        turns = self._turns[rank]
        for _ in range(len(turns)):
            domain = next(iter(turns))
            del turns[domain]
            turns[domain] = None
            yield domain

    def add(self, entry: Entry, rank: Rank, *, at_head: bool = False) -> None:
        """Let an entry wait at the end of its line, or at its head again. The line has the best
        rank of its entries.
        """
        domain = entry.domain
        line = self._lines.get(domain)
        if line is None:
            line = self._lines[domain] = _Line(rank, deque())
            self._turns[rank][domain] = None
        elif rank < line.rank:
            self.classify(domain, rank)
        if at_head:
            line.entries.appendleft(entry)
        else:
            line.entries.append(entry)
        self._count(domain, line, 1)

    def pop(self, domain: str) -> Entry:
        """The entry at the head of a line."""
        line = self._lines[domain]
        entry = line.entries.popleft()
        self._left(domain, line, 1)
        return entry

    def pop_last(self, domain: str, count: int) -> list[Entry]:
        """So many of the entries at the end of a line, those at its very end first."""
        line = self._lines.get(domain)
        if line is None:
            return []
        popped = [line.entries.pop() for _ in range(min(count, len(line.entries)))]
        self._left(domain, line, len(popped))
        return popped

    def pop_all(self, domain: str) -> list[Entry]:
        """All that wait for a domain."""
        return self.pop_last(domain, self.length(domain))[::-1]

    def classify(self, domain: str, rank: Rank) -> None:
        """A domain's line is of this class from now on."""
        line = self._lines.get(domain)
        if line is None or line.rank is rank:
            return
        del self._turns[line.rank][domain]
        self._turns[rank][domain] = None
        self._waiting[line.rank] -= len(line.entries)
        self._waiting[rank] += len(line.entries)
        line.rank = rank

    # --- destinations -----------------------------------------------------------------------------

    def bind(self, domain: str, names: tuple[str, ...], until: float) -> None:
        """A domain's mail leads to these destinations, for all that is known until then."""
        self.unbind(domain)
        self._bound[domain] = names, until
        self._count_at(domain, self.length(domain))
        if len(self._bound) > _MOST_BOUND:
            self.unbind(next(iter(self._bound)))

    def unbind(self, domain: str) -> None:
        """It is not known where a domain's mail leads."""
        self._count_at(domain, -self.length(domain))
        self._bound.pop(domain, None)

    def destinations(self, domain: str, now: float) -> tuple[str, ...]:
        """Where a domain's mail leads, as far as that is known."""
        bound = self._bound.get(domain)
        if bound is None:
            return ()
        names, until = bound
        if now >= until:
            self.unbind(domain)
            return ()
        return names

    # --- counts -----------------------------------------------------------------------------------

    def _left(self, domain: str, line: _Line, count: int) -> None:
        if not line.entries:
            del self._lines[domain], self._turns[line.rank][domain]
        self._count(domain, line, -count)

    def _count(self, domain: str, line: _Line, change: int) -> None:
        self._waiting[line.rank] += change
        if domain in self._bound:
            self._count_at(domain, change)

    def _count_at(self, domain: str, change: int) -> None:
        for name in self._bound.get(domain, ((), 0.0))[0]:
            self._waiting_at[name] += change
            if not self._waiting_at[name]:
                del self._waiting_at[name]
