"""The operator's limits of each next hop: `max_connections` and `rate`. Pure.

All workers of the machine keep them together, in a table that they share (`Table`); each worker
writes how many connections it has and wants, and reads the others'. A node of several has its
fixed part of each limit (`parts`).

    a connection        a worker begins with one more if the sum over the workers stays below the
                        limit, and if its part, divided by what each worker wants, has room. A
                        connection counts until the host has closed it, an idle one too.
    a message           begins when the rate lets it (`allotment.Spacing`). Of several workers that
                        wait for it, the one that has waited longest since its last message has it.
                        An attempt is let in before it connects. Where the connection takes so long
                        that the host would see too many messages at once, the attempt waits anew.

A worker that ends, or stands still, keeps no part from the others for longer than `_FRESH`: the
supervisor clears what a dead worker wrote, and what a worker wants counts only while it is new.

Times are seconds of the monotonic clock, which is the same for all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from relay.deliver.allotment import LATE_SECONDS, Spacing, divided, spacing
from relay.deliver.parts import Part
from relay.queue.division import all_of_it
from relay.route.next_hop import NextHop

Holder = tuple[str, str]
"""The entry that has a connection: its queue id and domain."""

# The cells of a next hop: first that of all workers, then those of each.
CELLS = 1
_DUE = 0
"""When the next message is due (`Spacing`)."""
CELLS_OF_A_WORKER = 5
_HELD = 0
"""Connections that it has, or is about to make."""
_WANTED = 1
"""Connections that it has mail for."""
_SEEN = 2
"""When it wrote what it wants."""
_WAITS = 3
"""When it last asked in vain for a message to begin."""
_BEGAN = 4
"""When it last began a message."""

_FRESH = 2.5
"""For so many seconds counts what a worker has said that it wants."""
_TURN_SECONDS = 10.0
"""So long a worker has a connection that cannot be divided."""
_AGAIN = 0.1
"""Seconds until a worker asks again for a connection that other workers have."""
_SOON = 0.02
"""The same for a message that another worker may begin first."""
_LET_GO = 0.2
"""So long after it could begin, a message of any worker may, whoever's turn it is."""


class Cells(Protocol):
    """Numbers at places that are known."""

    def __getitem__(self, at: int, /) -> float: ...

    def __setitem__(self, at: int, value: float, /) -> None: ...


class Table(Protocol):
    """What all workers know of each next hop; `number` is this worker's."""

    number: int
    workers: int

    def locked(self, name: str) -> AbstractContextManager[Cells | None]:
        """The cells of a next hop, while no other worker may use them; None where that would take
        too long.
        """

    def cells(self, name: str) -> Cells:
        """The cells of a next hop, to read, and to write own ones that only become less."""


class OwnTable:
    """The table of a worker without others."""

    number = 0
    workers = 1

    def __init__(self) -> None:
        self._cells: dict[str, list[float]] = {}

    @contextmanager
    def locked(self, name: str) -> Iterator[Cells]:
        """The cells of a next hop."""
        yield self.cells(name)

    def cells(self, name: str) -> Cells:
        """The cells of a next hop."""
        return self._cells.setdefault(name, [0.0] * (CELLS + CELLS_OF_A_WORKER))


class Begun(NamedTuple):
    """A message that the rate let in: when, and when the next message was due before and after."""

    at: float
    before: float
    due: float


@dataclass(slots=True)
class Limited:
    """What this worker does at one next hop.

    `holders`: the entries that have a connection or make one. `open`: connections that stand, are
    made, are idle, or are being closed. `begun`: the entries whose first message has been let in
    and not sent yet. `late`: those whose connection came late, and which wait anew: no other
    message begins before theirs. `room_at`: when to ask again; `waits_for_rate`: whether the rate
    was what did not let the last one in.
    """

    hop: NextHop
    holders: set[Holder] = field(default_factory=set)
    open: int = 0
    begun: dict[Holder, Begun] = field(default_factory=dict)
    late: dict[Holder, None] = field(default_factory=dict)
    room_at: float = 0.0
    waits_for_rate: bool = False

    @property
    def held(self) -> int:
        """How many connections of the limit this worker has, or is about to make."""
        return max(len(self.holders), self.open) if self.hop.max_connections is not None else 0


