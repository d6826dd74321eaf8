"""What a store does in the same way whichever engine keeps it.

`EngineStore` is what every engine's `Store` is made from: it puts together the rows of a commit,
hands over what was accepted, keeps the newest events in memory, and goes through a long job in
steps. An engine adds its statements, its writer, and what is its own: a file that only one process
has, or a lease that a claim is made under.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.queue.batch import Rows
from relay.queue.change_steps import ChangeSteps, NamedChange, WantedStep
from relay.queue.dispatch import Dispatch
from relay.queue.engine_reader import EngineReader
from relay.queue.entry import Entry
from relay.queue.handoff import ClaimQuery, HandOffLimits
from relay.queue.numbering import EventNumbers
from relay.queue.request import Request, log_failure
from relay.queue.settle import Settlement
from relay.queue.store import (
    ChangeStep,
    EventOfChange,
    NewMessage,
    PendingReport,
    QueueFilter,
    SpoolError,
    StoredEvent,
)
from relay.queue.tail import EventTail
from relay.queue.tls_sessions import ReportResult
from relay.queue.verbs import VERBS, Changed

_PURGE_STEP = 1000

Connection = TypeVar("Connection")
Contra = TypeVar("Contra", contravariant=True)


class RequestWriter(Protocol):
    """The engine's writer: it commits what waits, in batches."""

    def submit(self, request: Request) -> None:
        """Have it written with the next batch; `SpoolError` where the queue is closed."""


