"""What is claimed and waits: whose turn it is, and how much more to claim. Pure.

Memory does not grow with the queue: at most a page of each class of domains is claimed and waits, a
page being as many entries as there may be attempts. A domain that is slow or silent has its own few
places and a short line of its own, and what is due elsewhere passes it. Domains that answered
lately and at once (proven) have a share of the places to themselves (`relay.deliver.places`), and
are claimed for while the others fill their page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from relay.deliver.destinations import Destinations, Use
from relay.deliver.lines import Lines, Rank
from relay.deliver.paces import Paces
from relay.deliver.places import Places
from relay.deliver.room import Room
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule

__all__ = ["Waiting", "Wanted"]

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to claim: so many entries, none of the domains in `skip`.

    `only`: none but of these domains, where no place is left for others. `with_new`: and what has
    just come.
    """

    limit: int
    skip: frozenset[str]
    only: tuple[str, ...] | None
    with_new: bool


class Waiting(Generic[A]):
    """The entries that wait. `most`, `share`: `concurrency` and `concurrency_per_destination`; `A`:
    what the caller names an attempt.
    """

    def __init__(
        self,
        most: int,
        share: int,
        *,
        schedule: RetrySchedule,
        destinations: Destinations,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self._most = most
        self._share = share
        self.lines = Lines()
        self.paces = Paces(share, schedule, clock)
        self.places: Places[A] = Places(most, self.lines, monotonic)
        self.room = Room(self.lines, destinations, share, monotonic)
        self._ranks = list(Rank)
        self._last: Wanted | None = None

    def add(self, entry: Entry) -> bool:
        """Let an entry wait in the line of its domain; whether it may: the domain is not silent."""
        if self.paces.is_suspended(entry.domain):
            return False
        self.lines.add(entry, self.places.rank(entry))
        return True

    def pop_all(self) -> list[Entry]:
        """All that wait."""
        return [entry for domain in self.lines.domains() for entry in self.lines.pop_all(domain)]

    # --- whose turn it is -------------------------------------------------------------------------

    def turns(self) -> Iterator[tuple[Entry, Rank, Use | None]]:
        """Entries whose attempts begin now, each with its class and the connection reserved for it.

        The classes of domains have their turns, and the domains of each. The caller tells `places`
        of one before it asks for the next.
        """
        if not self.lines:
            return
        self.places.note_long_attempts()
        self._ranks.append(self._ranks.pop(0))
        ranks = [rank for rank in self._ranks if self.lines.waiting(rank)]
        while ranks and self.places.free > 0:
            rank = ranks.pop(0)
            domain = self._next_domain(rank)
            if domain is not None:
                entry = self.lines.pop(domain)
                self.paces.began(domain)
                yield entry, rank, self.room.reserve(entry)
                ranks.append(rank)

    def _next_domain(self, rank: Rank) -> str | None:
        """The next domain of a class that an attempt may begin for."""
        if not self.places.has_place(rank):
            return None
        is_crowded = self.places.is_crowded(rank, self._share)
        return next(
            (
                domain
                for domain in self.lines.turns(rank)
                if self.paces.has_room(domain, is_crowded=is_crowded)
                and self.room.is_to_be_asked(domain)
            ),
            None,
        )

    # --- what to claim ----------------------------------------------------------------------------

    def wanted(self) -> Wanted | None:
        """What to claim: for the free places, or a page ahead of them; None: nothing for now."""
        self._last = None
        has_page = self.lines.waiting(Rank.NEW, Rank.BULK) >= self._most
        is_only_proven = has_page and not self.places.has_place(Rank.BULK)
        waiting = self.lines.waiting(Rank.PROVEN) if is_only_proven else len(self.lines)
        if self.places.free <= 0 and 2 * waiting >= self._most:
            return None
        return Wanted(
            limit=max(self._most - waiting, self.places.free),
            skip=frozenset(
                domain for domain in self.lines.domains() if not self.room.has_short_line(domain)
            ),
            only=self.places.proven if is_only_proven else None,
            with_new=self.lines.waiting(Rank.NEW) < self._most,
        )

    def claimed(self, wanted: Wanted) -> None:
        """This was claimed, and `may_claim` goes by it."""
        self._last = wanted

    def may_claim(self) -> bool:
        """Whether what the last claim passed over may have a place now."""
        last = self._last
        if last is None or any(map(self.room.has_short_line, last.skip)):
            return True
        return last.only is not None and (
            2 * self.lines.waiting(Rank.NEW, Rank.BULK) < self._most
            or self.places.has_place(Rank.BULK)
        )
