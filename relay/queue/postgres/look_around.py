"""What a node looks at once a second: what others have made due, have set, have asked for, and who
is alive. One statement, a function of a connection.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import NamedTuple

from relay.queue.division import Member
from relay.queue.postgres.connection import Db
from relay.queue.postgres.schema import READY, WAITING
from relay.queue.rows import moment

# The least domain is one step in the index. For EXISTS the planner may read the whole table.
_LOOK = f"""SELECT (SELECT min(domain) FROM relay.recipient WHERE place = {READY}) AS ready,
    (SELECT min(due) FROM relay.recipient WHERE place = {WAITING}) AS waiting,
    changes, give_back,
    (SELECT coalesce(json_agg(json_build_array(id, node, seen)), '[]')
     FROM relay.lease WHERE lost IS NULL) AS members
    FROM relay.meta"""


class Look(NamedTuple):
    """`is_ready`: something is due. `due`: when the first of what waits is. `changes`: the edition
    of what was set over HTTP. `give_back`: the last request to give claims back. `members`: the
    live leases.
    """

    is_ready: bool
    due: datetime | None
    changes: int
    give_back: int
    members: list[Member]


async def look(db: Db) -> Look:
    """Look at all of it at one moment."""
    row = await db.fetchrow(_LOOK)
    waiting = row["waiting"]
    return Look(
        row["ready"] is not None,
        None if waiting is None else moment(waiting),
        row["changes"],
        row["give_back"],
        [Member(id, node, frozenset(seen)) for id, node, seen in json.loads(row["members"])],
    )


async def say_seen(db: Db, lease: int, view: tuple[int, ...]) -> None:
    """This node goes by these live leases."""
    await db.execute("UPDATE relay.lease SET seen = $2 WHERE id = $1", lease, list(view))