class HopLimits:
    """The limits of all next hops, as one worker keeps them.

    `part`: what this node has of a limit. `waiting`: how many entries wait in this worker for a
    next hop, by its name.
    """

    def __init__(
        self, table: Table | None = None, *, clock: Callable[[], float], part: Part = all_of_it
    ) -> None:
        self._table: Table = table or OwnTable()
        self._clock = clock
        self._part_of = part
        self._known: dict[str, Limited] = {}
        self.waiting: Callable[[str], int] = lambda name: 0

    # --- an attempt -------------------------------------------------------------------------------

    def begin(self, hop: NextHop, holder: Holder) -> bool:
        """Let an entry have a connection, and begin a message over it; whether it may.

        Without a limit it is not kept who has a connection. Where a reload adds a limit, `may_open`
        waits until enough of the connections from before are closed.
        """
        if not hop.is_limited:
            return True
        one = self._of(hop)
        if not self._take_connection(one, holder):
            return False
        if hop.rate is not None and holder not in one.begun:
            begun = self._begin_message(one, is_next=not one.late)
            if begun is None:
                one.holders.discard(holder)
                self._settle(one)
                return False
            one.begun[holder] = begun
        one.room_at, one.waits_for_rate = 0.0, False
        return True

    def end(self, hop: NextHop, holder: Holder) -> None:
        """An entry has no connection any more."""
        if not hop.is_limited:
            return
        one = self._known.get(hop.name)
        if one is not None and holder in one.holders:
            one.holders.discard(holder)
            one.late.pop(holder, None)
            if not one.waits_for_rate:
                one.room_at = 0.0
            self._settle(one)

    def is_over(self, holder: Holder) -> None:
        """The attempt of an entry has ended; the next one is a message of its own."""
        for one in self._known.values():
            if one.begun:
                one.begun.pop(holder, None)
            if one.late:
                one.late.pop(holder, None)

    def wait_for_message(self, hop: NextHop, holder: Holder) -> float:
        """In how many seconds to ask again for the next message of an attempt; 0 if it begins.

        The first was let in with the connection, and is let in anew if that came late. More of them
        are needed for very many recipients, and where a host ends a connection.
        """
        one = self._of(hop)
        if hop.rate is None:
            return 0.0
        begun = one.begun.pop(holder, None)
        if begun is not None:
            if self._clock() - begun.at <= LATE_SECONDS or self._begins_late(one, begun):
                return 0.0
            one.late[holder] = None
        is_next = next(iter(one.late), holder) == holder
        if self._begin_message(one, is_next=is_next) is not None:
            one.late.pop(holder, None)
            return 0.0
        return max(one.room_at - self._clock(), 0.001)

    # --- connections ------------------------------------------------------------------------------

    def may_open(self, hop: NextHop) -> bool:
        """Whether another connection may be made now; counts it. False: an old one is closing."""
        one = self._of(hop)
        if hop.max_connections is not None and one.open >= max(len(one.holders), 1):
            return False
        one.open += 1
        return True

    def gone(self, hop: NextHop) -> None:
        """A connection was closed, or was not made after all."""
        one = self._of(hop)
        one.open -= 1
        self._settle(one)

    def idle(self, hop: NextHop) -> int:
        """How many connections may be idle beside those in use."""
        one = self._of(hop)
        return max(one.held - len(one.holders), 0)

    def room_in(self, name: str) -> float | None:
        """In how many seconds a next hop is to be asked again; None: when something else tells."""
        one, now = self._known.get(name), self._clock()
        return None if one is None or one.room_at <= now else one.room_at - now

    def has_room(self, hop: NextHop) -> bool:
        """Whether it is time to ask for room."""
        if not hop.is_limited:
            return True
        one = self._known.get(hop.name)
        return one is None or one.hop is not hop or self._clock() >= one.room_at

    def look(self) -> list[tuple[NextHop, int]]:
        """Say again what this worker wants. The next hops where it has more than its part now,
        each with how many idle connections may stay. To be called once a second.
        """
        found = []
        for one in self._known.values():
            cells = self._table.cells(one.hop.name)
            if one.waits_for_rate and self.waiting(one.hop.name):
                cells[self._cell(self._table.number, _WAITS)] = self._clock()
            if one.hop.max_connections is not None:
                part = self._part(one, cells, one.held)
                if one.held > part:
                    found.append((one.hop, max(part - len(one.holders), 0)))
        return found

    def spacing(self, hop: NextHop) -> Spacing | None:
        """How this node keeps the rate of a next hop; None without one, or without a part of it."""
        if hop.rate is None:
            return None
        messages = self._part_of(hop.rate.messages, hop.destination)
        return spacing(replace(hop.rate, messages=messages)) if messages else None

    def most(self, hop: NextHop) -> int | None:
        """How many connections this node may have to a next hop; None: no limit is set."""
        limit = hop.max_connections
        return None if limit is None else self._part_of(limit, hop.destination)

    def is_within_parts(self) -> bool:
        """Whether no next hop has more connections than this node's part."""
        return all(
            (most := self.most(one.hop)) is None or one.held <= most for one in self._known.values()
        )

    @property
    def known(self) -> Mapping[str, Limited]:
        """The next hops that have had mail, by name."""
        return self._known

    # --- inside -----------------------------------------------------------------------------------

    def _of(self, hop: NextHop) -> Limited:
        one = self._known.get(hop.name)
        if one is None:
            one = self._known[hop.name] = Limited(hop)
        elif one.hop is not hop:  # after a reload
            one.hop, one.room_at = hop, 0.0
            self._write_held(one)
        return one

    def _take_connection(self, one: Limited, holder: Holder) -> bool:
        limit = self.most(one.hop)
        if limit is None or holder in one.holders:
            one.holders.add(holder)
            return True
        wanted = len(one.holders) + 1
        with self._table.locked(one.hop.name) as cells:
            if cells is None or wanted > self._part(one, cells, wanted):
                return self._refuse(one)
            if wanted > one.held:
                if sum(self._all(cells, _HELD)) + wanted - one.held > limit:
                    return self._refuse(one)
                cells[self._cell(self._table.number, _HELD)] = wanted
        one.holders.add(holder)
        return True

    def _refuse(self, one: Limited) -> bool:
        """Another worker has it, or only this one: then its next connection that ends tells."""
        one.room_at, one.waits_for_rate = self._clock() + _AGAIN, False
        return False

    def _settle(self, one: Limited) -> None:
        """Give back what is not needed any more."""
        if one.hop.max_connections is not None:
            self._write_held(one)

    def _write_held(self, one: Limited) -> None:
        self._table.cells(one.hop.name)[self._cell(self._table.number, _HELD)] = one.held

    def _part(self, one: Limited, cells: Cells, wanted: int) -> int:
        """Write what this worker has mail for, and divide the limit by what all have mail for; this
        worker may want as many as `wanted`.
        """
        now, number = self._clock(), self._table.number
        has_mail_for = len(one.holders) + self.waiting(one.hop.name)
        cells[self._cell(number, _WANTED)] = has_mail_for
        cells[self._cell(number, _SEEN)] = now
        wants = [
            int(want if now - seen <= _FRESH else min(want, held))
            for want, seen, held in zip(
                self._all(cells, _WANTED),
                self._all(cells, _SEEN),
                self._all(cells, _HELD),
                strict=True,
            )
        ]
        wants[number] = max(wanted, has_mail_for)
        limit = self.most(one.hop) or 0
        return divided(limit, wants, int(now / _TURN_SECONDS))[number]

    def _begin_message(self, one: Limited, *, is_next: bool) -> Begun | None:
        """Let a message begin, if the rate lets it. `is_next`: whether it waits for no late one."""
        now, number = self._clock(), self._table.number
        if not is_next:
            one.room_at, one.waits_for_rate = max(one.room_at, now + _SOON), True
            return None
        spaced = self.spacing(one.hop)
        with self._table.locked(one.hop.name) as cells:
            if cells is None or spaced is None:
                one.room_at, one.waits_for_rate = now + _AGAIN, True
                return None
            # After a reload it may be due by a rate that was slower.
            due = cells[_DUE] = min(cells[_DUE], now + spaced.burst * spaced.interval)
            at = spaced.begins_at(due)
            is_late = now - at > _LET_GO
            if now < at or (not is_late and self._is_anothers_turn(cells, now)):
                cells[self._cell(number, _WAITS)] = now
                one.room_at, one.waits_for_rate = max(at, now + _SOON), True
                return None
            next_due = cells[_DUE] = spaced.next_due(due, now)
            cells[self._cell(number, _BEGAN)] = now
            cells[self._cell(number, _WAITS)] = 0.0
        return Begun(now, due, next_due)

    def _begins_late(self, one: Limited, begun: Begun) -> bool:
        """Let a message begin now that was let in a while ago, if none was let in since: the next
        one is due later. Otherwise its place in the rate is lost.
        """
        spaced = self.spacing(one.hop)
        with self._table.locked(one.hop.name) as cells:
            if cells is None or spaced is None or cells[_DUE] != begun.due:
                return False
            cells[_DUE] = spaced.next_due(begun.before, self._clock())
        return True

    def _is_anothers_turn(self, cells: Cells, now: float) -> bool:
        """Whether another worker waits that has begun no message for longer than this one."""
        number = self._table.number
        waits, began = self._all(cells, _WAITS), self._all(cells, _BEGAN)
        return any(
            now - waits[other] <= _FRESH and (began[other], other) < (began[number], number)
            for other in range(self._table.workers)
            if other != number
        )

    def _all(self, cells: Cells, fact: int) -> list[float]:
        return [cells[self._cell(worker, fact)] for worker in range(self._table.workers)]

    @staticmethod
    def _cell(worker: int, fact: int) -> int:
        return CELLS + worker * CELLS_OF_A_WORKER + fact
