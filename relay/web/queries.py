"""Searches and counts for the pages, each within the time that a page has.

A page must not wait for a search through a million events, or for a count of a hundred thousand
recipients. So a search ends after its time and says how far it came. The queue is counted by
destination once for all pages, which show the last count while the next one is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from relay.admin.requests import RequestError
from relay.mail.jsontext import JsonFields
from relay.policy.fields import Wishes
from relay.queue.destinations import DestinationTally, QueuedDestination
from relay.queue.store import (
    EventFilter,
    EventPage,
    QueueFilter,
    QueueView,
    SearchTooLong,
    SpoolError,
    more_follows,
)
from relay.web.rows import EventRow, row_of
from relay.web.state import Web

PAGE_ROWS = 50
STORY_EVENTS = 500
STORY_REPORTS = 20

_SEARCH = timedelta(milliseconds=15)
"""The time of a search that has found an event; one that has found none has ten times as long."""

_COUNT_SECONDS = 0.15
_LOOK_UP_SECONDS = 0.15
_LOOK_UP_ENDS_SECONDS = 20.0
_LOOK_UPS_AT_ONCE = 20
_FRESH = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class LogPage:
    """Rows, newest first. `older`: where the next page begins; 0 at the end.

    `is_unfinished`: the time of the search ended before it found a row; it goes on at `older`.
    """

    rows: tuple[EventRow, ...]
    older: int = 0
    is_unfinished: bool = False


async def log_page(
    view: QueueView, wanted: EventFilter, *, before: int = 0, limit: int = PAGE_ROWS
) -> LogPage:
    """A page of the log. `before`: only events below this sequence number; 0: from the newest."""
    try:
        page = EventPage(before, limit, ascending=False, patience=_SEARCH)
        found = await view.find_events(wanted, page)
    except SearchTooLong as error:
        return LogPage((), error.reached, is_unfinished=error.reached != 0)
    rows = tuple(row_of(one.seq, one.event) for one in found)
    return LogPage(rows, rows[-1].seq if rows else 0)


async def events_of(view: QueueView, queue_id: str) -> tuple[EventRow, ...]:
    """The first events of a message, oldest first."""
    found = await view.find_events(EventFilter(queue_id=queue_id), EventPage(limit=STORY_EVENTS))
    return tuple(row_of(one.seq, one.event) for one in found)


async def reports_on(view: QueueView, events: Sequence[EventRow]) -> tuple[EventRow, ...]:
    """The reports on a message, if the search finds them in time."""
    if not events:
        return ()
    wanted = EventFilter(recipient=events[0].sender, fields=(("about", events[0].queue_id),))
    try:
        page = EventPage(events[0].seq, STORY_REPORTS, patience=_SEARCH)
        found = await view.find_events(wanted, page)
    except SearchTooLong:
        return ()
    return tuple(row_of(one.seq, one.event) for one in found)


@dataclass(frozen=True, slots=True)
class QueueCount:
    """The queue by destination at a moment. `is_whole`: the count has ended."""

    destinations: Sequence[QueuedDestination]
    at: datetime
    is_whole: bool

    def of(self, domain: str) -> QueuedDestination:
        """One destination, with zeros if no message waits for it."""
        return next(
            (one for one in self.destinations if one.domain == domain), QueuedDestination(domain)
        )


class CountedQueue:
    """Counts the queue by destination, for all pages together."""

    def __init__(self, state: Web) -> None:
        self._state = state
        self._last: QueueCount | None = None
        self._tally = DestinationTally()
        self._counting: asyncio.Task[None] | None = None

    async def get(self) -> QueueCount:
        """The last count. If it is old a new one begins, and the page waits a moment for it."""
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
        """Count anew: somebody has changed the queue, and will look at it."""
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
    """How many messages match, and whether the count ended in time."""
    count, after = 0, ""
    deadline = asyncio.get_running_loop().time() + _COUNT_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        page = await view.list_messages(wanted, now=now, after=after, limit=200)
        count += len(page)
        if not more_follows(page, 200):
            return count, True
        after = page[-1].queue_id
    return count, False


class Forecasts:
    """Looks domains up as `relay explain` does for a message to each.

    A page waits a moment for the answer. The look-up goes on without it, and the resolver caches
    the result, so that the page has the answer when it is loaded again.
    """

    def __init__(self, state: Web) -> None:
        self._state = state
        self._asked: dict[str, asyncio.Task[JsonFields]] = {}

    async def of(self, domain: str) -> tuple[JsonFields | None, str]:
        """The answer, or None and the reason why there is none yet."""
        task = self._asked.get(domain)
        if task is None:
            if len(self._asked) >= _LOOK_UPS_AT_ONCE:
                return None, "too many domains are being looked up"
            task = self._asked[domain] = asyncio.create_task(self._look_up(domain))
            task.add_done_callback(partial(self._forget, domain))
        try:
            async with asyncio.timeout(_LOOK_UP_SECONDS):
                return await asyncio.shield(task), ""
        except TimeoutError:
            return None, "the name servers have not answered yet"
        except (SpoolError, RequestError) as error:
            return None, str(error)

    def _forget(self, domain: str, task: asyncio.Task[JsonFields]) -> None:
        del self._asked[domain]
        if not task.cancelled():
            task.exception()  # the page that asked may be gone

    async def close(self) -> None:
        """Cancel all look-ups."""
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_up(self, domain: str) -> JsonFields:
        async with asyncio.timeout(_LOOK_UP_ENDS_SECONDS):
            running = self._state.operator.running()
            return await running.explain("", f"postmaster@{domain}", Wishes())
