"""Everything that is read from the queue, on a thread and a read-only connection of its own.

Each question is answered in short reads: a long one would keep the write-ahead log from being
folded back, and everybody else waiting. So a search goes through its table in windows, and of all
searches one window waits at a time: any other question comes before the next. Large content comes
piece by piece from its file, on threads of its own. The same questions are asked of a running
relay's queue and of a stopped one's.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

from relay.queue.engine_reader import EngineReader
from relay.queue.event_search import Stream
from relay.queue.nodes import Node
from relay.queue.sqlite import destinations, events, messages, statistics, tls_sessions
from relay.queue.sqlite.api_state import domain_settings
from relay.queue.sqlite.disk import DATABASE, open_reader, open_stopped, translated
from relay.queue.sqlite.files import CONTENT, WholeFile
from relay.queue.store import CHUNK_BYTES, ContentFile, SpoolError

T = TypeVar("T")
P = ParamSpec("P")


def asks(
    question: Callable[Concatenate[sqlite3.Connection, P], T],
) -> Callable[Concatenate[Reader, P], Coroutine[object, object, T]]:
    """A method of `Reader` that asks this question."""

    async def ask(reader: Reader, /, *args: P.args, **named: P.kwargs) -> T:
        return await reader.ask(question, *args, **named)

    return ask


def searches(
    question: Callable[Concatenate[sqlite3.Connection, P], T],
) -> Callable[Concatenate[Reader, P], Coroutine[object, object, T]]:
    """The same, for one step of a long search."""

    async def search(reader: Reader, /, *args: P.args, **named: P.kwargs) -> T:
        async with reader.searching:
            return await reader.ask(question, *args, **named)

    return search


class Reader(EngineReader):
    """Asks one connection, on one thread."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], directory: Path) -> None:
        self._connect = connect
        self._directory = directory
        self._db: sqlite3.Connection | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="queue-reader")
        self._files = ThreadPoolExecutor(max_workers=4, thread_name_prefix="queue-content-reader")
        self.searching = asyncio.Lock()
        self.find_events = Stream(self._event_bounds, self._events_within).find_events
        self._closed = False

    @classmethod
    def of(cls, directory: Path) -> Reader:
        """A reader of a running relay's queue."""
        return cls(lambda: open_reader(directory / DATABASE), directory)

    async def ask(
        self,
        question: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **named: P.kwargs,
    ) -> T:
        """The answer of `question(connection, …)`."""

        def answer() -> T:
            if self._db is None:
                self._db = self._connect()
            return question(self._db, *args, **named)

        return await self._on(self._pool, answer)

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
            with closing(await self._open(queue_id, size_bytes)) as file:
                offset = 0
                while offset < size_bytes:
                    piece = file.read_at_once(offset)
                    if piece:
                        await asyncio.sleep(0)  # so that others get their turn
                    else:
                        piece = await self._on(self._files, file.read, offset)
                    offset += len(piece)
                    yield piece
        else:
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]

    async def open_content(self, queue_id: str) -> ContentFile | None:
        """The file of large content."""
        _, in_file, size_bytes = await self.ask(messages.content_of, queue_id)
        return _FileOnThreads(self, await self._open(queue_id, size_bytes)) if in_file else None

    async def _open(self, queue_id: str, size_bytes: int) -> WholeFile:
        return await self._on(
            self._files, WholeFile, self._directory / CONTENT / queue_id, size_bytes
        )

    async def read_file(self, file: WholeFile, offset: int, count: int) -> bytes:
        """Some of a file, on a thread."""
        return await self._on(self._files, file.read, offset, count)

    async def nodes(self) -> list[Node]:
        """Nobody shares the file."""
        return []

    _find_ids = searches(messages.find_ids)
    _list = searches(messages.listed)
    _find_change = searches(messages.find_change)
    _event_bounds = searches(events.event_bounds)
    _events_within = searches(events.events_within)
    find_message = asks(messages.item_of)
    counts = asks(messages.count_states)
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
    next_stored = asks(messages.next_due)
    leaving = asks(messages.leaving)


class _FileOnThreads:
    """A file whose reads wait for the disk on a thread."""

    def __init__(self, reader: Reader, file: WholeFile) -> None:
        self._reader = reader
        self._file = file
        self.size_bytes = file.size_bytes
        self.fileno = file.fileno
        self.is_in_memory = file.is_in_memory
        self.close = file.close

    async def read(self, offset: int, count: int) -> bytes:
        return await self._reader.read_file(self._file, offset, count)


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

    async def __aexit__(self, *_: object) -> None:
        await self.close()
