"""The durable queue in one SQLite file, with large content beside it: the `Store` a relay runs
with.

This is the shell that puts the parts together on the event loop: `Writer` writes, `Reader`
answers, `Contents` keeps what is large, `Dispatch` gives out what is due.

A claim is written down (see `schema`), so that no other claim finds it, and ends with
`record` or `release`; after a crash every claim is due at once. Better to deliver twice than
to lose mail.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

from relay.queue.change_steps import NamedChange
from relay.queue.division import all_of_it
from relay.queue.engine_store import EngineStore
from relay.queue.entry import Entry, State
from relay.queue.event_search import newest_seq
from relay.queue.handoff import ClaimQuery, HandOffLimits
from relay.queue.request import Request
from relay.queue.sqlite import claims, events, tls_sessions
from relay.queue.sqlite.adopt import adopt
from relay.queue.sqlite.api_state import SqliteApiState
from relay.queue.sqlite.commit import Writer
from relay.queue.sqlite.contents import Contents
from relay.queue.sqlite.disk import DATABASE, PAGE_BYTES, Spool, check_quickly, open_reader
from relay.queue.sqlite.messages import count_states
from relay.queue.sqlite.reader import Reader, asks
from relay.queue.sqlite.schema import migrate
from relay.queue.sqlite.staging import Staging
from relay.queue.sqlite.statements import Tables, unknown
from relay.queue.sqlite.statistics import purge_statistics
from relay.queue.store import CHUNK_BYTES
from relay.queue.verbs import Changed

_PURGE_STEP = 1000
_PAGES_OF_CHANGE = 2
"""A verb writes about so many pages for a recipient: rows of a long queue have pages of their own.
"""
_BEFORE_ALL = -(1 << 62)
_CHECK_LARGEST_BYTES = 64 * 1024 * 1024
_CHECK_WITHIN = timedelta(seconds=5)

T = TypeVar("T")
P = ParamSpec("P")

machine_time: Callable[[], datetime] = partial(datetime.now, UTC)
"""The clock of this machine: nobody else shares the queue. Each message asks for it six times."""


def writes(
    statement: Callable[Concatenate[sqlite3.Connection, P], T],
) -> Callable[Concatenate[SqliteStore, P], Coroutine[object, object, T]]:
    """A method of the store that commits what this statement does."""

    async def write(store: SqliteStore, /, *args: P.args, **named: P.kwargs) -> T:
        return await store._write(partial(statement, **named), *args)

    return write


class SqliteStore(Reader, EngineStore[sqlite3.Connection]):
    """Open with `SqliteStore.open`; see `relay.queue.store.Store` for what each method promises.

    What only reads is inherited from `Reader`, what all engines do from `EngineStore`.
    """

    writer: Writer
    _tables: Tables

    def __init__(
        self,
        spool: Spool,
        *,
        now: datetime,
        latest: datetime,
        adopting: Collection[Path],
        limits: HandOffLimits,
        synchronous: str,
    ) -> None:
        Reader.__init__(self, lambda: open_reader(spool.directory / DATABASE), spool.directory)
        EngineStore.__init__(self, limits, claims=claims, inline_bytes=CHUNK_BYTES)
        self.spool = spool
        self._contents = Contents(spool)
        self._staging = staging = Staging(self._contents, partial(self._write, unknown))
        self._tables = Tables(spool.directory, self._numbers, on_gone=self._contents.remove)
        self.writer = Writer(
            spool,
            self._tables,
            synchronous=synchronous,
            prepare=partial(self._prepare, now=now, latest=latest, adopting=adopting),
            on_events=self._tail.add,
            on_well=staging.remove_refused,
        )
        self.api_state = SqliteApiState(self.ask, self._write)
        self.clock = machine_time
        self._cursor: str | None = None

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        now: datetime | None = None,
        max_wait: timedelta = timedelta(days=1),
        reserve_bytes: int | None = None,
        lock_wait: timedelta = timedelta(seconds=3),
        limits: HandOffLimits | None = None,
        synchronous: str = "FULL",
        adopting: Collection[Path] = (),
    ) -> Self:
        """Take the directory, bring its database up to date and put right what a crash left.

        `max_wait`: the longest a recipient is ever deferred. `reserve_bytes`: no new mail while
        less room is left. `synchronous` is for tests. `adopting`: queues without a worker, to be
        taken over.
        """
        now = now or datetime.now(UTC)
        make = partial(Spool, directory, reserve_bytes=reserve_bytes, lock_wait=lock_wait)
        spool = await asyncio.get_running_loop().run_in_executor(None, make)
        try:
            store = cls(
                spool,
                now=now,
                latest=now + max_wait,
                adopting=adopting,
                limits=limits or HandOffLimits(),
                synchronous=synchronous,
            )
            await store.writer.start()
        except BaseException:
            spool.close()
            raise
        try:
            await store.ask(lambda db: None)
        except BaseException:
            await store.close()
            raise
        return store

    def _prepare(
        self, db: sqlite3.Connection, *, now: datetime, latest: datetime, adopting: Collection[Path]
    ) -> None:
        """On the writer's thread, before anything else."""
        check_quickly(db, largest_bytes=_CHECK_LARGEST_BYTES, within=_CHECK_WITHIN)
        migrate(db)
        # What a killed relay wrote last is read here as committed, and may not be synced yet. What
        # follows removes files because of it.
        self._tables.commit_something(db)
        self._contents.make_directory()
        adopt(db, self.spool.directory, adopting)
        claims.recover(db, self._contents, now, latest)
        self._dispatch.counts.set(count_states(db))

    async def close(self) -> None:
        """Finish what was begun and release the files."""
        self._steps.forget()
        # The reader first: the last connection to close folds the write-ahead log back.
        await super().close()
        await self.writer.close()
        await asyncio.get_running_loop().run_in_executor(None, self._contents.close)
        self.spool.close()

    lost = None

    def when_superseded(self, call: Callable[[str], None]) -> None:
        """A directory has one process, which holds a lock: nobody takes its place."""

    async def database_state(self) -> None:
        """No other process has anything to do with its files."""

    def not_ready(self) -> str:
        """A client hears of a full disk, and a restart cures no other."""
        return ""

    part = staticmethod(all_of_it)

    def when_divided_anew(self, call: Callable[[], Awaitable[bool]]) -> None:
        """This never happens."""

    def may_begin(self, entry: Entry) -> bool:
        """A claim holds until this process ends it."""
        return True

    # Handing out: see `Dispatch`.

    async def claim_stored(self, query: ClaimQuery, /) -> list[Entry]:
        """Entries from disk."""
        request, cursor = Request(), self._cursor
        entries: list[Entry] = []

        def claim(db: sqlite3.Connection) -> tuple[list[Entry], str | None]:
            return claims.claim(db, query.copy(), cursor)

        def claimed(result: tuple[list[Entry], str | None]) -> None:
            found, self._cursor = result
            if request.future.cancelled():
                self.give_back_later(found)
            else:
                entries.extend(found)

        request.function, request.on_commit = claim, claimed
        try:
            await self._submit(request)
        except BaseException:
            # No caller takes them any more: they are due again now, not after a restart.
            self.give_back_later(entries)
            raise
        return entries

    async def counts(self) -> dict[State, int]:
        """Recipients in each state that is not final."""
        return self._dispatch.counts.get()

    async def last_seq(self) -> int:
        """The number of the newest event."""
        return await newest_seq(self)

    def _change_rows(
        self, db: sqlite3.Connection, request: Request, change: NamedChange, /
    ) -> Changed:
        changed = claims.change(db, change.wanted, change.verb, change.now)
        self._tables.write_events(db, request, change.events_of(changed))
        request.function_bytes = _PAGES_OF_CHANGE * PAGE_BYTES * len(changed.recipients)
        return changed

    async def _write(self, statement: Callable[..., T], *args: object) -> T:
        """Commit what `statement(connection, *args)` does; its result."""
        result: T = await self._submit(Request(function=lambda db: statement(db, *args)))
        return result

    async def _purge_events(self, before: datetime, /) -> int:
        total = 0
        after: int | None = _BEFORE_ALL
        while after is not None:
            count, after = await self._purge_stretch(before, self._numbers.mark, after, _PURGE_STEP)
            total += count
        return total

    claim_tls_report = writes(tls_sessions.claim_report)
    release_tls_report = writes(tls_sessions.release_report)
    _stored_after = asks(events.events_after)
    _purge_stretch = writes(claims.purge_events)
    _purge_statistics = writes(purge_statistics)
    _purge_sessions = writes(tls_sessions.purge_sessions)
