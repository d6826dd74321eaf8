"""Claimed entries that wait for a slot, each in its line. Pure.

A line is a domain's, or that of a next hop of the operator's, with all mail that leads to it. It
is named by the domain, or by `line_of_hop`. The lines are of three classes (`Rank`), and within
each class they take turns. Once a domain's mail had to wait for a connection to a destination, its
line is bound to it, so that the entries that wait for the destination can be counted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from relay.queue.entry import Entry

_MOST_BOUND = 10_000


_OF_HOP = "next hop "
"""No domain has a space in its name."""


def line_of_hop(name: str) -> str:
    """The name of the line of a next hop."""
    return f"{_OF_HOP}{name}"


def is_of_hop(line: str) -> bool:
    """Whether a line is that of a next hop."""
    return line.startswith(_OF_HOP)


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

    def has(self, rank: Rank) -> bool:
        """Whether any entry waits of a class of domains."""
        return bool(self._turns[rank])

    def waiting(self, *ranks: Rank) -> int:
        """How many entries wait of some classes of domains."""
        return sum(self._waiting[rank] for rank in ranks)

    def waiting_at(self, destination: str) -> int:
        """How many entries wait that are known to lead to a destination."""
        return self._waiting_at[destination]

    @property
    def waits_for_room(self) -> bool:
        """Whether any entry is known to lead to a destination."""
        return bool(self._waiting_at)

    def length(self, name: str) -> int:
        """How many entries wait in a line."""
        line = self._lines.get(name)
        return 0 if line is None else len(line.entries)

    def rank(self, name: str) -> Rank | None:
        """The class of a line; None where nothing waits."""
        line = self._lines.get(name)
        return None if line is None else line.rank

    def names(self) -> list[str]:
        """The lines that entries wait in."""
        return list(self._lines)

    def turns(self, rank: Rank) -> Iterator[str]:
        """Each line of a class once; those that were asked go behind the others."""
        turns = self._turns[rank]
        for _ in range(len(turns)):
            name = next(iter(turns))
            del turns[name]
            turns[name] = None
            yield name

    def add(self, name: str, entry: Entry, rank: Rank, *, at_head: bool = False) -> None:
        """Let an entry wait at the end of a line, or at its head again. The line has the best rank
        of its entries.
        """
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = _Line(rank, deque())
            self._turns[rank][name] = None
        elif rank < line.rank:
            self.classify(name, rank)
        if at_head:
            line.entries.appendleft(entry)
        else:
            line.entries.append(entry)
        self._count(name, line, 1)

    def head(self, name: str) -> Entry:
        """The entry at the head of a line."""
        return self._lines[name].entries[0]

    def bring_forward(self, name: str, may_go: Callable[[Entry], bool]) -> bool:
        """Put the entries before the first that may go behind all others; whether there is one."""
        entries = self._lines[name].entries
        first = next((at for at, entry in enumerate(entries) if may_go(entry)), None)
        if first is None:
            return False
        entries.rotate(-first)
        return True

    def pop(self, name: str) -> Entry:
        """The entry at the head of a line, which leaves it."""
        line = self._lines[name]
        entry = line.entries.popleft()
        self._left(name, line, 1)
        return entry

    def pop_last(self, name: str, count: int) -> list[Entry]:
        """So many of the entries at the end of a line, those at its very end first."""
        line = self._lines.get(name)
        if line is None:
            return []
        popped = [line.entries.pop() for _ in range(min(count, len(line.entries)))]
        self._left(name, line, len(popped))
        return popped

    def pop_all(self, name: str) -> list[Entry]:
        """All that wait in a line."""
        return self.pop_last(name, self.length(name))[::-1]

    def classify(self, name: str, rank: Rank) -> None:
        """A line is of this class from now on."""
        line = self._lines.get(name)
        if line is None or line.rank is rank:
            return
        del self._turns[line.rank][name]
        self._turns[rank][name] = None
        self._waiting[line.rank] -= len(line.entries)
        self._waiting[rank] += len(line.entries)
        line.rank = rank

    # --- destinations -----------------------------------------------------------------------------

    def bind(self, name: str, names: tuple[str, ...], until: float) -> None:
        """A line's mail leads to these destinations, for all that is known until then."""
        self.unbind(name)
        self._bound[name] = names, until
        self._count_at(name, self.length(name))
        if len(self._bound) > _MOST_BOUND:
            oldest = next((one for one in self._bound if not is_of_hop(one)), None)
            if oldest is not None:
                self.unbind(oldest)

    def unbind(self, name: str) -> None:
        """It is not known where a line's mail leads."""
        self._count_at(name, -self.length(name))
        self._bound.pop(name, None)

    def destinations(self, name: str, now: float) -> tuple[str, ...]:
        """Where a line's mail leads, as far as that is known."""
        bound = self._bound.get(name)
        if bound is None:
            return ()
        names, until = bound
        if now >= until:
            self.unbind(name)
            return ()
        return names

    # --- counts -----------------------------------------------------------------------------------

    def _left(self, name: str, line: _Line, count: int) -> None:
        if not line.entries:
            del self._lines[name], self._turns[line.rank][name]
        self._count(name, line, -count)

    def _count(self, name: str, line: _Line, change: int) -> None:
        self._waiting[line.rank] += change
        if name in self._bound:
            self._count_at(name, change)

    def _count_at(self, name: str, change: int) -> None:
        for destination in self._bound.get(name, ((), 0.0))[0]:
            self._waiting_at[destination] += change
            if not self._waiting_at[destination]:
                del self._waiting_at[destination]
