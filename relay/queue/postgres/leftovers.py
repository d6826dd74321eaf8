"""What a lease that is over leaves behind, and how others get it.

claims            READY again, a stretch at a time
reports on TLS, calls
                  claimed by nobody
staged content    removed where no message came
marks of batches  removed after an hour, when nobody asks for an outcome any more
"""

from __future__ import annotations

from datetime import timedelta

from relay.queue.postgres.connection import Db, changed_rows
from relay.queue.postgres.schema import CLAIMED, READY

_TAKEN_AT_ONCE = 1000
_KEPT_LOST = timedelta(days=1)

_DEAD_HOLDERS = f"""
    WITH RECURSIVE holder (lease) AS (
        SELECT min(lease) FROM relay.recipient WHERE place = {CLAIMED}
        UNION ALL
        SELECT (SELECT min(lease) FROM relay.recipient
                WHERE place = {CLAIMED} AND recipient.lease > holder.lease)
        FROM holder WHERE holder.lease IS NOT NULL)
    SELECT lease FROM holder WHERE lease IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM relay.lease WHERE id = holder.lease AND lost IS NULL)"""
"""Leases under which something is claimed and that are not among the live ones."""

_TAKE_OVER = f"""
    UPDATE relay.recipient SET place = {READY}, lease = NULL, due = coalesce(due, 0)
    WHERE (queue_id, idx) IN (
        SELECT queue_id, idx FROM relay.recipient WHERE place = {CLAIMED} AND lease = $1
        LIMIT $2 FOR UPDATE SKIP LOCKED)"""

_LIVE = "(SELECT id FROM relay.lease WHERE lost IS NULL)"
_FREE_REPORTS = f"DELETE FROM relay.tls_report WHERE result = '' AND lease NOT IN {_LIVE}"
_FREE_CALLS = f"UPDATE relay.call SET lease = NULL WHERE lease IS NOT NULL AND lease NOT IN {_LIVE}"

_SWEEP_STAGED_OF = """
    WITH gone AS (DELETE FROM relay.staged WHERE lease = $1 RETURNING queue_id)
    DELETE FROM relay.content WHERE queue_id IN (SELECT queue_id FROM gone)
    AND queue_id NOT IN (SELECT queue_id FROM relay.message WHERE in_pieces
        AND queue_id IN (SELECT queue_id FROM gone))"""
_SWEEP_STAGED = _SWEEP_STAGED_OF.replace("lease = $1", f"lease NOT IN {_LIVE}")

_SWEEP_BATCHES = """
    DELETE FROM relay.batch WHERE lease NOT IN (SELECT id FROM relay.lease)
    OR lease IN (SELECT id FROM relay.lease WHERE lost < now() - interval '1 hour')"""


async def dead_holders(db: Db) -> list[int]:
    """Leases under which something is claimed and that are not among the live ones."""
    return [row[0] for row in await db.fetch(_DEAD_HOLDERS)]


async def take_over(db: Db, holder: int) -> tuple[int, bool]:
    """Make READY some of what is claimed under a lease; how many recipients, and whether there may
    be more.
    """
    count = changed_rows(await db.execute(_TAKE_OVER, holder, _TAKEN_AT_ONCE))
    return count, count == _TAKEN_AT_ONCE


async def sweep(db: Db) -> None:
    """Free what dead leases have claimed besides mail, and remove what they left."""
    await db.execute(_FREE_REPORTS)
    await db.execute(_FREE_CALLS)
    await db.execute(_SWEEP_STAGED)
    await db.execute(_SWEEP_BATCHES)
    await db.execute(
        "DELETE FROM relay.lease WHERE lost < now() - $1::interval AND NOT EXISTS"
        f" (SELECT 1 FROM relay.recipient WHERE place = {CLAIMED} AND recipient.lease = lease.id)",
        _KEPT_LOST,
    )


async def give_all_back(db: Db, lease: int) -> None:
    """End a lease in order: nothing of it is left behind."""
    is_more = True
    while is_more:
        _, is_more = await take_over(db, lease)
    async with db.transaction():
        await db.execute("UPDATE relay.call SET lease = NULL WHERE lease = $1", lease)
        await db.execute("DELETE FROM relay.tls_report WHERE result = '' AND lease = $1", lease)
        await db.execute(_SWEEP_STAGED_OF, lease)
        await db.execute("DELETE FROM relay.batch WHERE lease = $1", lease)
        await db.execute("DELETE FROM relay.lease WHERE id = $1", lease)
