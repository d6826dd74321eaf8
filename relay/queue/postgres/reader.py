"""Everything that is read from the queue, over connections that only read.

Each question is answered in short reads: a long one would keep the dead rows of all tables from
being removed. So a search goes through its table in windows, and of all searches one window waits
at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from relay.queue.engine_reader import EngineReader
from relay.queue.event_search import Stream, Streams
from relay.queue.postgres import destinations, events, messages, statistics, tls_sessions
from relay.queue.postgres.api_state import domain_settings
from relay.queue.postgres.connection import Db, Link, Server
from relay.queue.postgres.nodes import nodes
from relay.queue.store import CHUNK_BYTES, FIRST_PAGE, EventFilter, EventPage, StoredEvent

_SECONDS = 20.0
_LINKS = 2

T = TypeVar("T")
P = ParamSpec("P")


def asks(
    question: Callable[Concatenate[Db, P], Awaitable[T]],
) -> Callable[Concatenate[Reader, P], Coroutine[object, object, T]]:
    """A method of `Reader` that asks this question."""

    async def ask(reader: Reader, /, *args: P.args, **named: P.kwargs) -> T:
        return await reader.ask(question, *args, **named)

    return ask


def searches(
    question: Callable[Concatenate[Db, P], Awaitable[T]],
) -> Callable[Concatenate[Reader, P], Coroutine[object, object, T]]:
    """The same, for one step of a long search."""

    async def search(reader: Reader, /, *args: P.args, **named: P.kwargs) -> T:
        async with reader.searching:
            return await reader.ask(question, *args, **named)

    return search


class Reader(EngineReader):
    """Asks the server; see `relay.queue.store` for what each method promises."""

    def __init__(self, server: Server) -> None:
        self._links = [Link(server, seconds=_SECONDS) for _ in range(_LINKS)]
        self.searching = asyncio.Lock()

    async def ask(
        self, question: Callable[Concatenate[Db, P], Awaitable[T]], *args: P.args, **named: P.kwargs
    ) -> T:
        """The answer of `question(connection, …)`."""
        link = next((one for one in self._links if not one.is_busy), self._links[0])
        return await link.ask(question, *args, **named)

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

    async def find_events(
        self, wanted: EventFilter, page: EventPage = FIRST_PAGE
    ) -> list[StoredEvent]:
        """A page of the events that match, of all nodes."""
        streams = [
            Stream(partial(self._event_bounds, node), partial(self._events_within, node))
            for node in await self.ask(events.nodes)
        ]
        if not streams:
            return []
        stream = streams[0] if len(streams) == 1 else Streams(streams)
        return await stream.find_events(wanted, page)

    _find_ids = searches(messages.find_ids)
    _list = searches(messages.listed)
    _find_change = searches(messages.find_change)
    _event_bounds = searches(events.event_bounds)
    _events_within = searches(events.events_within)
    find_message = asks(messages.item_of)
    counts = asks(messages.count_states)
    nodes = asks(nodes)
    count_destinations = searches(destinations.count_destinations)
    count_mail = asks(statistics.count_mail)
    count_hours = asks(statistics.count_hours)
    find_exceptions = asks(statistics.find_exceptions)
    finished_tls_reports = asks(tls_sessions.finished_reports)
    domains_reported = asks(tls_sessions.domains_reported)
    tls_days = asks(tls_sessions.days)
    tls_domains = asks(tls_sessions.domains)
    tls_sessions = asks(tls_sessions.sessions)
    domain_settings = asks(domain_settings)
    pending_reports = asks(messages.pending_reports)
    pending_report = asks(messages.pending_report)
    leaving = asks(messages.leaving)
