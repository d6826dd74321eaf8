"""Answers to what the pages ask, each within the time that a page has.

A page's first octet is not to wait for a search through a million events or a count of a hundred
thousand recipients: a search ends after its time with how far it came, and the count of the queue
by destination is made once for all pages and renewed while they show the last one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from relay.queue.destinations import Destination, DestinationTally
from relay.queue.store import (
    EventFilter,
    QueueFilter,
    QueueView,
    SearchTooLong,
    more_follows,
)
from relay.web.rows import Row, row_of
from relay.web.state import Web

__all__ = ["CountedQueue", "LogPage", "QueueCount", "count_messages", "events_of", "log_page"]

PAGE_ROWS = 50
STORY_EVENTS = 500

_SEARCH = timedelta(milliseconds=15)
"""For a page that has something; ten times as long for one that has nothing yet."""

_COUNT_SECONDS = 0.15
_FRESH = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class LogPage:
    """Rows, newest first. `older`: where the next page begins, 0 at the end.

    `is_unfinished`: the search ran out of time before it found anything; it goes on at `older`.
    """

    rows: tuple[Row, ...]
    older: int = 0
    is_unfinished: bool = False


async def log_page(
    view: QueueView, wanted: EventFilter, *, before: int = 0, limit: int = PAGE_ROWS
) -> LogPage:
    """A page of the log; `before` is the sequence number it begins below, 0 the newest."""
    try:
        found = await view.find_events(
            wanted, after=before, limit=limit, ascending=False, patience=_SEARCH
        )
    except SearchTooLong as error:
        return LogPage((), error.reached, is_unfinished=error.reached != 0)
    rows = tuple(row_of(one.seq, one.event) for one in found)
    return LogPage(rows, rows[-1].seq if rows else 0)


async def events_of(view: QueueView, queue_id: str) -> tuple[Row, ...]:
    """The events of a message, oldest first; of very many the first."""
    found = await view.find_events(EventFilter(queue_id=queue_id), limit=STORY_EVENTS)
    return tuple(row_of(one.seq, one.event) for one in found)


@dataclass(frozen=True, slots=True)
class QueueCount:
    """The queue by destination at a moment. `is_whole`: the count is through."""

    destinations: Sequence[Destination]
    at: datetime
    is_whole: bool

    def of(self, domain: str) -> Destination:
        """One destination, whether something waits for it or not."""
        return next((one for one in self.destinations if one.domain == domain), Destination(domain))


class CountedQueue:
    """The count of the queue by destination, shared by all pages."""

    def __init__(self, state: Web) -> None:
        self._state = state
        self._last: QueueCount | None = None
        self._tally = DestinationTally()
        self._counting: asyncio.Task[None] | None = None

    async def get(self) -> QueueCount:
        """The last count; a new one is made where it is old, and waited for where there is none."""
        now = self._state.clock()
        if self._last is not None and now - self._last.at < _FRESH:
            return self._last
        if self._counting is None or self._counting.done():
            self._counting = asyncio.create_task(self._count())
        with suppress(TimeoutError):
            async with asyncio.timeout(_COUNT_SECONDS):
                await asyncio.shield(self._counting)
        return self._last or QueueCount(self._tally.destinations, now, is_whole=False)

    def forget(self) -> None:
        """The queue was changed by somebody who will look at it."""
        self._last = None

    async def _count(self) -> None:
        self._tally = tally = DestinationTally()
        at = self._state.clock()
        after: str | None = ""
        while after is not None:
            parts, after = await self._state.view.count_destinations(after)
            tally.add(parts)
        self._last = QueueCount(tally.destinations, at, is_whole=True)


async def count_messages(view: QueueView, wanted: QueueFilter, now: datetime) -> tuple[int, bool]:
    """How many messages match, and whether that is all of them: a count has a moment's time."""
    count, after = 0, ""
    deadline = asyncio.get_running_loop().time() + _COUNT_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        page = await view.list_messages(wanted, now=now, after=after, limit=200)
        count += len(page)
        if not more_follows(page, 200):
            return count, True
        after = page[-1].queue_id
    return count, False
