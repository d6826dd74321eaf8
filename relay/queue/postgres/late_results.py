"""Results of attempts whose claim is lost: another node may have the message meanwhile.

Better to deliver twice than to lose mail; but where nobody has begun anew, a result that is final
by a host's word is recorded, which saves a duplicate.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from relay.queue.batch import Rows
from relay.queue.entry import State
from relay.queue.postgres.connection import Db
from relay.queue.postgres.schema import CLAIMED, LEAVING
from relay.queue.rows import FINAL_NUMBER
from relay.queue.store import ClaimLost

log = logging.getLogger(__name__)

_TAKEN_LATE = frozenset({State.DELIVERED, State.BOUNCED})
"""States that are written though the claim is lost: they save a duplicate."""


async def are_claimed(db: Db, rows: Rows) -> bool:
    """Whether what a result is about is still claimed for it; its rows are locked then."""
    if rows.finished:
        [(queue_id, count)] = rows.finished
        found = await db.fetch(
            "SELECT place, lease FROM relay.recipient WHERE queue_id = $1 FOR UPDATE", queue_id
        )
        held = sum(row["place"] == CLAIMED and row["lease"] == rows.token for row in found)
        return bool(held == count)
    if not rows.updates:
        return True
    found = await db.fetch(
        "SELECT idx, place, lease FROM relay.recipient WHERE queue_id = $1 AND idx = ANY($2)"
        " FOR UPDATE",
        rows.updates[0][0],
        [row[1] for row in rows.updates],
    )
    held = sum(row["place"] == CLAIMED and row["lease"] == rows.token for row in found)
    return bool(held == len(rows.updates))


async def taken_late(db: Db, rows: Rows) -> Rows:
    """The rows of a result whose claim is lost: those that are final by a host's word, if nobody
    holds the recipient now and it is not final. Raises `ClaimLost` if not all of them are such.
    """
    queue_id = rows.settled or rows.finished[0][0]
    found = await db.fetch(
        "SELECT idx, state, place FROM relay.recipient WHERE queue_id = $1 FOR UPDATE", queue_id
    )
    free: Mapping[int, bool] = {
        row["idx"]: row["place"] not in (CLAIMED, LEAVING) and row["state"] < FINAL_NUMBER
        for row in found
    }
    settlement = rows.settlement
    after = [change.recipient for change in settlement.changes] if settlement else []
    if not after or not all(
        free.get(one.index, False) and one.state in _TAKEN_LATE for one in after
    ):
        raise ClaimLost("the claim is lost: another node has, or had, the message")
    # They become claimed for this result, which is then written as any other.
    await db.execute(
        f"UPDATE relay.recipient SET place = {CLAIMED}, lease = $3"
        " WHERE queue_id = $1 AND idx = ANY($2)",
        queue_id,
        [one.index for one in after],
        rows.token,
    )
    log.warning("%s: a result is recorded though its claim was lost", queue_id)
    return rows
