"""Everything that is read from the queue, on a thread and a read-only connection of its own.

Each question is answered in short reads: a long one would keep the write-ahead log from being
folded back, and everybody else waiting. So a search goes through its table in windows, and of all
searches one window waits at a time: any other question comes before the next. Large content comes
piece by piece from its file, on threads of its own. The same questions are asked of a running
relay's queue and of a stopped one's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from relay.mail.event import Event
from relay.queue.api_state import DomainSettings
from relay.queue.destinations import DestinationPart
from relay.queue.entry import State
from relay.queue.event_search import is_over
from relay.queue.header import header_section
from relay.queue.nodes import Node
from relay.queue.rows import micros
from relay.queue.sqlite import destinations, events, messages, statistics, tls_sessions
from relay.queue.sqlite.api_state import domain_settings
from relay.queue.sqlite.disk import DATABASE, open_reader, open_stopped, translated
from relay.queue.sqlite.files import CONTENT, read_piece
from relay.queue.statistics import CountedException, CountedMail, CountFilter, HourlyCount
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    EventOfChange,
    ListedMessage,
    PendingReport,
    QueuedItem,
    QueueFilter,
    SpoolError,
    StoredEvent,
    more_follows,
)
from relay.queue.tls_sessions import CountedSessions, DomainSessions

__all__ = ["Reader", "StoppedQueue"]

_ITEMS_AT_ONCE = 200

T = TypeVar("T")


class Reader:
    """Asks one connection, on one thread."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], directory: Path) -> None:
        self._connect = connect
        self._directory = directory
        self._db: sqlite3.Connection | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="queue-reader")
        self._files = ThreadPoolExecutor(max_workers=4, thread_name_prefix="queue-content-reader")
        self._searching = asyncio.Lock()
        self._closed = False

    @classmethod
    def of(cls, directory: Path) -> Reader:
        """A reader of a running relay's queue."""
        return cls(lambda: open_reader(directory / DATABASE), directory)

    async def ask(self, question: Callable[..., T], *args: object) -> T:
        """The answer of `question(connection, *args)`."""
        return await self._on(self._pool, self._answer, question, args)

    async def _search(self, question: Callable[..., T], *args: object) -> T:
        """The same, for one step of a long search."""
        async with self._searching:
            return await self.ask(question, *args)

    def _answer(self, question: Callable[..., T], args: tuple[object, ...]) -> T:
        if self._db is None:
            self._db = self._connect()
        return question(self._db, *args)

    async def _on(self, threads: ThreadPoolExecutor, work: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise SpoolError("the queue is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work, *args)
        except (sqlite3.Error, OSError) as exc:
            raise translated(exc) from exc

    async def close(self) -> None:
        """Let the connection go."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._pool, self._let_go)
            self._pool.shutdown(wait=True)
            self._files.shutdown(wait=True)

    def _let_go(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # What `relay.queue.store` promises.

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces, in order. `SpoolError` where it is not whole."""
        content, in_file, size_bytes = await self.ask(messages.content_of, queue_id)
        if in_file:
            path = self._directory / CONTENT / queue_id
            for offset in range(0, size_bytes, CHUNK_BYTES):
                yield await self._on(self._files, read_piece, path, offset, size_bytes)
        else:
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section."""
        return await header_section(self.read_content(queue_id), limit_bytes=limit_bytes)

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[ListedMessage]:
        """A page of what matches, by queue id."""
        found: list[ListedMessage] = []
        reached: str | None = after
        while reached is not None and not more_follows(found, limit):
            few = min(limit - len(found), _ITEMS_AT_ONCE)
            ids, reached = await self._search(messages.find_ids, wanted, now, reached, few)
            found += await self._search(messages.listed, ids)
        return found

    async def find_message(self, queue_id: str) -> QueuedItem | None:
        """All that is kept about one message."""
        return await self.ask(messages.item_of, queue_id)

    async def find_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str, limit: int
    ) -> tuple[list[str], str | None]:
        """The ids of some that match, and up to where the queue was looked through; None: to its
        end.
        """
        ids: list[str] = []
        reached: str | None = after
        while reached is not None and not ids:
            ids, reached = await self._search(messages.find_ids, wanted, now, reached, limit)
        return ids, reached

    async def events_of(
        self, ids: Sequence[str], event_of: EventOfChange
    ) -> dict[tuple[str, int], Event]:
        """The event of each recipient that is not final, by queue id and index."""
        found: dict[tuple[str, int], Event] = {}
        for start in range(0, len(ids), _ITEMS_AT_ONCE):
            some = ids[start : start + _ITEMS_AT_ONCE]
            found |= await self._search(messages.events_of, some, event_of)
        return found

    async def counts(self) -> Mapping[State, int]:
        """Recipients in each state that is not final."""
        return await self.ask(messages.count_states)

    async def nodes(self) -> list[Node]:
        """Nobody shares the file."""
        return []

    async def count_destinations(self, after: str) -> tuple[list[DestinationPart], str | None]:
        """The next step of a count of the queue by domain."""
        return await self._search(destinations.count_destinations, after)

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """The next events."""
        return await self.ask(events.events_after, seq, limit)

    async def find_events(
        self,
        wanted: EventFilter,
        *,
        after: int = 0,
        limit: int = 300,
        ascending: bool = True,
        patience: timedelta | None = None,
    ) -> list[StoredEvent]:
        """A page of the events that match."""
        began = time.monotonic()
        low, high = await self._search(events.event_bounds, wanted, after, ascending)
        found: list[StoredEvent] = []
        while low <= high and len(found) < limit:
            some, reached = await self._search(
                events.events_within, wanted, low, high, limit - len(found), ascending
            )
            found += some
            low, high = (reached + 1, high) if ascending else (low, reached - 1)
            seconds = time.monotonic() - began
            if patience is not None and low <= high and is_over(patience, seconds, found, reached):
                break
        return found

    async def count_mail(self, wanted: CountFilter) -> list[CountedMail]:
        """The counts of a period, added up over its hours."""
        return await self.ask(statistics.count_mail, wanted)

    async def count_hours(self, wanted: CountFilter) -> list[HourlyCount]:
        """The counts of a period by the hour."""
        return await self.ask(statistics.count_hours, wanted)

    async def find_exceptions(
        self,
        wanted: CountFilter,
        *,
        after: tuple[datetime, str] | None = None,
        limit: int = 500,
        newest: bool = False,
    ) -> list[CountedException]:
        """A page of the exceptions by time."""
        return await self.ask(statistics.find_exceptions, wanted, after, limit, newest)

    async def tls_days(self) -> list[date]:
        """The days of which sessions are kept."""
        return await self.ask(tls_sessions.days)

    async def tls_domains(
        self, day: date, *, after: str = "", limit: int = 500
    ) -> list[DomainSessions]:
        """A page of the domains that had sessions in a day."""
        return await self.ask(tls_sessions.domains, day, after, limit)

    async def tls_sessions(self, day: date, domain: str) -> list[CountedSessions]:
        """The sessions of a day and domain."""
        return await self.ask(tls_sessions.sessions, day, domain)

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        """What was set over HTTP, by sender domain."""
        return await self.ask(domain_settings)

    async def log_mark(self) -> int:
        """Up to where the log file holds the events."""
        return await self.ask(events.log_mark)

    async def pending_reports(
        self, *, now: datetime, pending_since: datetime, limit: int = 100
    ) -> list[str]:
        """Messages whose pending report is to be sent."""
        return await self.ask(messages.pending_reports, micros(now), micros(pending_since), limit)

    async def pending_report(self, queue_id: str) -> PendingReport | None:
        """What the sender of a message is still to be told."""
        return await self.ask(messages.pending_report, queue_id)

    async def next_stored(self, skip: Collection[str]) -> datetime | None:
        """When the next unclaimed recipient outside `skip` is due, or a little earlier."""
        return await self.ask(messages.next_due, json.dumps(list(skip)))


class StoppedQueue(Reader):
    """The queue of a relay that does not run: all that can be looked at, nothing that changes."""

    def __init__(self, directory: Path) -> None:
        self._lock_fd = -1
        super().__init__(lambda: self._connect_stopped(directory), directory)

    @classmethod
    async def open(cls, directory: Path) -> Self:
        """Open it, or raise `SpoolError`: it is in use, is not there, or cannot be read."""
        stopped = cls(directory)
        try:
            await stopped.ask(lambda db: None)
        except SpoolError:
            await stopped.close()
            raise
        return stopped

    def _connect_stopped(self, directory: Path) -> sqlite3.Connection:
        db, self._lock_fd = open_stopped(directory)
        return db

    async def close(self) -> None:
        """Let the next relay have the queue."""
        await super().close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
