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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.queue.batch import Rows
from relay.queue.dispatch import Dispatch
from relay.queue.entry import Entry, State
from relay.queue.handoff import HandOffLimits, Shares
from relay.queue.request import Request, log_failure
from relay.queue.settle import Settlement
from relay.queue.sqlite import claims, tls_sessions
from relay.queue.sqlite.adopt import adopt
from relay.queue.sqlite.api_state import SqliteApiState
from relay.queue.sqlite.commit import Writer
from relay.queue.sqlite.contents import Contents
from relay.queue.sqlite.disk import DATABASE, Spool, check_quickly, open_reader
from relay.queue.sqlite.messages import count_states
from relay.queue.sqlite.reader import Reader
from relay.queue.sqlite.schema import migrate
from relay.queue.sqlite.staging import Staging
from relay.queue.sqlite.statements import Tables, unknown
from relay.queue.sqlite.statistics import purge_statistics
from relay.queue.store import (
    CHUNK_BYTES,
    ChangeStep,
    EventFilter,
    EventOfChange,
    NewMessage,
    PendingReport,
    QueueFilter,
    SpoolError,
    StoredEvent,
)
from relay.queue.tail import EventTail
from relay.queue.tls_sessions import ReportResult
from relay.queue.verbs import VERBS

__all__ = ["SqliteStore"]

_PURGE_STEP = 1000
_CHANGE_STEP = 500
_BEFORE_ALL = -(1 << 62)
_CHECK_LARGEST_BYTES = 64 * 1024 * 1024
_CHECK_WITHIN = timedelta(seconds=5)

T = TypeVar("T")

machine_time: Callable[[], datetime] = partial(datetime.now, UTC)
"""The clock of this machine: nobody else shares the queue. Each message asks for it six times."""


