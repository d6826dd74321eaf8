"""A search through events: when its page ends, and several streams of events looked at as one.

A queue numbers its events in the order of its commits, and so does each node of a queue that
several nodes share: such a sequence is a stream. The order of commits is not always that of time. A
listing of several streams takes the events of each in its order and goes on with whichever is next
in time. The number of an event is the place in every stream at which the listing has just given it,
written as one number: a listing that goes on from there misses no event and repeats none, however
late a commit of a stream comes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import timedelta

from relay.queue.store import (
    FIRST_PAGE,
    FRUITLESS,
    EventFilter,
    EventPage,
    EventStream,
    SearchTooLong,
    StoredEvent,
)

Bounds = Callable[[EventFilter, int, bool], Awaitable[tuple[int, int]]]
"""The first and the last number that can match, of a filter, `after` and `ascending`."""

Within = Callable[[EventFilter, int, int, int, bool], Awaitable[tuple[list[StoredEvent], int]]]
"""The first events that match between two numbers, at most so many, ascending or not; and the end
of the window that was searched.
"""


class Stream:
    """One stream, searched in windows by what its engine is asked."""

    def __init__(self, bounds: Bounds, within: Within) -> None:
        self._bounds = bounds
        self._within = within

    async def find_events(
        self, wanted: EventFilter, page: EventPage = FIRST_PAGE
    ) -> list[StoredEvent]:
        """A page of the events that match."""
        began = time.monotonic()
        patience = page.patience
        low, high = await self._bounds(wanted, page.after, page.ascending)
        found: list[StoredEvent] = []
        while low <= high and len(found) < page.limit:
            left = page.limit - len(found)
            some, reached = await self._within(wanted, low, high, left, page.ascending)
            found += some
            low, high = (reached + 1, high) if page.ascending else (low, reached - 1)
            seconds = time.monotonic() - began
            if patience is not None and low <= high and _is_over(patience, seconds, found, reached):
                break
        return found


def _is_over(
    patience: timedelta, seconds: float, found: Sequence[StoredEvent], reached: int
) -> bool:
    """An empty page would say that this is the end, which nobody knows yet."""
    if not found and seconds >= FRUITLESS * patience.total_seconds():
        raise SearchTooLong(f"nothing was found in {seconds:.0f} seconds", reached)
    return bool(found) and seconds >= patience.total_seconds()


class Streams:
    """Several streams looked at as one."""

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self._streams = streams

    async def find_events(
        self, wanted: EventFilter, page: EventPage = FIRST_PAGE
    ) -> list[StoredEvent]:
        """A page of the events of all streams."""
        began = time.monotonic()
        limit, ascending, patience = page.limit, page.ascending, page.patience
        if page.after:
            cuts = [_beside(cut, ascending) for cut in _read(page.after, len(self._streams))]
            starts = [_start(cut, ascending) for cut in cuts]
        else:
            ends = await asyncio.gather(*map(newest_seq, self._streams))
            cuts, starts = [], [0] * len(self._streams)
        found: list[StoredEvent] = []
        while True:
            some = (limit - len(found)) // len(self._streams) + 1
            pages = await asyncio.gather(
                *(
                    queue.find_events(wanted, replace(page, after=start, limit=some))
                    for queue, start in zip(self._streams, starts, strict=True)
                )
            )
            if not cuts:
                beginnings = zip(pages, ends, strict=True)
                cuts = [_beginning(page, end, ascending) for page, end in beginnings]
            hurried = patience is not None and time.monotonic() - began >= patience.total_seconds()
            goes_on = [bool(page) and (hurried or len(page) == some) for page in pages]
            found += _by_time(pages, cuts, limit - len(found), ascending, goes_on)
            if hurried or len(found) == limit or not any(goes_on):
                return found
            starts = [_start(cut, ascending) for cut in cuts]


async def newest_seq(queue: EventStream) -> int:
    """The number of a queue's newest event, 0 where it has none."""
    newest = await queue.find_events(EventFilter(), EventPage(limit=1, ascending=False))
    return newest[0].seq if newest else 0


# The place of a listing in a queue is a cut: twice an event's number is that event itself, one more
# or less is the place just behind or before it. The cuts of all queues are written as one number,
# with the cut of the event that was given last in the lowest place: so one more or less is the
# place beside this event, as with a queue's own numbers.

_CUT_BITS = 48
_MIDDLE = 1 << (_CUT_BITS - 1)


def _written(cuts: Sequence[int], told: int) -> int:
    number = told
    for cut in (*cuts[:told], *cuts[told + 1 :], cuts[told]):
        number = number << _CUT_BITS | (cut + _MIDDLE)
    return number


def _read(number: int, count: int) -> list[int]:
    """The cuts of so many queues; of a number that is none, some.

    A queue that is new since the number was written stands behind the others, at its beginning.
    """
    cuts: list[int] = []
    while len(cuts) < count and (number >= _MIDDLE or not cuts):
        cuts.append((number & ((1 << _CUT_BITS) - 1)) - _MIDDLE)
        number >>= _CUT_BITS
    last, *others = cuts
    others.reverse()
    others.insert(number % len(cuts), last)
    return others + [1] * (count - len(others))


def _beside(cut: int, ascending: bool) -> int:
    """The place just behind an event, in the direction of the listing."""
    if cut % 2:
        return cut
    return cut + 1 if ascending else cut - 1


def _start(cut: int, ascending: bool) -> int:
    """Where a queue goes on behind a cut; 0, which would be its beginning, is no event's number."""
    number = cut // 2 if ascending else -(-cut // 2)
    return number or (-1 if ascending else 1)


def _beginning(page: Sequence[StoredEvent], end: int, ascending: bool) -> int:
    """The cut before a first page; where nothing matches, behind what the queue had until `end`."""
    if not page:
        return 2 * end + 1
    return 2 * page[0].seq + (-1 if ascending else 1)


def _by_time(
    pages: Sequence[Sequence[StoredEvent]],
    cuts: list[int],
    limit: int,
    ascending: bool,
    goes_on: Sequence[bool],
) -> list[StoredEvent]:
    """At most `limit` events of the pages; `cuts` then stand behind them.

    `goes_on`: behind a page its queue may have more, which comes before others' events.
    """
    found: list[StoredEvent] = []
    left = [deque(page) for page in pages]
    pick = min if ascending else max
    while len(found) < limit and any(left):
        if any(more and not rest for more, rest in zip(goes_on, left, strict=True)):
            break
        queue = pick(
            (number for number, page in enumerate(left) if page),
            key=lambda n: (left[n][0].event.at, n),
        )
        one = left[queue].popleft()
        cuts[queue] = 2 * one.seq
        found.append(StoredEvent(_written(cuts, queue), one.event))
        cuts[queue] = _beside(cuts[queue], ascending)
    return found
