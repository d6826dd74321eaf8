"""What is claimed and waits: whose turn it is, and how much more to claim. Pure.

Memory does not grow with the queue: at most a page of each class of domains is claimed and waits, a
page being as many entries as there may be attempts. A domain that is slow or silent has its own few
slots and a short line of its own, and what is due elsewhere passes it. Domains that answered
lately and at once (proven) have a share of the slots to themselves (`relay.deliver.slots`), and
are claimed for while the others fill their page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, NamedTuple, TypeVar

from relay.deliver.destinations import Destinations, NotNow, Use
from relay.deliver.lines import Lines, Rank, is_of_hop
from relay.deliver.paces import Paces
from relay.deliver.room import Room
from relay.deliver.slots import Slots
from relay.queue.entry import Entry
from relay.queue.retry import RetrySchedule
from relay.route.next_hop import NextHop

A = TypeVar("A")

LEFT_FOR = timedelta(seconds=5)
"""So long a domain is not claimed for, some of whose mail was just left to other nodes."""
_MOST_LEFT = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to claim: so many entries, none of the domains in `skip`.

    `only`: none but of these domains, where no slot is left for others. `with_new`: and what has
    just come.
    """

    limit: int
    skip: frozenset[str]
    only: tuple[str, ...] | None
    with_new: bool


class LinedUp(NamedTuple):
    """What became of claimed entries: the lines that some of them belong to, and those that do not
    wait there. `silent`: their destination is. `unserved`: this node has no part of it.
    """

    lines: set[str]
    silent: list[Entry]
    unserved: list[Entry]


class NextAttempt(NamedTuple):
    """An entry whose attempt begins now: the line it waited in and its class, and the connection
    reserved for it.
    """

    entry: Entry
    line: str
    rank: Rank
    use: Use | None