class SqliteStore(Reader):
    """Open with `SqliteStore.open`; see `relay.queue.store.Store` for what each method promises.

    What only reads is inherited.
    """

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
        super().__init__(lambda: open_reader(spool.directory / DATABASE), spool.directory)
        self.spool = spool
        self._contents = Contents(spool)
        self._staging = staging = Staging(self._contents, partial(self._write, unknown))
        self.stage = staging.stage
        self.discard = staging.discard
        self._tail = EventTail()
        self._tables = Tables(spool.directory, on_gone=self._contents.remove)
        self.writer = Writer(
            spool,
            self._tables,
            synchronous=synchronous,
            prepare=partial(self._prepare, now=now, latest=latest, adopting=adopting),
            on_events=self._tail.add,
            on_well=self._staging.remove_refused,
        )
        self.api_state = SqliteApiState(self.ask, self._write)
        self._dispatch = dispatch = Dispatch(limits, self)
        self.claim_due = dispatch.claim_due
        self.next_due = dispatch.next_due
        self.wait_for_work = dispatch.wait_for_work
        self.before_change = dispatch.before_change
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
        # The reader first: the last connection to close folds the write-ahead log back.
        await super().close()
        await self.writer.close()
        await asyncio.get_running_loop().run_in_executor(None, self._contents.close)
        self.spool.close()

    lost = None

    def not_ready(self) -> str:
        """A client hears of a full disk, and a restart cures no other."""
        return ""

    def may_begin(self, entry: Entry) -> bool:
        """A claim holds until this process ends it."""
        return True

    # Taking in.

    async def accept(self, new: NewMessage) -> None:
        """Take responsibility."""
        rows = Rows(takes_in=True)
        if new.staged_bytes or len(new.content) > CHUNK_BYTES:
            rest = [replace(new, content=b"")]
            await self._staging.accept(new, partial(self._commit_with, rest, rows, in_file=True))
        else:
            await self._commit_with([new], rows)

    async def _commit_with(
        self,
        messages: Sequence[NewMessage],
        rows: Rows,
        *,
        in_file: bool = False,
        then: Callable[[], None] | None = None,
    ) -> Any:
        """Commit rows and new messages, then hand the messages' entries over."""
        entries: list[Entry] = []
        try:
            for new in messages:
                handed = self._dispatch.reserve(new, in_file=in_file)
                entries += handed
                claimed = {one.index for entry in handed for one in entry.recipients}
                rows.add_message(new, claimed=claimed, in_file=in_file)
                rows.events = [*rows.events, *new.events] if rows.events else new.events
        except BaseException:
            self._dispatch.give_up(entries)
            raise

        def committed(_: object) -> None:
            if then is not None:
                then()
            if messages:
                self._dispatch.accepted(messages, entries)

        request = Request(rows, on_commit=committed)
        request.on_failure = partial(self._dispatch.give_up, entries)
        return await self._submit(request)

    # Handing out: see `Dispatch`.

    async def claim_stored(
        self,
        now: datetime,
        limit: int,
        skip: Collection[str],
        shares: Shares,
        only: Collection[str] | None,
    ) -> list[Entry]:
        """Entries from disk."""
        request, cursor = Request(), self._cursor
        entries: list[Entry] = []

        def claim(db: sqlite3.Connection) -> tuple[list[Entry], str | None]:
            return claims.claim(db, now, limit, skip, shares.copy(), cursor, only)

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

    async def give_back(self, entries: Sequence[Entry]) -> None:
        """Have claimed entries wait on disk, due at once."""
        await self._write(claims.release, entries, None)

    def give_back_later(self, entries: Sequence[Entry]) -> None:
        """The same, without waiting for it."""
        if entries:
            request = Request(function=lambda db: claims.release(db, entries, None))
            request.on_commit = lambda _: self._dispatch.changed()
            request.future.add_done_callback(log_failure)
            self.writer.submit(request)

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        """Bring forward what a clock that was ahead has put off."""
        await self._write(claims.pull_forward, now, latest, then=self._dispatch.changed)

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """End a claim without an attempt."""
        later = partial(self._dispatch.due_later, due, entry.domain)
        await self._write(claims.release, [entry], due, then=later)

    # Results.

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
        sessions: Sequence[TlsSession] = (),
    ) -> bool:
        """Commit the results of an attempt; True: the pending report is to be sent now."""
        rows = Rows(events=events, sessions=(settlement.at, sessions) if sessions else None)
        rows.add_settlement(settlement)
        settled = partial(self._dispatch.settled, settlement)
        return await self._commit_with(reports, rows, then=settled) is True

    async def count_sessions(self, sessions: Sequence[TlsSession], *, at: datetime) -> None:
        """Count sessions that belong to no result."""
        await self._submit(Request(Rows(sessions=(at, sessions))))

    async def report(self, pending: PendingReport, reports: Sequence[NewMessage]) -> None:
        """Commit these DSNs, and that the report is sent."""
        rows = Rows()
        rows.add_report(pending)
        await self._commit_with(reports, rows)

    # Reports on TLS.

    async def claim_tls_report(self, day: date, domain: str, place: str) -> bool:
        """Take a report for sending."""
        return await self._write(tls_sessions.claim_report, day, domain, place)

    async def release_tls_report(self, day: date, domain: str, place: str) -> None:
        """End a claim."""
        await self._write(tls_sessions.release_report, day, domain, place)

    async def finish_tls_report(
        self,
        day: date,
        domain: str,
        place: str,
        result: ReportResult,
        *,
        message: NewMessage | None = None,
    ) -> None:
        """Commit what became of a report, and its mail, which has to wait where room is short."""
        rows = Rows(takes_in=message is not None, tls_reports=[(day, domain, place, result)])
        await self._commit_with([message] if message is not None else [], rows)

    async def finished_tls_reports(self, day: date, domain: str) -> Mapping[str, ReportResult]:
        """What became of the reports of a day and domain."""
        return await self.ask(tls_sessions.finished_reports, day, domain)

    async def domains_reported(self, day: date) -> set[str]:
        """The domains whose report of a day is finished."""
        return await self.ask(tls_sessions.domains_reported, day)

    async def purge_tls_sessions(self, *, before: date) -> int:
        """Remove what is of earlier days, a step at a time."""
        total = 0
        while count := await self._write(tls_sessions.purge_sessions, before, _PURGE_STEP):
            total += count
        return total

    # The operator.

    async def change(
        self,
        wanted: QueueFilter,
        *,
        verb: str,
        now: datetime,
        after: str = "",
        event_of: EventOfChange | None = None,
    ) -> ChangeStep:
        """The operator's verb on the next messages that match.

        The reader finds them and makes their events: the writer, which mail waits for, has
        little to do.
        """
        if verb not in VERBS:
            raise SpoolError(f"there is no verb {verb!r}")
        ids, until = await self.find_messages(wanted, now=now, after=after, limit=_CHANGE_STEP)
        if not ids:
            return ChangeStep(None)
        events = await self.events_of(ids, event_of) if event_of is not None else {}
        meant = replace(wanted, queue_ids=frozenset(ids))
        async with self._dispatch.stopped():
            changed = await self._change_named(meant, verb, now, events)
        return ChangeStep(until, len(changed.recipients), meant.queue_ids)

    async def _change_named(
        self, wanted: QueueFilter, verb: str, now: datetime, events: Mapping[tuple[str, int], Event]
    ) -> claims.Changed:
        request = Request()

        def change(db: sqlite3.Connection) -> claims.Changed:
            changed = claims.change(db, wanted, verb, now)
            theirs = [events[key] for key in changed.recipients if key in events]
            self._tables.write_events(db, request, theirs)
            return changed

        def done(changed: claims.Changed) -> None:
            self._dispatch.counts.add(changed.states)
            self._dispatch.changed()

        request.function, request.on_commit = change, done
        result: claims.Changed = await self._submit(request)
        return result

    async def write_event(self, event: Event) -> None:
        """Commit an event that tells of what an operator did."""
        await self._submit(Request(Rows(events=(event,))))

    async def counts(self) -> dict[State, int]:
        """Recipients in each state that is not final."""
        return self._dispatch.counts.get()

    # Events.

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """The next events: from memory where they are new."""
        newest = self._tail.after(seq, limit)
        return newest if newest is not None else await super().events_after(seq, limit=limit)

    async def log_written(self, seq: int) -> None:
        """Remember how far the log file is; written down with the next commit."""
        self._tables.note_mark(seq)

    async def log_mark(self) -> int:
        """How far the log file is."""
        return self._tables.mark

    async def last_seq(self) -> int:
        """The number of the newest event."""
        newest = await self.find_events(EventFilter(), limit=1, ascending=False)
        return newest[0].seq if newest else 0

    async def purge_events(self, *, before: datetime) -> int:
        """Remove old events that the log holds, a step at a time."""
        total = 0
        after: int | None = _BEFORE_ALL
        while after is not None:
            count, after = await self._write(
                claims.purge, before, self._tables.mark, after, _PURGE_STEP
            )
            total += count
            if count:
                self._tail.clear()
        return total

    async def purge_statistics(self, *, before: datetime) -> int:
        """Remove old statistics, a step at a time."""
        total = 0
        while count := await self._write(purge_statistics, before, _PURGE_STEP):
            total += count
        return total

    # The way to the writer.

    async def _submit(self, request: Request) -> Any:
        """Hand a request over and await its commit. Cancelling the wait does not stop the work."""
        try:
            self.writer.submit(request)
        except SpoolError:
            if request.on_failure is not None:
                request.on_failure()
            raise
        return await request.future

    async def _write(
        self, function: Callable[..., T], *args: object, then: Callable[[], None] | None = None
    ) -> T:
        """Commit what `function(connection, *args)` does; its result. `then` follows the commit."""
        request = Request(function=lambda db: function(db, *args))
        if then is not None:
            request.on_commit = lambda _: then()
        result: T = await self._submit(request)
        return result