class StagedContent(Protocol):
    """Content that is too large to lie with its message."""

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write a piece of content ahead of its message."""

    async def discard(self, queue_id: str) -> None:
        """Remove what was staged, unless its message was given to `accept`."""

    async def accept(self, new: NewMessage, commit: Callable[[], Awaitable[object]]) -> None:
        """Complete the content, then have the commit made; both run to their end if the caller is
        cancelled.
        """


class ClaimStatements(Protocol[Contra]):
    """The engine's module `claims`. Its functions work on a connection inside a transaction; they
    are coroutines where the engine's connection is asynchronous.
    """

    def release(self, db: Contra, entries: Iterable[Entry], due: datetime | None) -> object:
        """Give claims back, to be due at `due`; None: at once."""

    def pull_forward(self, db: Contra, now: datetime, latest: datetime) -> object:
        """Make due what a clock that was ahead has put off."""


class EngineStore(EngineReader, Generic[Connection]):
    """An engine's store adds its statements; see `relay.queue.store` for what each method promises.

    `claims`: the statements about claims. Content of more than `inline_bytes` is staged. `node`:
    the name of this one, where several share the queue.
    """

    writer: RequestWriter
    _staging: StagedContent

    def __init__(
        self,
        limits: HandOffLimits,
        *,
        claims: ClaimStatements[Connection],
        inline_bytes: int,
        node: str = "",
    ) -> None:
        self._claims = claims
        self._inline_bytes = inline_bytes
        self._numbers = EventNumbers(node)
        self._tail = EventTail()
        self._steps = ChangeSteps(self)
        self._dispatch = dispatch = Dispatch(limits, self)
        self.claim_due = dispatch.claim_due
        self.next_due = dispatch.next_due
        self.wait_for_work = dispatch.wait_for_work
        self.before_change = dispatch.before_change
        self.limit_domains = dispatch.limit_domains

    # What the engine adds to a claim.

    @abstractmethod
    async def claim_stored(self, query: ClaimQuery, /) -> list[Entry]:
        """Entries from the store, claimed; see `StoredClaims`."""

    @abstractmethod
    async def next_stored(self, skip: Collection[str], /) -> datetime | None:
        """When the next unclaimed entry outside `skip` is due, or a little earlier."""

    def _handed_over(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The entries of new messages, which are claimed with the commit, as they are given out."""
        return entries

    def _claims_ended(self, entries: Sequence[Entry]) -> None:
        """The claims of these entries are over, or are given back."""

    # Taking in.

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write a piece of content ahead of its message."""
        await self._staging.stage(queue_id, offset, piece)

    async def discard(self, queue_id: str) -> None:
        """Remove what was staged, unless its message was given to `accept`."""
        await self._staging.discard(queue_id)

    async def accept(self, new: NewMessage) -> None:
        """Take responsibility."""
        rows = Rows(takes_in=True)
        if new.staged_bytes or len(new.content) > self._inline_bytes:
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
        reserved: list[Entry] = []
        try:
            for new in messages:
                entries = self._dispatch.reserve(new, in_file=in_file)
                reserved += entries
                claimed = {one.index for entry in entries for one in entry.recipients}
                # A report of ours lies in its row whatever its size: nothing was staged for it.
                rows.add_message(new, claimed=claimed, in_file=in_file)
                rows.events = [*rows.events, *new.events] if rows.events else new.events
        except BaseException:
            self._dispatch.give_up(reserved)
            raise
        handed_over = self._handed_over(reserved) if reserved else reserved

        def committed(_: object) -> None:
            if then is not None:
                then()
            if messages:
                self._dispatch.accepted(messages, handed_over)

        def failed() -> None:
            self._claims_ended(handed_over)
            self._dispatch.give_up(handed_over)

        return await self._submit(Request(rows, on_commit=committed, on_failure=failed))

    # Claims: see `Dispatch`, which gives out what is due.

    async def give_back(self, entries: Sequence[Entry]) -> None:
        """Have claimed entries wait in the store, due at once."""
        await self._release(entries, None)

    def give_back_later(self, entries: Sequence[Entry]) -> None:
        """The same, without waiting for it."""
        if entries:
            self._claims_ended(entries)
            request = self._release_request(entries, None)
            request.on_commit = lambda _: self._dispatch.changed()
            request.future.add_done_callback(log_failure)
            with suppress(SpoolError):
                self.writer.submit(request)

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """End a claim without an attempt."""
        await self._release([entry], due, partial(self._dispatch.due_later, due, entry.domain))

    async def _release(
        self, entries: Sequence[Entry], due: datetime | None, then: Callable[[], None] | None = None
    ) -> None:
        request = self._release_request(entries, due)
        if then is not None:
            request.on_commit = lambda _: then()
        try:
            await self._submit(request)
        finally:
            self._claims_ended(entries)

    def _release_request(self, entries: Sequence[Entry], due: datetime | None) -> Request:
        return Request(function=lambda db: self._claims.release(db, entries, due))

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        """Bring forward what a clock that was ahead has put off."""
        request = Request(function=lambda db: self._claims.pull_forward(db, now, latest))
        request.on_commit = lambda _: self._dispatch.changed()
        await self._submit(request)

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
        settled = partial(self._settled, settlement)
        return await self._commit_with(reports, rows, then=settled) is True

    def _settled(self, settlement: Settlement) -> None:
        """The result of an attempt is committed, and its claim is over."""
        self._dispatch.settled(settlement)

    async def count_sessions(self, sessions: Sequence[TlsSession], *, at: datetime) -> None:
        """Count sessions that belong to no result."""
        await self._submit(Request(Rows(sessions=(at, sessions))))

    async def report(self, pending: PendingReport, reports: Sequence[NewMessage]) -> None:
        """Commit these DSNs, and that the report is sent."""
        rows = Rows()
        rows.add_report(pending)
        await self._commit_with(reports, rows)

    # Reports on TLS.

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
        little to do. While the writer has one step, the reader finds the next.
        """
        if verb not in VERBS:
            raise SpoolError(f"there is no verb {verb!r}")
        ids, until, events = await self._steps.find(WantedStep(wanted, now, event_of, after))
        if not ids:
            return ChangeStep(None)
        meant = replace(wanted, queue_ids=frozenset(ids))
        named = NamedChange(meant, verb, now, events)
        async with self._dispatch.stopped():
            changed = set((await self._change_named(named)).recipients)
            if await self._others_gave_back(ids):
                changed.update((await self._change_named(named)).recipients)
        return ChangeStep(until, len(changed), meant.queue_ids)

    async def _others_gave_back(self, ids: Sequence[str]) -> bool:
        """Have others that share the queue give back what they have claimed of these messages and
        not begun; whether they were asked.
        """
        return False

    async def _change_named(self, change: NamedChange) -> Changed:
        def done(changed: Changed) -> None:
            self._dispatch.counts.add(changed.states)
            self._dispatch.changed()

        request = Request(on_commit=done)
        request.function = lambda db: self._change_rows(db, request, change)
        result: Changed = await self._submit(request)
        return result

    @abstractmethod
    def _change_rows(self, db: Connection, request: Request, change: NamedChange, /) -> object:
        """Make a change, and write the events of the recipients it changed; `Changed`."""

    async def write_event(self, event: Event) -> None:
        """Commit an event that tells of what an operator did."""
        await self._submit(Request(Rows(events=(event,))))

    # Events and what they count.

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """The next events: from memory where they are new."""
        newest = self._tail.after(seq, limit)
        return newest if newest is not None else await self._stored_after(seq, limit)

    @abstractmethod
    async def _stored_after(self, seq: int, limit: int, /) -> list[StoredEvent]:
        """The next events, of this node."""

    async def log_written(self, seq: int) -> None:
        """Remember how far the log file is; written down soon."""
        self._numbers.note_mark(seq)

    async def log_mark(self) -> int:
        """How far the log file is."""
        return self._numbers.mark

    async def purge_events(self, *, before: datetime) -> int:
        """Remove old events that the log holds."""
        removed = await self._purge_events(before)
        if removed:
            self._tail.clear()
        return removed

    async def purge_statistics(self, *, before: datetime) -> int:
        """Remove old statistics, a step at a time."""
        total = 0
        while count := await self._purge_statistics(before, _PURGE_STEP):
            total += count
        return total

    async def purge_tls_sessions(self, *, before: date) -> int:
        """Remove what is of earlier days, a step at a time."""
        total = 0
        while count := await self._purge_sessions(before, _PURGE_STEP):
            total += count
        return total

    @abstractmethod
    async def _purge_events(self, before: datetime, /) -> int:
        """Remove old events that the log holds, a step at a time; 0 where there were none."""

    @abstractmethod
    async def _purge_statistics(self, before: datetime, limit: int, /) -> int:
        """Remove some old statistics; how many rows."""

    @abstractmethod
    async def _purge_sessions(self, before: date, limit: int, /) -> int:
        """Remove some of what is of earlier days; how many rows."""

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
