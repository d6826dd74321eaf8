"""What this node has claimed under its lease, as far as the node knows.

A claim whose commit had an unknown outcome, or whose answer was lost, is in the table and not known
here: nobody would ever try that mail. It is found with a renewal of the lease, and freed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from relay.queue.entry import Entry
from relay.queue.handoff import ClaimQuery
from relay.queue.postgres import claims
from relay.queue.postgres.connection import SAFE_COMMIT, Db, Link
from relay.queue.postgres.lease import Lease


class NodeClaims:
    """`give_back`: makes entries due again, without waiting for it."""

    def __init__(
        self, link: Link, lease: Lease, *, give_back: Callable[[Sequence[Entry]], None]
    ) -> None:
        self._link = link
        self._lease = lease
        self._give_back = give_back
        self._cursor = ""
        self._held: set[tuple[str, int]] = set()
        self._unknown: set[tuple[str, int]] = set()

    async def claim(self, query: ClaimQuery) -> list[Entry]:
        """Entries that are due, claimed. They are given back if the caller is cancelled."""
        task = asyncio.ensure_future(self._link.ask(self._claim, query))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._give_back_claimed)
            raise

    def _give_back_claimed(self, task: asyncio.Future[list[Entry]]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._give_back(task.result())

    async def _claim(self, db: Db, query: ClaimQuery) -> list[Entry]:
        async with db.transaction():
            await db.fetchrow(SAFE_COMMIT)
            found, cursor = await claims.claim(db, self._lease.id, query.copy(), self._cursor)
        self._cursor = cursor
        self._hold(found)
        return found

    def handed_over(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries that the next commit claims, as they are given out."""
        self._hold(entries)
        return [replace(entry, token=self._lease.id) for entry in entries]

    def _hold(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._held.update((entry.message.queue_id, one.index) for one in entry.recipients)

    def ended(self, entries: Sequence[Entry]) -> None:
        """These claims are over."""
        for entry in entries:
            self._held.difference_update(
                (entry.message.queue_id, one.index) for one in entry.recipients
            )

    def forget_all(self) -> None:
        """The lease is lost, and all claims with it."""
        self._held.clear()
        self._unknown.clear()

    async def free_unknown(self, db: Db) -> bool:
        """Free what the lease has claimed and this node does not know of; whether there was any.

        A claim that is on its way in is not known yet: only what was unknown last time, too.
        """
        found = await claims.held(db, self._lease.id)
        unknown = found - self._held
        lost, self._unknown = unknown & self._unknown, unknown
        if lost:
            await claims.free(db, self._lease.id, lost)
        return bool(lost)
