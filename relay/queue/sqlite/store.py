"""The durable queue in one SQLite file, with large content beside it: the `Store` a relay runs
with.

This is the shell that puts the parts together on the event loop: `Writer` commits, `Reader`
answers, `Contents` keeps what is large, `HandOff` is the short way from `accept` to `claim_due` for
mail that is due at once.

A claim is written down (see `schema`), so that no other claim finds it, and ends with
`record` or `release`; after a crash every claim is due at once. Better to deliver twice than
to lose mail.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from relay.mail.event import Event
from relay.queue.due import DueHint, Place, first_place, is_due_at_once, settled_place
from relay.queue.entry import Entry, QueuedRecipient, State
from relay.queue.handoff import HandOff, HandOffLimits, Shares
from relay.queue.rows import STATE_NUMBER, message_data, micros, pending_data, recipient_data
from relay.queue.settle import Settlement
from relay.queue.sqlite import claims
from relay.queue.sqlite.adopt import adopt
from relay.queue.sqlite.api_state import SqliteApiState
from relay.queue.sqlite.contents import Contents
from relay.queue.sqlite.disk import Spool, check_quickly
from relay.queue.sqlite.reader import Reader, count_states
from relay.queue.sqlite.schema import migrate
from relay.queue.sqlite.writer import Call, Rows, Writer, commit_something, unknown
from relay.queue.store import (
    CHUNK_BYTES,
    ChangeStep,
    EventFilter,
    EventOfChange,
    ListedMessage,
    NewMessage,
    PendingReport,
    QueuedItem,
    QueueFilter,
    SpoolError,
    StoredEvent,
)
from relay.queue.verbs import VERBS

__all__ = ["SqliteStore"]

log = logging.getLogger(__name__)

_TAIL_EVENTS = 4096
_PURGE_STRETCH = 1000
_STRETCH = 500
_BEFORE_ALL = -(1 << 62)
_CHECK_LARGEST_BYTES = 64 * 1024 * 1024
_CHECK_WITHIN = timedelta(seconds=5)

T = TypeVar("T")


class SqliteStore:
    """Open with `SqliteStore.open`; see `relay.queue.store.Store` for what each method promises."""

    def __init__(self, spool: Spool, *, limits: HandOffLimits, synchronous: str) -> None:
        self._spool = spool
        self._handoff = HandOff(limits)
        self._limits = limits
        self._reader = Reader.of(spool.directory)
        self._contents = Contents(spool)
        self._staged: set[str] = set()
        self._under_way: set[asyncio.Future[None]] = set()
        self._in_doubt: set[str] = set()
        self._writer = Writer(
            spool,
            synchronous=synchronous,
            prepare=self._prepare,
            on_events=self._on_events,
            on_gone=self._contents.remove,
            on_well=self._when_well,
        )
        self.api_state = SqliteApiState(self._reader.ask, self._call)
        self._work = asyncio.Event()
        self._counts = dict.fromkeys((State.QUEUED, State.DEFERRED, State.HELD), 0)
        self._cursor: str | None = None
        self._give_back: list[Callable[[], Awaitable[None]]] = []
        self._claiming = asyncio.Lock()
        self._due = DueHint()
        self._turn = 0
        self._tail: list[StoredEvent] = []
        self._now = self._latest = datetime.now(UTC)
        self._adopt: Collection[Path] = ()

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
        less room is left. `synchronous` is for tests. `adopting`: queues without an owner, to be
        taken over.
        """
        now = now or datetime.now(UTC)
        make = partial(Spool, directory, reserve_bytes=reserve_bytes, lock_wait=lock_wait)
        spool = await asyncio.get_running_loop().run_in_executor(None, make)
        try:
            store = cls(spool, limits=limits or HandOffLimits(), synchronous=synchronous)
            store._now, store._latest, store._adopt = now, now + max_wait, adopting
            await store._writer.start()
        except BaseException:
            spool.close()
            raise
        try:
            await store._reader.ask(lambda db: None)
        except BaseException:
            await store.close()
            raise
        return store

    def _prepare(self, db: sqlite3.Connection) -> None:
        """On the writer's thread, before anything else."""
        check_quickly(db, largest_bytes=_CHECK_LARGEST_BYTES, within=_CHECK_WITHIN)
        migrate(db)
        # What a killed relay wrote last is read here as committed, and may not be synced yet. What
        # follows removes files because of it.
        commit_something(db, self._spool.directory)
        self._contents.make_directory()
        adopt(db, self._spool.directory, self._adopt)
        claims.recover(db, self._contents, self._now, self._latest)
        self._counts = count_states(db)

    async def close(self) -> None:
        """Finish what was begun and let the files go."""
        # The reader first: the last connection to close folds the write-ahead log back.
        await self._reader.close()
        await self._writer.close()
        await asyncio.get_running_loop().run_in_executor(None, self._contents.close)
        self._spool.close()

    # Taking in.

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Take a piece of content ahead of its message."""
        if len(piece) > CHUNK_BYTES:
            raise SpoolError(f"a piece of {len(piece)} octets is too large")
        self._staged.add(queue_id)
        await self._contents.append(queue_id, offset, piece)

    async def discard(self, queue_id: str) -> None:
        """Forget what was staged, unless its message was given to `accept`."""
        if queue_id in self._staged:
            self._staged.remove(queue_id)
            self._contents.remove([queue_id])

    async def accept(self, new: NewMessage) -> None:
        """Take responsibility."""
        if new.staged_bytes or len(new.content) > CHUNK_BYTES:
            self._staged.discard(new.message.queue_id)
            await asyncio.shield(self._to_its_end(self._accept_large(new)))
        else:
            await self._accept(new)

    async def _accept_large(self, new: NewMessage) -> None:
        """The file first: the commit must not tell of what is not on the disk."""
        queue_id = new.message.queue_id
        try:
            await self._contents.complete(queue_id, new.staged_bytes, new.content)
            await self._accept(replace(new, content=b""), in_file=True)
        except Exception:
            self._in_doubt.add(queue_id)
            await self._clear_up()
            raise

    def _to_its_end(self, work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _clear_up(self) -> None:
        """Remove the files of what was refused, unless a commit tells of it after all."""
        asked = frozenset(self._in_doubt)
        with suppress(
            SpoolError
        ):  # asked again when the database is well; what stays goes at the next start
            refused = await self._call(partial(unknown, asked))
            self._in_doubt -= asked
            self._contents.remove(refused)

    def _when_well(self) -> None:
        self._to_its_end(self._clear_up())

    async def _accept(self, new: NewMessage, *, in_file: bool = False) -> None:
        rows = Rows(self._future(), takes_in=True, events=new.events)
        entries = self._add_message(rows, new, in_file=in_file)
        if all(one.state.is_final for one in new.recipients):
            rows.perhaps_done.append(new.message.queue_id)  # for nobody: a message in test mode
        rows.on_commit = lambda _: self._accepted([new], entries)
        rows.on_failure = partial(self._give_up, entries)
        await self._submit(rows)

    def _add_message(self, rows: Rows, new: NewMessage, *, in_file: bool = False) -> list[Entry]:
        """The rows of a new message; returns the entries that are handed over as soon as it is
        committed.
        """
        message = new.message
        entries = self._entries(new, in_file=in_file)
        soonest = () if message.origin == "dsn" else entries[: self._limits.entries_per_message]
        handed = [entry for entry in soonest if self._handoff.reserve(entry)]
        try:
            claimed = {one.index for entry in handed for one in entry.recipients}
            arrived = micros(message.arrived)
            rows.messages.append(
                (
                    message.queue_id,
                    arrived,
                    message.size_bytes,
                    len(new.recipients),
                    in_file,
                    message.reverse_path,
                    message_data(message),
                    None if in_file else new.content,
                )
            )
            for one in new.recipients:
                place, due = first_place(message, one)
                if one.index in claimed:
                    place = Place.CLAIMED
                rows.recipients.append(_recipient_row(message.queue_id, one, place, due))
        except BaseException:
            self._give_up(handed)
            raise
        rows.size_bytes += len(new.content)
        return handed

    def _entries(self, new: NewMessage, *, in_file: bool) -> list[Entry]:
        """What of a new message is due at once, by domain."""
        small = not in_file and len(new.content) <= self._limits.content_bytes
        kept = new.content if small else None
        total = len(new.recipients)
        if total == 1 and is_due_at_once(new.message, new.recipients[0]):
            return [Entry(new.message, new.recipients, kept, total)]
        by_domain: dict[str, list[QueuedRecipient]] = {}
        for one in new.recipients:
            if is_due_at_once(new.message, one):
                by_domain.setdefault(one.domain, []).append(one)
        return [Entry(new.message, tuple(those), kept, total) for those in by_domain.values()]

    def _accepted(self, messages: Sequence[NewMessage], entries: list[Entry]) -> None:
        """After the commit, on the event loop."""
        for entry in entries:
            self._handoff.put(entry)
        handed = sum(len(entry.recipients) for entry in entries)
        for new in messages:
            handed -= len(new.recipients)
            for one in new.recipients:
                if one.state in self._counts:
                    self._counts[one.state] += 1
                # What is due at once was handed over, or is seen to below.
                if one.next_attempt is not None and not is_due_at_once(new.message, one):
                    self._due.sooner(one.next_attempt, one.domain)
        if handed:
            self._due.now()
        self._work.set()

    def _give_up(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._handoff.give_up(entry)

    # Handing out.

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        limit_per_domain: int | None = None,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> list[Entry]:
        """Entries that are due: from the hand-off, and for a fair part from disk where some wait
        there.
        """
        if limit <= 0:
            return []
        async with self._claiming:
            return await self._claim_due(now, limit, limit_per_domain, skip, only)

    async def _claim_due(
        self,
        now: datetime,
        limit: int,
        limit_per_domain: int | None,
        skip: Collection[str],
        only: Collection[str] | None,
    ) -> list[Entry]:
        shares = Shares(limit_per_domain)
        if skip and self._handoff.is_crowded:
            await self._spill(self._handoff.take_of(skip))
        if only is not None and self._handoff.is_crowded:
            await self._spill(self._handoff.take_but(only))
        if not self._due.may_be_due(now, skip):
            return self._handoff.take(limit, skip, shares, only)
        self._turn ^= 1
        at_once = self._handoff.take((limit + self._turn) // 2, skip, shares, only)
        try:
            stored = await self._claim_stored(now, limit - len(at_once), skip, shares, only)
        except BaseException:
            self._put_back(at_once)
            raise
        left = limit - len(at_once) - len(stored)
        return at_once + stored + self._handoff.take(left, skip, shares, only)

    async def _claim_stored(
        self,
        now: datetime,
        limit: int,
        skip: Collection[str],
        shares: Shares,
        only: Collection[str] | None,
    ) -> list[Entry]:
        """Entries from disk."""
        if limit <= 0:
            return []
        before = self._due.begin()
        call = Call(self._future())
        cursor = self._cursor
        call.function = lambda db: claims.claim(db, now, limit, skip, shares.copy(), cursor, only)
        entries: list[Entry] = []

        def claimed(result: tuple[list[Entry], str | None]) -> None:
            found, self._cursor = result
            if call.future.cancelled():
                self._return_claims(found)
            else:
                entries.extend(found)

        call.on_commit = claimed
        try:
            await self._submit(call)
            if len(entries) < limit and only is None:
                self._due.learn(before, await self._reader.next_due(list(skip)), skip)
        except BaseException:
            # Nobody is there to take them: they go back, and do not wait for a restart.
            self._return_claims(entries)
            raise
        shares.taken.update(entry.domain for entry in entries)
        return entries

    def _return_claims(self, entries: list[Entry]) -> None:
        if entries:
            call = Call(
                self._future(), function=partial(_without_result, claims.release, entries, None)
            )
            call.on_commit = lambda _: self._changed()
            call.future.add_done_callback(_log_failure)
            self._writer.submit(call)

    def _put_back(self, entries: list[Entry]) -> None:
        """Entries that could not be given out wait in the hand-off again, where they had their
        room.
        """
        full = [entry for entry in entries if not self._handoff.reserve(entry)]
        for entry in entries:
            if entry not in full:
                self._handoff.put(entry)
        self._return_claims(full)

    async def _spill(self, entries: list[Entry]) -> None:
        """Let entries wait on disk, so that the hand-off has room for others."""
        if entries:
            try:
                await self._call(partial(_without_result, claims.release, entries, None))
            except SpoolError:
                self._put_back(entries)
                raise
            self._due.now()

    async def next_due(self, *, skip: Collection[str] = ()) -> datetime | None:
        """When there is something to claim."""
        waiting = self._handoff.oldest(skip)
        if waiting is not None:
            return waiting.message.arrived
        if self._due.is_about(skip):
            return self._due.due
        before = self._due.begin()
        found = await self._reader.next_due(list(skip))
        self._due.learn(before, found, skip)
        return found

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        """Bring forward what a clock that was ahead has put off."""
        work = partial(_without_result, claims.pull_forward, now, latest)
        await self._call(work, lambda _: self._changed())

    async def wait_for_work(self) -> None:
        """Return when there may be something new to claim."""
        await self._work.wait()
        self._work.clear()

    def _changed(self) -> None:
        self._due.now()
        self._work.set()

    # Settling.

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """Give a claim back untried."""
        await self._call(
            partial(_without_result, claims.release, [entry], due),
            lambda _: self._deferred(entry, due),
        )

    def _deferred(self, entry: Entry, due: datetime) -> None:
        self._due.sooner(due, entry.domain)
        self._work.set()

    async def record(
        self,
        settlement: Settlement,
        *,
        reports: Sequence[NewMessage] = (),
        events: Sequence[Event] = (),
    ) -> bool:
        """Commit what an attempt came to; whether what is owed about its message is to be paid now."""
        rows = Rows(self._future(), events=events)
        _add_settlement(rows, settlement)
        return await self._submit_with(reports, rows, lambda: self._recorded(settlement)) is True

    async def report(self, debt: PendingReport, reports: Sequence[NewMessage]) -> None:
        """Pay what is owed."""
        queue_id = debt.message.queue_id
        rows = Rows(self._future(), perhaps_done=[queue_id])
        rows.paid += [(queue_id, change.recipient.index, True) for change in debt.done]
        rows.paid += [(queue_id, change.recipient.index, False) for change in debt.delayed]
        await self._submit_with(reports, rows, lambda: None)

    async def _submit_with(
        self, reports: Sequence[NewMessage], rows: Rows, done: Callable[[], None]
    ) -> Any:
        """Have rows written together with the reports they are the reason for."""
        if reports:
            rows.events = [*rows.events, *(event for new in reports for event in new.events)]
        entries: list[Entry] = []
        try:
            for new in reports:
                entries += self._add_message(rows, new)
        except BaseException:
            self._give_up(entries)
            raise

        def committed(_: Any) -> None:
            done()
            if reports:
                self._accepted(reports, entries)

        rows.on_commit = committed
        rows.on_failure = partial(self._give_up, entries)
        return await self._submit(rows)

    async def pending_reports(
        self, *, now: datetime, pending_since: datetime, limit: int = 100
    ) -> list[str]:
        """Messages whose debts are to be paid."""
        return await self._reader.pending_reports(now=now, pending_since=pending_since, limit=limit)

    async def pending_report(self, queue_id: str) -> PendingReport | None:
        """What is owed about a message."""
        return await self._reader.pending_report(queue_id)

    def _recorded(self, settlement: Settlement) -> None:
        counts = self._counts
        before = {one.index: one.state for one in settlement.entry.recipients}
        for change in settlement.changes:
            one = change.recipient
            if (old := before[one.index]) in counts:
                counts[old] -= 1
            if one.state in counts:
                counts[one.state] += 1
                if one.next_attempt is not None:
                    self._due.sooner(one.next_attempt, one.domain)
                    self._work.set()

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
        """The operator's verb on the next that match.

        They are found and told of by the reader: the writer, which mail waits for, has little to
        do. What waits in the hand-off is not being tried yet, so it is brought back within reach
        first. What is claimed by an attempt is left alone.
        """
        if verb not in VERBS:
            raise SpoolError(f"there is no verb {verb!r}")
        ids, until = await self._reader.find_messages(wanted, now=now, after=after, limit=_STRETCH)
        if not ids:
            return ChangeStep(None)
        events = await self._reader.events_of(ids, event_of) if event_of is not None else {}
        meant = replace(wanted, queue_ids=frozenset(ids))
        async with self._claiming:
            for give_back in self._give_back:
                await give_back()
            await self._spill(self._handoff.take_all())
            changed = await self._change_named(meant, verb, now, events)
        return ChangeStep(until, len(changed.recipients), meant.queue_ids)

    def before_change(self, give_back: Callable[[], Awaitable[None]]) -> None:
        """Whom to ask for claims that were not begun on."""
        self._give_back.append(give_back)

    async def _change_named(
        self, wanted: QueueFilter, verb: str, now: datetime, events: Mapping[tuple[str, int], Event]
    ) -> claims.Changed:
        call = Call(self._future())

        def work(db: sqlite3.Connection) -> claims.Changed:
            changed = claims.change(db, wanted, verb, now)
            told = [events[key] for key in changed.recipients if key in events]
            self._writer.write_events(db, call, told)
            return changed

        def done(changed: claims.Changed) -> None:
            for state, more in changed.states.items():
                if state in self._counts:
                    self._counts[state] += more
            self._changed()

        call.function, call.on_commit = work, done
        result: claims.Changed = await self._submit(call)
        return result

    async def counts(self) -> Mapping[State, int]:
        """Recipients in each state that is not final."""
        return dict(self._counts)

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[ListedMessage]:
        """A page of the queue."""
        return await self._reader.list_messages(wanted, now=now, after=after, limit=limit)

    async def find_message(self, queue_id: str) -> QueuedItem | None:
        """All that is kept about one message."""
        return await self._reader.find_message(queue_id)

    def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces."""
        return self._reader.read_content(queue_id)

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section."""
        return await self._reader.read_header(queue_id, limit_bytes=limit_bytes)

    # Events.

    def _on_events(self, stored: list[StoredEvent]) -> None:
        """Keep the newest events at hand for who follows them."""
        self._tail += stored
        if len(self._tail) > 2 * _TAIL_EVENTS:
            del self._tail[:-_TAIL_EVENTS]

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """The next events: from memory where they are new."""
        tail = self._tail
        if tail and seq + 1 >= tail[0].seq:
            # Numbers are given without gaps while we run.
            start = seq + 1 - tail[0].seq
            return tail[start : start + limit]
        return await self._reader.events_after(seq, limit=limit)

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
        return await self._reader.find_events(
            wanted, after=after, limit=limit, ascending=ascending, patience=patience
        )

    async def log_written(self, seq: int) -> None:
        """Remember how far the log file is; written down with the next commit."""
        self._writer.note_mark(seq)

    async def log_mark(self) -> int:
        """How far the log file is."""
        return self._writer.mark

    async def purge_events(self, *, before: datetime) -> int:
        """Forget old events that the log holds, a stretch at a time."""
        total, after = 0, _BEFORE_ALL
        while True:
            work = partial(_purge, before, self._writer.mark, after)
            count, until = await self._call(work)
            total += count
            if count:
                self._tail.clear()
            if until is None:
                return total
            after = until

    # The way to the writer.

    def _future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    async def _submit(self, request: Rows | Call) -> Any:
        """Hand a request over and await its commit. Cancelling the wait does not stop the work."""
        try:
            self._writer.submit(request)
        except SpoolError:
            if request.on_failure is not None:
                request.on_failure()
            raise
        return await request.future

    async def _call(
        self,
        function: Callable[[sqlite3.Connection], T],
        on_commit: Callable[[T], None] | None = None,
    ) -> T:
        result: T = await self._submit(Call(self._future(), function=function, on_commit=on_commit))
        return result


def _recipient_row(
    queue_id: str, one: QueuedRecipient, place: Place, due: datetime | None
) -> tuple[Any, ...]:
    return (
        queue_id,
        one.index,
        one.domain,
        STATE_NUMBER[one.state],
        place,
        None if due is None else micros(due),
        recipient_data(one),
    )


def _add_settlement(rows: Rows, settlement: Settlement) -> None:
    """The message leaves at once where this was the end of all its recipients."""
    entry, changes = settlement.entry, settlement.changes
    queue_id = entry.message.queue_id
    all_final = all(change.recipient.state.is_final for change in changes)
    if all_final and entry.total and len(changes) == entry.total and not _may_owe(settlement):
        rows.finished.append((queue_id, entry.total))
        return
    rows.updates += [_settled_row(queue_id, change.recipient, settlement.at) for change in changes]
    since, until = micros(settlement.at), micros(settlement.report_after or settlement.at)
    rows.owed += [
        (
            queue_id,
            change.recipient.index,
            change.recipient.state.is_final,
            since,
            until,
            pending_data(change),
        )
        for change in settlement.pending
    ]
    rows.settled = queue_id
    if any(change.recipient.state.is_final for change in changes):
        rows.perhaps_done.append(queue_id)


def _may_owe(settlement: Settlement) -> bool:
    """Whether something is held, or was: of recipients that are not done, that can only be a delay."""
    return bool(settlement.pending) or any(
        one.recipient.delay_notified for one in settlement.changes
    )


def _settled_row(queue_id: str, one: QueuedRecipient, at: datetime) -> tuple[Any, ...]:
    place, due = settled_place(one, at)
    return (
        queue_id,
        one.index,
        STATE_NUMBER[one.state],
        place,
        None if due is None else micros(due),
        recipient_data(one),
    )


def _without_result(function: Callable[..., None], *args: Any) -> None:
    """`function(db, *args)` with the connection, which comes last here, put first."""
    function(args[-1], *args[:-1])


def _purge(
    before: datetime, mark: int, after: int, db: sqlite3.Connection
) -> tuple[int, int | None]:
    return claims.purge(db, before, mark, after, _PURGE_STRETCH)


def _log_failure(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and (exc := future.exception()) is not None:
        log.error("claims could not be given back; they are due after a restart: %s", exc)
