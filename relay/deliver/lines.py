"""Claimed entries that wait for a place, each in the line of its domain. Pure.

The lines of domains that answered lately (proven) and those of all others are kept apart, and
within each of both the domains take turns. Where a domain's mail leads to is remembered once it had
to wait for a connection there, so that the entries that wait for a destination can be counted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from relay.queue.entry import Entry

__all__ = ["Lines"]

_MOST_BOUND = 10_000

_Line = deque[Entry]


class Lines:
    """The entries that wait. `is_proven` says of which domains."""

    def __init__(self) -> None:
        self._lines: dict[bool, dict[str, _Line]] = {True: {}, False: {}}
        self._waiting = {True: 0, False: 0}
        self._waiting_at: Counter[str] = Counter()
        self._bound: dict[str, tuple[tuple[str, ...], float]] = {}

    def __len__(self) -> int:
        """How many entries wait."""
        return self._waiting[True] + self._waiting[False]

    def waiting(self, is_proven: bool) -> int:
        """How many entries wait of one class of domains."""
        return self._waiting[is_proven]

    def waiting_at(self, name: str) -> int:
        """How many entries wait that are known to lead to a destination."""
        return self._waiting_at[name]

    def length(self, domain: str) -> int:
        """How many entries wait for a domain."""
        return len(self._line(domain)[1])

    def domains(self) -> list[str]:
        """The domains that entries wait for."""
        return [*self._lines[True], *self._lines[False]]

    def turns(self, is_proven: bool) -> Iterator[str]:
        """Each domain of a class once; those that were asked go behind the others."""
        lines = self._lines[is_proven]
        for _ in range(len(lines)):
            domain = next(iter(lines))
            lines[domain] = lines.pop(domain)
            yield domain

    def add(self, entry: Entry, *, is_proven: bool, at_head: bool = False) -> None:
        """Let an entry wait at the end of its line, or at its head again."""
        domain = entry.domain
        self.classify(domain, is_proven)
        line = self._lines[is_proven].setdefault(domain, deque())
        if at_head:
            line.appendleft(entry)
        else:
            line.append(entry)
        self._count(domain, is_proven, 1)

    def pop(self, domain: str) -> Entry:
        """The entry at the head of a line."""
        is_proven, line = self._line(domain)
        entry = line.popleft()
        if not line:
            del self._lines[is_proven][domain]
        self._count(domain, is_proven, -1)
        return entry

    def pop_last(self, domain: str, count: int) -> list[Entry]:
        """So many of the entries at the end of a line, those at its very end first."""
        is_proven, line = self._line(domain)
        popped = [line.pop() for _ in range(min(count, len(line)))]
        if not line:
            self._lines[is_proven].pop(domain, None)
        self._count(domain, is_proven, -len(popped))
        return popped

    def pop_all(self, domain: str) -> list[Entry]:
        """All that wait for a domain."""
        return self.pop_last(domain, self.length(domain))[::-1]

    def classify(self, domain: str, is_proven: bool) -> None:
        """A domain is of this class from now on."""
        line = self._lines[not is_proven].pop(domain, None)
        if line is not None:
            self._lines[is_proven][domain] = line
            self._waiting[not is_proven] -= len(line)
            self._waiting[is_proven] += len(line)

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

    def _line(self, domain: str) -> tuple[bool, _Line]:
        for is_proven, lines in self._lines.items():
            if (line := lines.get(domain)) is not None:
                return is_proven, line
        return False, deque()

    def _count(self, domain: str, is_proven: bool, change: int) -> None:
        self._waiting[is_proven] += change
        if domain in self._bound:
            self._count_at(domain, change)

    def _count_at(self, domain: str, change: int) -> None:
        for name in self._bound.get(domain, ((), 0.0))[0]:
            self._waiting_at[name] += change
            if not self._waiting_at[name]:
                del self._waiting_at[name]
