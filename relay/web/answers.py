"""Answers to what the pages ask, each within the time that a page has.

A page's first octet is not to wait for a search through a million events or a count of a hundred
thousand recipients: a search ends after its time with how far it came, and the count of the queue
by destination is made once for all pages and renewed while they show the last one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from relay.admin.requests import RequestError
from relay.policy.fields import Wishes
from relay.queue.destinations import Destination, DestinationTally
from relay.queue.store import (
    EventFilter,
    QueueFilter,
    QueueView,
    SearchTooLong,
    SpoolError,
    more_follows,
)
from relay.web.rows import Row, row_of
from relay.web.state import Web

__all__ = [
    "CountedQueue",
    "Forecasts",
    "LogPage",
    "QueueCount",
    "count_messages",
    "events_of",
    "log_page",
    "reports_on",
]

PAGE_ROWS = 50
STORY_EVENTS = 500
STORY_REPORTS = 20

_SEARCH = timedelta(milliseconds=15)
"""For a page that has something; ten times as long for one that has nothing yet."""

_COUNT_SECONDS = 0.15
_LOOK_UP_SECONDS = 0.15
_LOOK_UP_ENDS_SECONDS = 20.0
_LOOK_UPS_AT_ONCE = 20
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


async def reports_on(view: QueueView, events: Sequence[Row]) -> tuple[Row, ...]:
    """The reports that the sender of a message got on it, as far as they are found in time."""
    if not events:
        return ()
    wanted = EventFilter(recipient=events[0].sender, fields=(("about", events[0].queue_id),))
    try:
        found = await view.find_events(
            wanted, after=events[0].seq, limit=STORY_REPORTS, patience=_SEARCH
        )
    except SearchTooLong:
        return ()
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


class Forecasts:
    """What the DNS says of domains today: what `relay explain` says of a message to each.

    A page waits a moment for the answer. The look-up goes on, and the resolver keeps what it finds,
    so that the page has the answer when it is loaded again.
    """

    def __init__(self, state: Web) -> None:
        self._state = state
        self._asked: dict[str, asyncio.Task[Mapping[str, Any]]] = {}

    async def of(self, domain: str) -> tuple[Mapping[str, Any] | None, str]:
        """The answer, or None and why there is none yet."""
        task = self._asked.get(domain)
        if task is None:
            if len(self._asked) >= _LOOK_UPS_AT_ONCE:
                return None, "too much is being looked up"
            task = self._asked[domain] = asyncio.create_task(self._look_up(domain))
            task.add_done_callback(partial(self._forget, domain))
        try:
            async with asyncio.timeout(_LOOK_UP_SECONDS):
                return await asyncio.shield(task), ""
        except TimeoutError:
            return None, "the name servers have not answered yet"
        except (SpoolError, RequestError) as error:
            return None, str(error)

    def _forget(self, domain: str, task: asyncio.Task[Mapping[str, Any]]) -> None:
        del self._asked[domain]
        if not task.cancelled():
            task.exception()  # the page that asked may be gone

    async def close(self) -> None:
        """Look nothing up any more."""
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look_up(self, domain: str) -> Mapping[str, Any]:
        async with asyncio.timeout(_LOOK_UP_ENDS_SECONDS):
            running = self._state.operator.running()
            return await running.explain("", f"postmaster@{domain}", Wishes())
