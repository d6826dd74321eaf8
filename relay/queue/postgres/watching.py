"""What an administrator of the database has to know: its standbys, dead rows, and what keeps them.

A transaction that stays open keeps every row that was removed since from being vacuumed, in all
tables: a forgotten session, pg_dump, a prepared transaction, a replication slot that nobody reads,
a standby with `hot_standby_feedback`. The queue lives on rows that come and go, so each look at it
gets slower. The relay's own transactions are short.

Who is not a member of `pg_read_all_stats` (`pg_monitor` has it) sees only transactions of its own
role, and no standby.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.queue.nodes import DatabaseState, Holder
from relay.queue.postgres.connection import Db

_HOLDERS = """
    SELECT 'a transaction of ' || coalesce(usename, 'an unknown role')
        || coalesce(' (' || nullif(application_name, '') || ')', '') || ', process ' || pid AS name,
        greatest(age(backend_xmin), age(backend_xid)) AS age,
        extract(epoch FROM now() - xact_start)::float8 AS seconds,
        coalesce(backend_xmin, backend_xid)::text AS mark
    FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = current_database()
        AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
        AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    UNION ALL
    SELECT 'the prepared transaction ' || gid, age(transaction),
        extract(epoch FROM now() - prepared)::float8, transaction::text
    FROM pg_prepared_xacts WHERE database = current_database()
    UNION ALL
    SELECT 'the replication slot ' || slot_name, age(xmin), NULL, xmin::text
    FROM pg_replication_slots WHERE xmin IS NOT NULL
    UNION ALL
    SELECT 'the standby ' || application_name, age(backend_xmin), NULL, backend_xmin::text
    FROM pg_stat_replication WHERE backend_xmin IS NOT NULL"""

_STANDBYS = """
    SELECT count(*) FILTER (WHERE sync_state IN ('sync', 'quorum')) AS synchronous,
        count(*) FILTER (WHERE sync_state NOT IN ('sync', 'quorum')) AS asynchronous,
        coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), flush_lsn)), 0)::bigint AS lag
    FROM pg_stat_replication WHERE state = 'streaming'"""

_NODES = """
    SELECT count(*) FILTER (WHERE last.lost IS NULL) AS live,
        count(*) FILTER (WHERE last.lost IS NOT NULL) AS lost
    FROM relay.node, LATERAL
        (SELECT lost FROM relay.lease WHERE lease.node = node.id ORDER BY id DESC LIMIT 1)
        AS last"""

_DEAD_ROWS = """
    SELECT coalesce(sum(n_dead_tup), 0)::bigint FROM pg_stat_user_tables
    WHERE schemaname = 'relay'"""


async def holders(db: Db) -> list[Holder]:
    """All that keeps dead rows from being removed now."""
    return [
        Holder(row["name"], row["age"] or 0, row["seconds"], row["mark"])
        for row in await db.fetch(_HOLDERS)
    ]


async def database_state(db: Db) -> DatabaseState:
    """The state of the nodes and of the database, for `/metrics`."""
    nodes = await db.fetchrow(_NODES)
    standbys = await db.fetchrow(_STANDBYS)
    found = await holders(db)
    assert nodes is not None
    assert standbys is not None
    return DatabaseState(
        live=nodes["live"],
        lost=nodes["lost"],
        dead_rows=await db.fetchval(_DEAD_ROWS),
        oldest_xmin_age=_most(one.age for one in found),
        oldest_transaction_seconds=_most(one.seconds or 0.0 for one in found),
        synchronous_standbys=standbys["synchronous"],
        asynchronous_standbys=standbys["asynchronous"],
        standby_lag_bytes=standbys["lag"],
    )


def _most(numbers: Iterable[float]) -> float:
    return max(numbers, default=0)
