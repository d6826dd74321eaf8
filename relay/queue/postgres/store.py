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
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from datetime import date, datetime, timedelta
from functools import partial
from typing import Concatenate, ParamSpec, Self, TypeVar

from relay.queue.change_steps import NamedChange
from relay.queue.division import Division
from relay.queue.engine_store import EngineStore
from relay.queue.entry import Entry
from relay.queue.handoff import ClaimQuery, HandOffLimits
from relay.queue.nodes import DatabaseState, LongHolders
from relay.queue.postgres import (
    claims,
    events,
    messages,
    partitions,
    statistics,
    tls_sessions,
    watching,
)
from relay.queue.postgres.api_state import PostgresApiState
from relay.queue.postgres.commit import Writer
from relay.queue.postgres.connection import Db, Link, NoServer, Server
from relay.queue.postgres.lease import (
    Lease,
    NodeOptions,
    ask_to_give_back,
    boottime,
    have_given_back,
    others_that_hold,
)
from relay.queue.postgres.look_around import Look, look, say_seen
from relay.queue.postgres.node_claims import NodeClaims
from relay.queue.postgres.reader import Reader
from relay.queue.postgres.schema import migrate, newer_owner
from relay.queue.postgres.staging import INLINE_BYTES, Staging
from relay.queue.postgres.statements import Tables
from relay.queue.postgres.transaction import LeaseLost
from relay.queue.request import Request
from relay.queue.settle import Settlement
from relay.queue.store import SpoolError, StoredEvent
from relay.queue.verbs import Changed

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_LOOK_SECONDS_OF_CHANGE = 0.2
_FOLD_SECONDS = 60.0
_CLAIM_SECONDS = 10.0
_STAGE_SECONDS = 20.0
_LEASE_SECONDS = 10.0
_DROP_SECONDS = 30.0
_BATCHES_KEPT = 1000
_GIVE_BACK_SECONDS = 3.0
"""How long a verb waits for the other nodes."""
_STANDSTILL_SECONDS = 1.0
_GLANCE_SECONDS = 0.05

T = TypeVar("T")
P = ParamSpec("P")


def writes(
    statement: Callable[Concatenate[Db, P], Awaitable[T]],
) -> Callable[Concatenate[PostgresStore, P], Coroutine[object, object, T]]:
    """A method of the store that commits what this statement does."""

    async def write(store: PostgresStore, /, *args: P.args, **named: P.kwargs) -> T:
        return await store._write(partial(statement, **named), *args)

    return write


