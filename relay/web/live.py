"""Sends the newest events to all browsers that follow the log.

One task reads the store while somebody follows. Each viewer has a bounded buffer. Twice a second it
gets the rows that match its filter, at most `_ROWS_A_TICK`, and the number of rows left out. The
connection of a viewer that does not read ends after a while.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from relay.mail.newest import keep_newest
from relay.queue.event_matching import event_matches
from relay.queue.event_search import newest_seq
from relay.queue.store import EventFilter, EventPage, QueueView, SpoolError, StoredEvent
from relay.web.rows import EventRow, row_of

VIEWERS = 400
_TICK_SECONDS = 0.5
_PAGE = 500
_PAGES_A_TICK = 4
_ROWS_A_TICK = 40
_BUFFER = 200


class TooManyViewers(Exception):
    """As many browsers follow the log as may do so."""


@dataclass(eq=False)
class Viewer:
    """A browser that follows the log. `left_out`: events that matched, but are not in `rows`."""

    wanted: EventFilter
    rows: deque[StoredEvent] = field(default_factory=deque)
    left_out: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, found: list[StoredEvent]) -> None:
        """Add new events that match; of too many only the newest."""
        matching = [one for one in found if event_matches(one.event, self.wanted)]
        if not matching:
            return
        self.left_out += max(len(matching) - _ROWS_A_TICK, 0)
        for one in matching[-_ROWS_A_TICK:]:
            if len(self.rows) >= _BUFFER:
                self.rows.popleft()
                self.left_out += 1
            self.rows.append(one)
        self.news.set()

    def skip(self, count: int) -> None:
        """Count events that nobody looked at."""
        self.left_out += count
        self.news.set()

    def take(self) -> tuple[list[StoredEvent], int]:
        """The events since the last call, and how many were left out."""
        rows, left_out = list(self.rows), self.left_out
        self.rows.clear()
        self.left_out = 0
        self.news.clear()
        return rows, left_out


class Live:
    """Reads the store for all viewers."""

    def __init__(self, view: QueueView, render: Callable[[EventRow], str]) -> None:
        self._view = view
        self._render = render
        self._viewers: set[Viewer] = set()
        self._reading: asyncio.Task[None] | None = None
        self._rendered: dict[int, str] = {}

    @property
    def viewers(self) -> int:
        """How many browsers follow the log."""
        return len(self._viewers)

    async def follow(self, wanted: EventFilter) -> AsyncGenerator[tuple[str, int], None]:
        """The new rows as HTML, newest first, and how many were left out.

        ("", 0) after ten seconds without one, so that the connection stays open.
        """
        if len(self._viewers) >= VIEWERS:
            raise TooManyViewers
        viewer = Viewer(wanted)
        self._viewers.add(viewer)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(10):
                        await viewer.news.wait()
                rows, left_out = viewer.take()
                yield "".join(self._html(one) for one in reversed(rows)), left_out
        finally:
            self._viewers.discard(viewer)

    async def close(self) -> None:
        """End the task."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    def _html(self, stored: StoredEvent) -> str:
        """A row as HTML, made once for all viewers."""
        found = self._rendered.get(stored.seq)
        if found is None:
            found = self._render(row_of(stored.seq, stored.event))
            keep_newest(self._rendered, stored.seq, found, most=_BUFFER)
        return found

    async def _read(self) -> None:
        after = await self._newest()
        while self._viewers:
            with suppress(SpoolError):
                after = await self._look(after)
            await asyncio.sleep(_TICK_SECONDS)

    async def _newest(self) -> int:
        with suppress(SpoolError):
            return await newest_seq(self._view)
        return 0

    async def _look(self, after: int) -> int:
        found: list[StoredEvent] = []
        for _ in range(_PAGES_A_TICK):
            page = await self._view.find_events(EventFilter(), EventPage(after, _PAGE))
            found += page
            after = page[-1].seq if page else after
            if len(page) < _PAGE:
                break
        else:
            newest = await self._newest()
            for viewer in self._viewers:
                viewer.skip(1)
            after = newest
        for viewer in self._viewers:
            viewer.offer(found)
        return after


def message(html: str, left_out: int) -> bytes:
    """One server-sent event, or a comment that keeps the connection open."""
    if not html and not left_out:
        return b": still here\n\n"
    return f"data: {json.dumps({'rows': html, 'left_out': left_out})}\n\n".encode()
