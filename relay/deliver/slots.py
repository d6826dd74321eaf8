"""The attempts under way, and how many of each class of domains there may be.

The classes are those of `relay.deliver.lines`, the shares those of `relay.deliver.pacing`. An
attempt for a proven domain that takes longer than `pacing.LONG` (a second where all slots are
taken) counts with those for others from then on, and its domain is no longer proven. Where hundreds
of proven domains become slow in the same seconds, such attempts have more slots than the others'
share. Those beyond the share are in the way of domains that still answer (`in_the_way`), and the
caller breaks them off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from relay.deliver import pacing
from relay.deliver.lines import Lines, Rank, is_of_hop
from relay.queue.entry import Entry

_MOST_PROVEN = 1000
"""Domains that answered recently; the scheduler asks the store for them by name."""

_LONG_WHERE_FULL = 1.0
"""After so many seconds an attempt takes long where others wait for its slot."""

_EVERY_SECONDS = 0.5
"""Between two looks at what is in the way: what was broken off needs a moment to end."""

A = TypeVar("A")


class Slots(Generic[A]):
    """Counts attempts. `A`: the caller's name of an attempt. `most`: `delivery.concurrency`."""

    def __init__(self, most: int, lines: Lines, monotonic: Callable[[], float]) -> None:
        self._most = most
        self._lines = lines
        self._monotonic = monotonic
        self._proven: dict[str, None] = {}
        self._over_hops: dict[str, None] = {}
        self.attempts: set[A] = set()
        self._prompt: dict[A, tuple[float, str]] = {}
        """Attempts for proven domains that have not taken long yet: when each began."""
        self._long: dict[A, None] = {}
        """Attempts that began for proven domains and take long, the newest at the end."""
        self._bulk: set[A] = set()
        self._looked_at = monotonic() - _EVERY_SECONDS

    @property
    def free(self) -> int:
        """How many more attempts may begin in all."""
        return self._most - len(self.attempts)

    @property
    def proven(self) -> tuple[str, ...]:
        """The domains that answered lately and at once, the one proven last at the end; among them
        those whose mail a proven next hop took.
        """
        return (*self._over_hops, *(line for line in self._proven if not is_of_hop(line)))

    def rank(self, line: str, entry: Entry) -> Rank:
        """The class that an entry of a line belongs to."""
        if line in self._proven:
            return Rank.PROVEN
        others = entry.total - len(entry.recipients)
        return Rank.BULK if others >= pacing.MANY else Rank.NEW

    def has_slot(self, rank: Rank) -> bool:
        """Whether an attempt for a domain of a class may begin."""
        under_way, slots = self._share(rank)
        return under_way < slots and (rank is not Rank.BULK or self.has_slot(Rank.NEW))

    def is_crowded(self, rank: Rank, share: int) -> bool:
        """Whether a class has only the last slots left, which are for domains without one.

        `share`: `concurrency_per_destination`.
        """
        under_way, slots = self._share(rank)
        return pacing.is_crowded(under_way, concurrency=slots, most=share)

    def begin(self, attempt: A, line: str, entry: Entry, rank: Rank) -> None:
        """An attempt begins that was waiting in a line of a class."""
        self.attempts.add(attempt)
        if rank is Rank.PROVEN:
            self._prompt[attempt] = self._monotonic(), line
        elif self.rank(line, entry) is Rank.BULK:
            self._bulk.add(attempt)

    def end(self, attempt: A) -> None:
        """An attempt has ended."""
        self.attempts.discard(attempt)
        self._prompt.pop(attempt, None)
        self._long.pop(attempt, None)
        self._bulk.discard(attempt)

    def note_long_attempts(self) -> None:
        """Count attempts that take long with those for other domains from now on.

        Where no slot is left and proven domains wait, a second is long. Otherwise hundreds of
        domains that fall silent at once would have all slots until it is known that they take
        long.
        """
        is_full = self.free <= 0 and self._lines.waiting(Rank.PROVEN) > 0
        long = pacing.LONG.total_seconds()
        if is_full:
            long = min(long, _LONG_WHERE_FULL)
        long_ago = self._monotonic() - long
        while self._prompt:
            attempt, (began, line) = next(iter(self._prompt.items()))
            if began > long_ago:
                return
            del self._prompt[attempt]
            self._long[attempt] = None
            self.note(line, is_proven=False)

    def in_the_way(self) -> list[A]:
        """The attempts to break off, so that proven domains that wait have slots again: the newest
        of those that take long, as many as have more than the share of domains not proven. Each is
        named once, and none twice in a second.
        """
        if self.free > 0:
            return []
        now, waiting = self._monotonic(), self._lines.waiting(Rank.PROVEN)
        if not waiting or now - self._looked_at < _EVERY_SECONDS:
            return []
        self._looked_at = now
        unproven = len(self.attempts) - len(self._prompt)
        most = min(waiting, unproven - pacing.unproven_slots(self._most), len(self._long))
        return [self._long.popitem()[0] for _ in range(most)]

    def note(self, line: str, *, is_proven: bool, domain: str = "") -> None:
        """A line is proven from now on, or no longer. `domain`: whose mail has shown it."""
        was_proven = line in self._proven
        self._proven.pop(line, None)
        if is_proven:
            self._proven[line] = None
            self._lines.classify(line, Rank.PROVEN)
            if len(self._proven) > _MOST_PROVEN:
                self.note(next(iter(self._proven)), is_proven=False)
            if is_of_hop(line):
                self._note_over_hop(domain)
        elif was_proven:
            self._lines.classify(line, Rank.NEW)

    def _note_over_hop(self, domain: str) -> None:
        """Mail for this domain is claimed with that for proven ones."""
        self._over_hops.pop(domain, None)
        self._over_hops[domain] = None
        if len(self._over_hops) > _MOST_PROVEN:
            del self._over_hops[next(iter(self._over_hops))]

    def _share(self, rank: Rank) -> tuple[int, int]:
        """The attempts under way for a class of domains, and the slots that it has."""
        prompt = len(self._prompt)
        unproven = len(self.attempts) - prompt
        if rank is Rank.PROVEN:
            return prompt, self._most - unproven
        if not self._proven:
            return unproven, self._most
        if rank is Rank.NEW:
            return unproven, pacing.unproven_slots(self._most)
        return len(self._bulk), pacing.bulk_slots(self._most)