class Waiting(Generic[A]):
    """The entries that wait. `most`, `share`: `concurrency` and `concurrency_per_destination`; `A`:
    what the caller names an attempt. `leads_to`: see `Room`.
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
        leads_to: Callable[[Entry], NextHop | None] = lambda entry: None,
    ) -> None:
        self._most = most
        self._share = share
        self.lines = Lines()
        self.paces = Paces(share, schedule, clock)
        self.slots: Slots[A] = Slots(most, self.lines, monotonic)
        self.room = Room(self.lines, destinations, monotonic, leads_to)
        self._destinations = destinations
        self._clock = clock
        self._left_until: dict[str, datetime] = {}
        """Domains of which some mail was left to other nodes."""
        self._ranks = list(Rank)
        self._last: Wanted | None = None
        self._under_way: Counter[str] = Counter()
        """Attempts by recipient domain."""

    def line_up(self, claimed: Iterable[Entry]) -> LinedUp:
        """Let claimed entries wait in their lines, those that may."""
        result = LinedUp(set(), [], [])
        for entry in claimed:
            line = self.room.line_of(entry)
            result.lines.add(line)
            if not self.room.part_of(line):
                result.unserved.append(entry)
            elif self.paces.is_suspended(line):
                result.silent.append(entry)
            else:
                self.lines.add(line, entry, self.slots.rank(line, entry))
        return result

    def wait_for_room(self, entry: Entry, why: NotNow) -> None:
        """Let an entry wait again that has found no room."""
        rank = self.slots.rank(self.room.line_of(entry), entry)
        self.room.wait(entry, why, rank)

    def pop_all(self) -> list[Entry]:
        """All that wait."""
        return [entry for line in self.lines.names() for entry in self.lines.pop_all(line)]

    def line_up_again(self) -> None:
        """Routes have changed: let all entries wait in the lines where they belong now."""
        entries = self.pop_all()
        self.room.forget_hops()
        for entry in entries:
            line = self.room.line_of(entry)
            self.lines.add(line, entry, self.slots.rank(line, entry))

    def ended(self, entry: Entry) -> None:
        """The attempt of an entry has ended."""
        left = self._under_way[entry.domain] - 1
        if left:
            self._under_way[entry.domain] = left
        else:
            del self._under_way[entry.domain]

    # --- several nodes ----------------------------------------------------------------------------

    def pop_unserved(self) -> list[Entry]:
        """All that wait and are not served here."""
        names = [line for line in self.lines.names() if not self.room.part_of(line)]
        return [entry for line in names for entry in self.lines.pop_all(line)]

    def leave(self, domain: str) -> None:
        """Mail for a domain was left to others: what else there is of it may be theirs, too."""
        self._left_until[domain] = self._clock() + LEFT_FOR
        if len(self._left_until) > _MOST_LEFT:
            del self._left_until[next(iter(self._left_until))]

    def _left_to_others(self) -> frozenset[str]:
        """The domains that are not claimed for at the moment."""
        if not self._left_until:
            return frozenset()
        now = self._clock()
        self._left_until = {name: at for name, at in self._left_until.items() if at > now}
        return frozenset(self._left_until)

    def is_within_parts(self) -> bool:
        """Whether no more attempts and connections are under way than this node's part."""
        parts = self._destinations.parts
        within = (count <= parts.to_claim(domain) for domain, count in self._under_way.items())
        return all(within) and self._destinations.is_within_parts()

    # --- whose turn it is -------------------------------------------------------------------------

    def turns(self) -> Iterator[NextAttempt]:
        """The entries whose attempts begin now.

        The classes of lines have their turns, and the lines of each. The caller tells `slots` of
        one before it asks for the next.
        """
        if not self.lines:
            return
        self.slots.note_long_attempts()
        self._ranks.append(self._ranks.pop(0))
        ranks = [rank for rank in self._ranks if self.lines.has(rank)]
        while ranks and self.slots.free > 0:
            rank = ranks.pop(0)
            turn = self._next(rank)
            if turn is not None:
                self.paces.began(turn.line)
                self._under_way[turn.entry.domain] += 1
                yield turn
                ranks.append(rank)

    def _next(self, rank: Rank) -> NextAttempt | None:
        """The next entry of a class that an attempt may begin for."""
        if not self.slots.has_slot(rank):
            return None
        is_crowded = self.slots.is_crowded(rank, self._share)
        for line in self.lines.turns(rank):
            most = self.room.part_of(line)
            if not self.paces.has_room(line, most=most, is_crowded=is_crowded):
                continue
            if not self._begins_with_one_that_may_go(line, most):
                continue
            entry = self.lines.head(line)
            use = self.room.reserve(line, entry)
            if use is not None or self.room.needs_no_connection(line):
                self.lines.pop(line)
                return NextAttempt(entry, line, rank, use)
        return None

    def _begins_with_one_that_may_go(self, line: str, most: int) -> bool:
        """Whether the domain of a line's head has fewer than `most` attempts. In the line of a next
        hop, entries of domains that may not go behind the others: they hold up no other domain, and
        are the first that are given back to the queue.
        """
        under_way = self._under_way
        if under_way.get(self.lines.head(line).domain, 0) < most:
            return True
        return is_of_hop(line) and self.lines.bring_forward(
            line, lambda entry: under_way.get(entry.domain, 0) < most
        )

    # --- what to claim ----------------------------------------------------------------------------

    def wanted(self) -> Wanted | None:
        """What to claim: for the free slots, or a page ahead of them; None: nothing for now."""
        self._last = None
        if not self.lines:
            # What follows comes to the same. A sender in series asks for every message.
            return Wanted(self._most, self._left_to_others(), None, with_new=True)
        has_page = self._page(Rank.NEW, Rank.BULK) >= self._most
        is_only_proven = has_page and not self.slots.has_slot(Rank.BULK)
        waiting = self._page(Rank.PROVEN) if is_only_proven else self._page(*Rank)
        if self.slots.free <= 0 and 2 * waiting >= self._most:
            return None
        return Wanted(
            limit=max(self._most - waiting, self.slots.free),
            skip=frozenset(
                line
                for line in self.lines.names()
                if not is_of_hop(line) and not self.room.has_short_line(line)
            )
            | self._left_to_others(),
            only=self.slots.proven if is_only_proven else None,
            with_new=self._page(Rank.NEW) < self._most,
        )

    def _page(self, *ranks: Rank) -> int:
        """How many entries wait of some classes, those left out that wait for the operator's limit
        of a next hop: there are few of each, and they keep nobody's page.
        """
        lines = self.lines
        limited = (line for line in self.room.limited_lines() if lines.rank(line) in ranks)
        return lines.waiting(*ranks) - sum(map(lines.length, limited))

    def claimed(self, wanted: Wanted) -> None:
        """This was claimed, and `may_claim` goes by it."""
        self._last = wanted

    def may_claim(self) -> bool:
        """Whether what the last claim passed over may have a slot now."""
        last = self._last
        if last is None:
            return True
        if last.skip and any(
            self.room.has_short_line(line) for line in last.skip - self._left_until.keys()
        ):
            return True
        return last.only is not None and (
            2 * self._page(Rank.NEW, Rank.BULK) < self._most or self.slots.has_slot(Rank.BULK)
        )
