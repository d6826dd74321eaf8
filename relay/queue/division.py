"""How limits that hold for all nodes of a queue are divided among those that are live. Pure.

Of a limit at a destination (a domain, an address, a next hop) each live node has a fixed part. The
parts of all nodes add up to the limit. Which nodes have the larger parts differs from destination
to destination, so that none has them all. Where the limit is less than the number of nodes, some
have no part of it, and leave the mail for that destination to the others.

A node goes by a view: the leases that it found live. While nodes come and go, two nodes may have
different views, whose parts do not add up to the limit. So

    a node that sees a new view   uses no more than its part in the new and in the old one, and
                                  tells the others that it has seen the new one
    all have seen it              each uses its part in the new one

A node that has just registered has a part in no view before all live nodes have seen it. One that
does not answer holds up the others until its lease is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32


def all_of_it(limit: int, name: str) -> int:
    """The part of a node that shares its queue with none."""
    return limit


def share(limit: int, index: int, count: int) -> int:
    """The part of a limit for one of `count` that share it; the parts of all add up to it."""
    return (limit + count - 1 - index) // count


def part(limit: int, name: str, index: int, count: int) -> int:
    """The part of a limit at a destination for one of `count` nodes."""
    return share(limit, (index + crc32(name.encode())) % count, count)


class Member(NamedTuple):
    """A live lease, its node, and the view that this node last said to have seen."""

    lease: int
    node: int
    seen: frozenset[int]


class _View(NamedTuple):
    """Leases in the order of their nodes, and the place of the own one; None: it is not there."""

    leases: tuple[int, ...]
    place: int | None

    def part(self, limit: int, name: str) -> int:
        if self.place is None:
            return 0
        return part(limit, name, self.place, len(self.leases))


_NOBODY = _View((), None)


class Division:
    """The part of one node, by all views that some node may still go by."""

    def __init__(self) -> None:
        self._views = [_NOBODY]
        self._is_told = True

    def part(self, limit: int, name: str) -> int:
        """What this node may use of a limit at a destination."""
        return min(view.part(limit, name) for view in self._views)

    @property
    def is_alone(self) -> bool:
        """Whether no other node has a part."""
        return all(len(view.leases) == 1 for view in self._views)

    @property
    def is_agreed(self) -> bool:
        """Whether all nodes go by the same view."""
        return len(self._views) == 1 and self._is_told

    @property
    def untold(self) -> tuple[int, ...] | None:
        """The newest view, if this node has not said yet that it has seen it."""
        return None if self._is_told else self._views[-1].leases

    def look(self, members: Iterable[Member], own: int) -> bool:
        """Go by the leases that are live now; whether parts of this node have changed."""
        before = list(self._views)
        live = sorted(members, key=lambda one: (one.node, one.lease))
        leases = tuple(one.lease for one in live)
        place = leases.index(own) if own in leases else None
        view = _View(leases, place)
        if view != self._views[-1]:
            self._views.append(view)
        self._is_told = place is None or live[place].seen == frozenset(leases)
        if all(one.seen == frozenset(leases) for one in live):
            self._views = [view]
        return self._views != before

    def forget(self) -> None:
        """The lease is lost: nothing is this node's until it has registered anew."""
        self._views, self._is_told = [_NOBODY], True
