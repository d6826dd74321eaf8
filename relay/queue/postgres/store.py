"""The queue in PostgreSQL, which several nodes share: the `Store` a relay runs with.

This is the shell that puts the parts together on the event loop: `Writer` writes, `Reader`
answers, `Lease` says what this node may do, `Dispatch` gives out what is due.

A claim is written down with the lease it was made under, and ends with `record` or `release`. When
the lease is lost, every claim of it is due for all nodes. Better to deliver twice than to lose
mail.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date, datetime, timedelta
from functools import partial
from itertools import count
from typing import Any, Self, TypeVar

from relay.mail.event import Event
from relay.mail.tls_session import TlsSession
from relay.queue.batch import Rows
from relay.queue.dispatch import Dispatch
from relay.queue.entry import Entry
from relay.queue.handoff import HandOffLimits, Shares
from relay.queue.postgres import claims, events, statistics, tls_sessions
from relay.queue.postgres.api_state import PostgresApiState
from relay.queue.postgres.commit import SAFE_COMMIT, LeaseLost, Writer
from relay.queue.postgres.connection import Db, Link, Server
from relay.queue.postgres.lease import (
    Lease,
    NodeOptions,
    ask_to_give_back,
    asked_to_give_back,
    have_given_back,
    others_that_hold,
)
from relay.queue.postgres.reader import Reader
from relay.queue.postgres.schema import migrate
from relay.queue.postgres.staging import INLINE_BYTES, Staging
from relay.queue.postgres.statements import Tables
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
from relay.queue.verbs import VERBS

__all__ = ["PostgresStore"]

log = logging.getLogger(__name__)

_PURGE_STEP = 1000
_CHANGE_STEP = 500
_BEFORE_ALL = -(1 << 62)
_LOOK_SECONDS = 1.0
_LOOKS_A_MINUTE = 60
_CLAIM_SECONDS = 10.0
_STAGE_SECONDS = 20.0
_LEASE_SECONDS = 10.0
_BATCHES_KEPT = 1000
_GIVE_BACK_SECONDS = 3.0
"""How long a verb waits for the other nodes."""
_STANDSTILL_SECONDS = 1.0
_GLANCE_SECONDS = 0.05
_ALL_REQUESTS = 1 << 62

T = TypeVar("T")


class PostgresStore(Reader):
    """Open with `PostgresStore.open`; see `relay.queue.store.Store` for what each method promises.

    What only reads is inherited.
    """

    def __init__(self, server: Server, options: NodeOptions, limits: HandOffLimits) -> None:
        super().__init__(server)
        self._claims = Link(server, seconds=_CLAIM_SECONDS)
        self._stages = Link(server, seconds=_STAGE_SECONDS)
        self._leases = Link(server, seconds=_LEASE_SECONDS)
        self.lease = lease = Lease(
            self._leases,
            options,
            renewed=self._renewed,
            lost=self._lease_lost,
            taken_over=lambda count: self._dispatch.changed(),
        )
        self._tables = Tables(lease)
        self._tail = EventTail()
        self.writer = Writer(
            server,
            self._tables,
            on_events=self._tail.add,
            on_lease_lost=self._renew_now,
        )
        self._staging = staging = Staging(self._stages, lease)
        self.stage = staging.stage
        self.discard = staging.discard
        self.api_state = PostgresApiState(self.ask, self._write, lease)
        self._dispatch = dispatch = Dispatch(limits, self)
        self.next_due = dispatch.next_due
        self.wait_for_work = dispatch.wait_for_work
        self.before_change = dispatch.before_change
        self.clock = lease.clock
        self._cursor: str | None = None
        self._held: set[tuple[str, int]] = set()
        self._strange: set[tuple[str, int]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._given_back = 0

    @classmethod
    async def open(
        cls,
        server: Server,
        options: NodeOptions,
        *,
        now: datetime | None = None,
        max_wait: timedelta = timedelta(days=1),
        limits: HandOffLimits | None = None,
    ) -> Self:
        """Bring the tables up to date, get a lease, and put right what lost nodes left.

        `max_wait`: the longest a recipient is ever deferred. `now` is for tests.
        """
        store = cls(server, options, limits or HandOffLimits())
        try:
            await store._leases.ask(migrate)
            await store.lease.register()
            await store._leases.ask(store._prepare, now, max_wait)
        except BaseException:
            await store._let_go()
            raise
        store.writer.start()
        store._tasks = [
            asyncio.create_task(store.lease.run(), name="queue-lease"),
            asyncio.create_task(store._look_around(), name="queue-watch"),
        ]
        return store

    async def _prepare(self, db: Db, now: datetime | None, max_wait: timedelta) -> None:
        now = now or self.clock()
        await self._tables.load(db)
        await self.lease.take_over(db)
        async with db.transaction():
            await claims.pull_forward(db, now, now + max_wait)
        self._given_back = await asked_to_give_back(db)
        if not await db.fetchval("SHOW synchronous_standby_names"):
            log.info(
                "the queue's server waits for no standby: a failover may lose the last commits"
            )

    async def close(self) -> None:
        """Finish what was begun, give every claim back and end the lease."""
        if self._tables.has_more:
            with suppress(SpoolError):
                self.writer.submit(_nothing())
        await self.writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._let_go()

    async def _let_go(self) -> None:
        await self.lease.end()
        for link in (self._claims, self._stages, self._leases):
            await link.close()
        await super().close()

    def may_begin(self, entry: Entry) -> bool:
        """Whether the lease that the claim was made under still holds for sure."""
        return self.lease.holds(entry.token)

    @property
    def lost(self) -> Self:
        """What lost nodes have not written to a log."""
        return self

    async def lost_events(self, *, limit: int = 1000) -> tuple[int, list[StoredEvent]]:
        """The next events of a lost node that no log file has."""
        found = await self.ask(events.unwritten, self.lease.id)
        if found is None:
            return 0, []
        node, mark = found
        return node, await self.ask(events.events_after, node, mark, limit)

    async def lost_written(self, node: int, seq: int) -> None:
        """Remember how far the log file of this node has the events of a lost one."""
        await self._write(events.note_written, node, seq)

    def not_ready(self) -> str:
        """What the database fails in at the moment."""
        return self.writer.trouble or self.lease.trouble

    async def last_seq(self) -> int:
        """The number of the newest event of this node."""
        return self._tables.last_seq

    # Taking in.

    async def accept(self, new: NewMessage) -> None:
        """Take responsibility."""
        rows = Rows(takes_in=True)
        if new.staged_bytes or len(new.content) > INLINE_BYTES:
            await self._staging.accept(new, lambda rest: self._accept_rest(rest, rows))
        else:
            await self._commit_with([new], rows)

    async def _accept_rest(self, rest: NewMessage, rows: Rows) -> None:
        await self._commit_with([rest], rows, in_pieces=True)

    async def _commit_with(
        self,
        messages: Sequence[NewMessage],
        rows: Rows,
        *,
        in_pieces: bool = False,
        then: Callable[[], None] | None = None,
    ) -> Any:
        """Commit rows and new messages, then hand the messages' entries over."""
        entries: list[Entry] = []
        token = self.lease.id
        try:
            for new in messages:
                handed = self._dispatch.reserve(new, in_file=in_pieces)
                entries += handed
                claimed = {one.index for entry in handed for one in entry.recipients}
                # A report of ours lies in its row whatever its size: nothing was staged for it.
                rows.add_message(new, claimed=claimed, in_file=in_pieces)
                rows.events = [*rows.events, *new.events] if rows.events else new.events
        except BaseException:
            self._dispatch.give_up(entries)
            raise
        keys = [
            (entry.message.queue_id, one.index) for entry in entries for one in entry.recipients
        ]
        self._held.update(keys)
        handed_over = [replace(entry, token=token) for entry in entries]

        def committed(_: object) -> None:
            if then is not None:
                then()
            if messages:
                self._dispatch.accepted(messages, handed_over)

        def failed() -> None:
            self._held.difference_update(keys)
            self._dispatch.give_up(entries)

        request = Request(rows, on_commit=committed, on_failure=failed)
        return await self._submit(request)

    # Handing out: see `Dispatch`.

    async def claim_due(
        self,
        *,
        now: datetime,
        limit: int,
        limit_per_domain: int | None = None,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
        with_new: bool = False,
    ) -> list[Entry]:
        """Entries that are due."""
        return await self._dispatch.claim_due(
            now=now,
            limit=limit,
            limit_per_domain=limit_per_domain,
            skip=skip,
            only=only,
            with_new=with_new,
        )

    async def claim_stored(
        self,
        now: datetime,
        limit: int,
        skip: Collection[str],
        shares: Shares,
        only: Collection[str] | None,
    ) -> list[Entry]:
        """Entries from the store. A commit of unknown outcome leaves claims that nobody here knows
        of: they are freed with a renewal of the lease.
        """
        claiming = self._claims.ask(self._claim, now, limit, skip, shares, only)
        task = asyncio.ensure_future(claiming)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._give_back_claimed)
            raise

    def _give_back_claimed(self, task: asyncio.Future[list[Entry]]) -> None:
        """No caller takes them any more: they are due again now."""
        if not task.cancelled() and task.exception() is None:
            self.give_back_later(task.result())

    async def _claim(
        self,
        db: Db,
        now: datetime,
        limit: int,
        skip: Collection[str],
        shares: Shares,
        only: Collection[str] | None,
    ) -> list[Entry]:
        lease = self.lease.id
        async with db.transaction():
            await db.fetchrow(SAFE_COMMIT)
            found, cursor = await claims.claim(
                db, lease, now, limit, skip, shares.copy(), self._cursor, only
            )
        self._cursor = cursor
        self._hold(found)
        return found

    def _hold(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._held.update((entry.message.queue_id, one.index) for one in entry.recipients)

    def _let_claims_go(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._held.difference_update(
                (entry.message.queue_id, one.index) for one in entry.recipients
            )

    async def give_back(self, entries: Sequence[Entry]) -> None:
        """Have claimed entries wait in the store, due at once."""
        await self._release(entries, None, self._dispatch.changed)

    def give_back_later(self, entries: Sequence[Entry]) -> None:
        """The same, without waiting for it."""
        if entries:
            self._let_claims_go(entries)
            request = Request(function=lambda db: claims.release(db, entries, None))
            request.on_commit = lambda _: self._dispatch.changed()
            request.future.add_done_callback(log_failure)
            with suppress(SpoolError):
                self.writer.submit(request)

    async def clock_set_back(self, *, now: datetime, latest: datetime) -> None:
        """Bring forward what a clock that was ahead has put off."""
        await self._write(claims.pull_forward, now, latest, then=self._dispatch.changed)

    async def release(self, entry: Entry, *, due: datetime) -> None:
        """End a claim without an attempt."""
        await self._release([entry], due, partial(self._dispatch.due_later, due, entry.domain))

    async def _release(
        self, entries: Sequence[Entry], due: datetime | None, then: Callable[[], None]
    ) -> None:
        try:
            await self._write(claims.release, entries, due, then=then)
        finally:
            self._let_claims_go(entries)

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

        def settled() -> None:
            self._let_claims_go([settlement.entry])
            self._dispatch.settled(settlement)

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
        return await self._write(tls_sessions.claim_report, self.lease.id, day, domain, place)

    async def release_tls_report(self, day: date, domain: str, place: str) -> None:
        """End a claim."""
        await self._write(tls_sessions.release_report, self.lease.id, day, domain, place)

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
        """The operator's verb on the next messages that match."""
        if verb not in VERBS:
            raise SpoolError(f"there is no verb {verb!r}")
        ids, until = await self.find_messages(wanted, now=now, after=after, limit=_CHANGE_STEP)
        if not ids:
            return ChangeStep(None)
        events_made = await self.events_of(ids, event_of) if event_of is not None else {}
        meant = replace(wanted, queue_ids=frozenset(ids))
        async with self._dispatch.stopped():
            await self._wait_for_others()
            changed = await self._change_named(meant, verb, now, events_made)
        return ChangeStep(until, len(changed.recipients), meant.queue_ids)

    async def _wait_for_others(self) -> None:
        """Have the other nodes give back what they have not begun, so that a verb reaches it."""
        lease = self.lease.id
        if not await self.ask(others_that_hold, lease, _ALL_REQUESTS):
            return
        self._given_back = number = await self._write(ask_to_give_back)
        await self._write(have_given_back, lease, number)
        for _ in range(round(_GIVE_BACK_SECONDS / _GLANCE_SECONDS)):
            if not await self.ask(others_that_hold, lease, number):
                return
            await asyncio.sleep(_GLANCE_SECONDS)

    async def _give_back_if_asked(self) -> None:
        """Give back what was not begun if another node asks for it, and claim nothing until its
        verb has had the time to be done.
        """
        number = await self.ask(asked_to_give_back)
        if number > self._given_back:
            self._given_back = number
            async with self._dispatch.stopped():
                await self._write(have_given_back, self.lease.id, number)
                await asyncio.sleep(_STANDSTILL_SECONDS)
            self._dispatch.changed()

    async def _change_named(
        self, wanted: QueueFilter, verb: str, now: datetime, made: Mapping[tuple[str, int], Event]
    ) -> claims.Changed:
        request = Request()

        async def change(db: Db) -> claims.Changed:
            changed = await claims.change(db, wanted, verb, now)
            theirs = [made[key] for key in changed.recipients if key in made]
            await self._tables.write_events(db, request, theirs)
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

    # Events of this node.

    async def events_after(self, seq: int, *, limit: int = 1000) -> list[StoredEvent]:
        """The next events: from memory where they are new."""
        newest = self._tail.after(seq, limit)
        if newest is not None:
            return newest
        return await self.ask(events.events_after, self.lease.node, seq, limit)

    async def log_written(self, seq: int) -> None:
        """Remember how far the log file is; written down with the next commit."""
        self._tables.note_mark(seq)

    async def log_mark(self) -> int:
        """How far the log file is."""
        return self._tables.mark

    async def purge_events(self, *, before: datetime) -> int:
        """Remove old events of this node that the log holds, a step at a time."""
        total = 0
        after: int | None = _BEFORE_ALL
        while after is not None:
            count, after = await self._write(
                claims.purge_events, self.lease.node, before, self._tables.mark, after, _PURGE_STEP
            )
            total += count
            if count:
                self._tail.clear()
        return total

    async def purge_statistics(self, *, before: datetime) -> int:
        """Remove old statistics, a step at a time."""
        total = 0
        while count := await self._write(statistics.purge_statistics, before, _PURGE_STEP):
            total += count
        return total

    # The lease.

    async def _renewed(self, db: Db) -> None:
        """Free what this lease has claimed and this node does not know of; and tidy up.

        A claim that is on its way in is not known yet: only what was strange last time, too.
        """
        found = await claims.held(db, self.lease.id)
        strange = found - self._held
        if lost := strange & self._strange:
            await claims.free(db, self.lease.id, lost)
            self._dispatch.changed()
        self._strange = strange
        await db.execute(
            "DELETE FROM relay.batch WHERE lease = $1 AND n <"
            " (SELECT max(n) FROM relay.batch WHERE lease = $1) - $2",
            self.lease.id,
            _BATCHES_KEPT,
        )

    async def _lease_lost(self) -> None:
        """Drop what was not begun: another node has it now."""
        error = LeaseLost("the lease of this node was lost")
        self.writer.fail_waiting(error)
        self._dispatch.forget_all()
        self._held.clear()
        self._strange.clear()

    def _renew_now(self) -> None:
        self.lease.hurry()

    # The other nodes.

    async def _look_around(self) -> None:
        """See once a second what other nodes have made due, and what was set over HTTP; once a
        minute, add up what was counted.
        """
        for look in count():
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                due = await self.next_stored(())
                if due is not None and due <= self.clock():
                    self._dispatch.changed()
                elif due is not None:
                    self._dispatch.note_due(due)
                await self.api_state.look()
                await self._give_back_if_asked()
                if look % _LOOKS_A_MINUTE == 0:
                    await self.ask(statistics.fold)
            except SpoolError:
                pass  # the lease and the writer tell of it
            except Exception:  # no mistake of one look may end the looking
                log.exception("the other nodes could not be looked at")
            if self._tables.has_more:
                with suppress(SpoolError):
                    self.writer.submit(_nothing())

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
        self,
        function: Callable[..., Awaitable[T]],
        *args: Any,
        then: Callable[[], None] | None = None,
    ) -> T:
        """Commit what `function(connection, *args)` does; its result. `then` follows the commit."""
        request = Request(function=lambda db: function(db, *args))
        if then is not None:
            request.on_commit = lambda _: then()
        result: T = await self._submit(request)
        return result


def _nothing() -> Request:
    """A request that brings a commit about: the mark of the log goes along with it."""

    async def nothing(db: Db) -> None:
        return None

    request = Request(function=nothing)
    request.future.add_done_callback(lambda future: future.exception())
    return request
