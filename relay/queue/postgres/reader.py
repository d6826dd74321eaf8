"""Everything that is read from the queue, over connections that only read.

Each question is answered in short reads: a long one would keep the dead rows of all tables from
being removed. So a search goes through its table in windows, and of all searches one window waits
at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any, Protocol, TypeVar

from relay.mail.event import Event
from relay.queue import event_search
from relay.queue.api_state import DomainSettings
from relay.queue.destinations import DestinationPart
from relay.queue.entry import State
from relay.queue.event_search import is_over
from relay.queue.header import header_section
from relay.queue.nodes import Node
from relay.queue.postgres import destinations, events, messages, statistics, tls_sessions
from relay.queue.postgres.connection import Link, Server
from relay.queue.postgres.lease import nodes
from relay.queue.rows import micros
from relay.queue.statistics import CountedException, CountedMail, CountFilter, HourlyCount
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    EventOfChange,
    ListedMessage,
    PendingReport,
    QueuedItem,
    QueueFilter,
    StoredEvent,
    more_follows,
)
from relay.queue.tls_sessions import CountedSessions, DomainSessions

__all__ = ["Ask", "Reader"]

_ITEMS_AT_ONCE = 200
_SECONDS = 20.0
_LINKS = 2

T = TypeVar("T")


class Ask(Protocol):
    """Has a function work on a connection, which is its first argument."""

    async def __call__(self, question: Callable[..., Awaitable[T]], /, *args: Any) -> T: ...


class _Stream:
    """The events of one node."""

    def __init__(self, ask: Ask, node: int) -> None:
        self._ask = ask
        self._node = node

    async def find_events(
        self,
        wanted: EventFilter,
        *,
        after: int = 0,
        limit: int = 300,
        ascending: bool = True,
        patience: timedelta | None = None,
    ) -> list[StoredEvent]:
        began = time.monotonic()
        low, high = await self._ask(events.event_bounds, self._node, wanted, after, ascending)
        found: list[StoredEvent] = []
        while low <= high and len(found) < limit:
            some, reached = await self._ask(
                events.events_within,
                self._node,
                wanted,
                low,
                high,
                limit - len(found),
                ascending,
            )
            found += some
            low, high = (reached + 1, high) if ascending else (low, reached - 1)
            seconds = time.monotonic() - began
            if patience is not None and low <= high and is_over(patience, seconds, found, reached):
                break
        return found


class Reader:
    """Asks the server; see `relay.queue.store` for what each method promises."""

    def __init__(self, server: Server) -> None:
        self._links = [Link(server, seconds=_SECONDS) for _ in range(_LINKS)]
        self._searching = asyncio.Lock()

    async def ask(self, question: Callable[..., Awaitable[T]], /, *args: Any) -> T:
        """The answer of `question(connection, *args)`."""
        link = next((one for one in self._links if not one.is_busy), self._links[0])
        return await link.ask(question, *args)

    async def _search(self, question: Callable[..., Awaitable[T]], /, *args: Any) -> T:
        """The same, for one step of a long search."""
        async with self._searching:
            return await self.ask(question, *args)

    async def close(self) -> None:
        """Let the connections go."""
        for link in self._links:
            await link.close()

    # What `relay.queue.store` promises.

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces, in order. `SpoolError` where it is not whole."""
        content, in_pieces, size_bytes = await self.ask(messages.content_of, queue_id)
        if not in_pieces:
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]
            return
        offset = 0
        while offset < size_bytes:
            piece = await self.ask(messages.piece_of, queue_id, offset)
            offset += len(piece)
            yield piece

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
        """The nodes that share the queue."""
        return await self.ask(nodes)

    async def count_destinations(self, after: str) -> tuple[list[DestinationPart], str | None]:
        """The next step of a count of the queue by domain."""
        return await self._search(destinations.count_destinations, after)

    async def find_events(
        self,
        wanted: EventFilter,
        *,
        after: int = 0,
        limit: int = 300,
        ascending: bool = True,
        patience: timedelta | None = None,
    ) -> list[StoredEvent]:
        """A page of the events that match, of all nodes."""
        nodes = await self.ask(events.nodes)
        streams = [_Stream(self._search, node) for node in nodes]
        if len(streams) == 1:
            return await streams[0].find_events(
                wanted, after=after, limit=limit, ascending=ascending, patience=patience
            )
        if not streams:
            return []
        return await event_search.find_events(
            streams, wanted, after=after, limit=limit, ascending=ascending, patience=patience
        )

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
        from relay.queue.postgres.api_state import domain_settings

        return await self.ask(domain_settings)

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
        return await self.ask(messages.next_due, list(skip))