class PostgresStore(Reader, EngineStore[Db]):
    """Open with `PostgresStore.open`; see `relay.queue.store.Store` for what each method promises.

    What only reads is inherited from `Reader`, what all engines do from `EngineStore`.
    """

    writer: Writer
    _tables: Tables

    def __init__(self, server: Server, options: NodeOptions, limits: HandOffLimits) -> None:
        Reader.__init__(self, server)
        EngineStore.__init__(
            self, limits, claims=claims, inline_bytes=INLINE_BYTES, node=options.name
        )
        self._claim_link = Link(server, seconds=_CLAIM_SECONDS)
        self._stage_link = Link(server, seconds=_STAGE_SECONDS)
        self._lease_link = Link(server, seconds=_LEASE_SECONDS)
        self._long_holders = LongHolders()
        self._drops = Link(server, seconds=_DROP_SECONDS)
        self.lease = lease = Lease(
            self._lease_link,
            options,
            renewed=self._renewed,
            lost=self._lease_lost,
            taken_over=lambda count: self._dispatch.changed(),
            superseded=self._superseded,
        )
        self._node_claims = NodeClaims(self._claim_link, lease, give_back=self.give_back_later)
        self._tables = Tables(lease, self._numbers)
        self.writer = Writer(
            server, self._tables, on_events=self._tail.add, on_lease_lost=self._renew_now
        )
        self._staging = Staging(self._stage_link, lease)
        self.api_state = PostgresApiState(self.ask, self._write, lease)
        self._division = division = Division()
        self.part = division.part
        self._within_parts: list[Callable[[], Awaitable[bool]]] = []
        self._divided_at = 0.0
        self.clock = lease.clock
        self._tasks: list[asyncio.Task[None]] = []
        self._given_back = 0
        self._unreachable = ""
        self._tell_superseded: Callable[[str], None] | None = None

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
            await store._lease_link.ask(migrate)
            await store.lease.register()
            await store._lease_link.ask(store._prepare, now, max_wait)
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
        await self._tables.load(db, now)
        await self.lease.take_over(db)
        async with db.transaction():
            await claims.pull_forward(db, now, now + max_wait)
        found = await look(db)
        self._given_back = found.give_back
        self._division.look(found.members, self.lease.id)
        await self._say_seen(db)
        self._division.look((await look(db)).members, self.lease.id)  # it may be the only one
        self._dispatch.is_divided = not self._division.is_alone
        if not await db.fetchval("SHOW synchronous_standby_names"):
            log.info(
                "the queue's server waits for no standby: a failover may lose the last commits"
            )

    async def close(self) -> None:
        """Finish what was begun, give every claim back and end the lease."""
        self._steps.forget()
        self._write_mark()
        await self.writer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._let_go()

    async def _let_go(self) -> None:
        await self.lease.end()
        for link in (self._claim_link, self._stage_link, self._lease_link):
            await link.close()
        await super().close()

    def when_divided_anew(self, call: Callable[[], Awaitable[bool]]) -> None:
        """Have this called when the parts of this node have become others."""
        self._within_parts.append(call)

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

    async def database_state(self) -> DatabaseState | None:
        """The state of the nodes and of the database; None while it does not answer."""
        try:
            found = await self.ask(watching.database_state)
        except SpoolError:
            return None
        return found._replace(unknown_commits=self.writer.unknown_commits)

    def not_ready(self) -> str:
        """What the database fails in at the moment."""
        return self.writer.trouble or self.lease.trouble or self._unreachable

    def when_superseded(self, call: Callable[[str], None]) -> None:
        """Another process takes the name of this node, or a newer relay the tables."""
        self._tell_superseded = call

    def _superseded(self, why: str) -> None:
        tell, self._tell_superseded = self._tell_superseded, None
        if tell is not None:
            tell(why)

    async def last_seq(self) -> int:
        """The number of the newest event of this node."""
        return self._numbers.last

    # Handing out: see `Dispatch`.

    async def claim_stored(self, query: ClaimQuery, /) -> list[Entry]:
        """Entries from the store. Without a lease an attempt would be broken off, and its entry be
        due at once again.
        """
        if trouble := self.lease.trouble:
            raise SpoolError(trouble)
        return await self._node_claims.claim(query)

    def _handed_over(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        return self._node_claims.handed_over(entries)

    def _claims_ended(self, entries: Sequence[Entry]) -> None:
        self._node_claims.ended(entries)

    async def next_stored(self, skip: Collection[str], /) -> datetime | None:
        """When the next unclaimed entry outside `skip` is due that this node serves."""
        return await self.ask(messages.next_due, skip, self._dispatch.serves)

    def _settled(self, settlement: Settlement) -> None:
        self._claims_ended([settlement.entry])
        super()._settled(settlement)

    # Reports on TLS.

    async def claim_tls_report(self, day: date, domain: str, place: str) -> bool:
        """Take a report for sending."""
        return await self._write(tls_sessions.claim_report, self.lease.id, day, domain, place)

    async def release_tls_report(self, day: date, domain: str, place: str) -> None:
        """End a claim."""
        await self._write(tls_sessions.release_report, self.lease.id, day, domain, place)

    # The operator.

    async def _others_gave_back(self, ids: Sequence[str]) -> bool:
        """Have the other nodes give back what they have claimed of these messages and not begun, so
        that a verb reaches it. They stand still for a second then, so they are asked only if they
        have claimed some.
        """
        lease = self.lease.id
        if not await self.ask(claims.are_claimed_by_others, lease, ids):
            return False
        self._given_back = number = await self._write(ask_to_give_back)
        await self._write(have_given_back, lease, number)
        for _ in range(round(_GIVE_BACK_SECONDS / _GLANCE_SECONDS)):
            if not await self.ask(others_that_hold, lease, number):
                break
            await asyncio.sleep(_GLANCE_SECONDS)
        return True

    async def _give_back_if_asked(self, number: int) -> None:
        """Give back what was not begun if another node asks for it, and claim nothing until its
        verb has had the time to be done.
        """
        if number > self._given_back:
            self._given_back = number
            async with self._dispatch.stopped():
                await self._write(have_given_back, self.lease.id, number)
                await asyncio.sleep(_STANDSTILL_SECONDS)
            self._dispatch.changed()

    async def _change_rows(self, db: Db, request: Request, change: NamedChange, /) -> Changed:
        changed = await claims.change(db, change.wanted, change.verb, change.now)
        await self._tables.write_events(db, request, change.events_of(changed))
        return changed

    # Events of this node.

    async def _stored_after(self, seq: int, limit: int, /) -> list[StoredEvent]:
        return await self.ask(events.events_after, self.lease.node, seq, limit)

    async def _purge_events(self, before: datetime, /) -> int:
        """Drop the days of events that are over, of all nodes; how many days."""
        now = self.clock()
        if not await self.ask(partitions.old_ones, before, now):
            return 0
        if (request := self._tables.mark_request()) is not None:
            await self._submit(request)
        try:
            return await self._drops.ask(partitions.drop_old, before, now)
        finally:
            await self._drops.close()  # it is needed now and then

    _purge_statistics = writes(statistics.purge_statistics)
    _purge_sessions = writes(tls_sessions.purge_sessions)

    # The lease.

    async def _renewed(self, db: Db) -> None:
        """Free claims that nobody here knows of; and tidy up."""
        if owner := await newer_owner(db):
            self._superseded(owner)
        if await self._node_claims.free_unknown(db):
            self._dispatch.changed()
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
        self._division.forget()
        self._dispatch.forget_all()
        self._node_claims.forget_all()

    def _renew_now(self) -> None:
        self.lease.hurry()

    # The other nodes.

    async def _look_around(self) -> None:
        """Look once a second at what other nodes have done, and more often while they come and go.
        Once a minute, add up what was counted.
        """
        fold_at = time.monotonic()
        while True:
            is_calm = self._division.is_agreed
            await asyncio.sleep(_LOOK_SECONDS if is_calm else _LOOK_SECONDS_OF_CHANGE)
            try:
                await self._make_partitions()
                await self._act_on(await self.ask(look))
                if time.monotonic() >= fold_at:
                    fold_at = time.monotonic() + _FOLD_SECONDS
                    await self.ask(statistics.fold)
                    await self._tell_long_holders()
                self._unreachable = ""
            except NoServer as error:
                self._unreachable = str(error)
            except SpoolError:
                pass  # the lease and the writer tell of it
            except Exception:  # no mistake of one look may end the looking
                log.exception("the other nodes could not be looked at")
            self._write_mark()

    async def _act_on(self, found: Look) -> None:
        if found.is_ready or (found.due is not None and found.due <= self.clock()):
            self._dispatch.changed()
        elif found.due is not None:
            self._dispatch.note_due(found.due)
        await self.api_state.look(found.changes)
        await self._divide(found)
        await self._give_back_if_asked(found.give_back)

    async def _divide(self, found: Look) -> None:
        """Go by the leases that are live, and tell the others so once no more than this node's part
        is under way. An attempt that takes very long does not hold them up for ever.
        """
        if self._division.look(found.members, self.lease.id):
            self._divided_at = time.monotonic()
        elif self._division.untold is None:
            return
        self._dispatch.is_divided = not self._division.is_alone
        await self._dispatch.leave_to_others()
        within = [await call() for call in self._within_parts]
        if all(within) or time.monotonic() - self._divided_at > self.lease.seconds:
            await self._lease_link.ask(self._say_seen)

    async def _say_seen(self, db: Db) -> None:
        view = self._division.untold
        if view is not None:
            await say_seen(db, self.lease.id, view)

    async def _tell_long_holders(self) -> None:
        """Warn of what keeps dead rows from being removed: the queue gets slower with them."""
        found = await self.ask(watching.holders)
        for name, seconds in self._long_holders.new_ones(found, boottime()):
            log.warning(
                "the database cannot remove dead rows, and looks at the queue get slower: %s has"
                " held them for %.0f minutes",
                name,
                seconds / 60,
            )

    async def _make_partitions(self) -> None:
        """Have the table of events take those of the next days."""
        days, now = self._tables.event_days, self.clock()
        if not days.are_made(now):
            await self.ask(days.make_ahead, now)

    def _write_mark(self) -> None:
        """Write down how far the log file is, if that has changed."""
        if (request := self._tables.mark_request()) is not None:
            with suppress(SpoolError):
                self.writer.submit(request)

    async def _write(self, statement: Callable[..., Awaitable[T]], *args: object) -> T:
        """Commit what `statement(connection, *args)` does; its result."""
        result: T = await self._submit(Request(function=lambda db: statement(db, *args)))
        return result
