"""The nodes that share the queue, as the operator sees them: a question to the tables of leases."""

from __future__ import annotations

from relay.queue.nodes import Node, NodeState
from relay.queue.postgres.connection import Db
from relay.queue.postgres.schema import CLAIMED

_NODES = f"""
    SELECT node.name, CASE WHEN last.id IS NULL THEN 'left' WHEN last.lost IS NULL THEN 'live'
        ELSE 'lost' END AS state, last.host, last.version, last.policy_digest,
        CASE WHEN last.lost IS NULL THEN extract(epoch FROM last.expires - now())::float8 END
            AS left,
        (SELECT count(*) FROM relay.recipient
         WHERE place = {CLAIMED} AND recipient.lease = last.id) AS claims
    FROM relay.node LEFT JOIN LATERAL
        (SELECT * FROM relay.lease WHERE lease.node = node.id ORDER BY id DESC LIMIT 1) AS last
        ON true
    ORDER BY node.name"""


async def nodes(db: Db) -> list[Node]:
    """All nodes that ever were, by name."""
    rows = await db.fetch(_NODES)
    return [
        Node(
            row["name"],
            NodeState(row["state"]),
            row["host"] or "",
            row["version"] or "",
            row["left"],
            row["claims"],
            row["policy_digest"] or "",
        )
        for row in rows
    ]
