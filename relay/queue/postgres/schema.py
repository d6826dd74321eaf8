"""The tables of the queue in PostgreSQL, schema `relay`, and the way from each older version.

    message, recipient, owed, domain_settings, webhook, call, policy, memory
                  as in SQLite (`relay.queue.sqlite.schema`); times are whole microseconds
    content       content of more than 64 KiB, in pieces; `n`: the octet at which a piece begins
    staged        messages whose content comes before them, and the lease of who brings it
    node          each node that ever was here: its number, name, and how far its log file is
    lease         each process that is here, or was lost (`relay.queue.postgres.lease`)
    batch         commits whose outcome may have to be asked for (`transaction`)
    event         the delivery log; each node numbers its own commits; a partition for each day
                  (`relay.queue.postgres.partitions`)
    statistic     what was counted of mail; `counted`: what is not added to it yet
    exception, tls_policy, tls_session, tls_report
                  as in SQLite; the numbers of tls_session are each node's own
    leaving, imported
                  messages on their way to another queue; the stamps of those that came from one
    meta          one row: version, and what the nodes tell each other by counting up

A recipient's `place` is as in SQLite, and each place has an index of its own or none. One that is
CLAIMED is claimed under a lease, and the index by lease is what a take-over reads.

A version is only ever added at the end, and adds: an older relay beside a newer one goes on. What a
migration needs an older relay to be gone for, it says in `oldest_compatible`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import asyncpg

from relay.queue.due import Place
from relay.queue.postgres.connection import (
    OLDEST_SERVER,
    Db,
    NoServer,
    Server,
    StartRefused,
    translated,
)

WAITING, READY, CLAIMED, ASIDE, LEAVING = map(int, Place)


_LOCK_SECONDS = 5


class Migration(NamedTuple):
    """Statements, and the oldest version of the tables whose relay may run beside it."""

    statements: Sequence[str]
    oldest_compatible: int


def _busy(table: str) -> str:
    """Rows come and go all the time: vacuum early, and at full speed; what is long and lies beside
    its row, too.
    """
    options = {"scale_factor": "0.01", "threshold": "1000", "cost_delay": "0"}
    settings = [
        f"{beside}autovacuum_vacuum_{option}={value}"
        for beside in ("", "toast.")
        for option, value in options.items()
    ]
    return f"ALTER TABLE relay.{table} SET ({', '.join(settings)})"


_VERSION_1 = Migration(
    (
        """CREATE TABLE relay.message (
            queue_id text COLLATE "C" NOT NULL PRIMARY KEY,
            arrived bigint NOT NULL,
            size_bytes bigint NOT NULL,
            recipients integer NOT NULL,
            in_pieces boolean NOT NULL,      -- true: content is null here
            reverse_path text COLLATE "C" NOT NULL,
            data text COLLATE "C" NOT NULL,
            content bytea)""",
        "ALTER TABLE relay.message ALTER content SET STORAGE EXTERNAL",
        "ALTER TABLE relay.message SET (toast_tuple_target = 8160)",
        """CREATE TABLE relay.recipient (
            queue_id text COLLATE "C" NOT NULL,
            idx integer NOT NULL,
            domain text COLLATE "C" NOT NULL,
            state smallint NOT NULL,
            place smallint NOT NULL,
            due bigint,
            lease bigint,
            data text COLLATE "C" NOT NULL,
            PRIMARY KEY (queue_id, idx))""",
        "CREATE INDEX recipient_waiting ON relay.recipient (due, domain) WHERE place = 0",
        "CREATE INDEX recipient_ready ON relay.recipient (domain, due) WHERE place = 1",
        "CREATE INDEX recipient_claimed ON relay.recipient (lease) WHERE place = 2",
        """CREATE TABLE relay.content (
            queue_id text COLLATE "C" NOT NULL,
            n bigint NOT NULL,
            data bytea NOT NULL,
            PRIMARY KEY (queue_id, n))""",
        "ALTER TABLE relay.content ALTER data SET STORAGE EXTERNAL",
        """CREATE TABLE relay.staged (
            queue_id text COLLATE "C" NOT NULL PRIMARY KEY,
            lease bigint NOT NULL)""",
        """CREATE TABLE relay.owed (
            queue_id text COLLATE "C" NOT NULL,
            idx integer NOT NULL,
            is_done boolean NOT NULL,
            since bigint NOT NULL,
            report_after bigint NOT NULL,
            data text COLLATE "C" NOT NULL,
            PRIMARY KEY (queue_id, idx, is_done))""",
        """CREATE TABLE relay.node (
            id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            name text COLLATE "C" NOT NULL UNIQUE,
            log_mark bigint NOT NULL DEFAULT 0,
            calls_seen bigint NOT NULL DEFAULT 0)""",
        """CREATE TABLE relay.lease (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            node integer NOT NULL,
            host text NOT NULL,
            boot text NOT NULL,
            pid integer NOT NULL,
            version text NOT NULL,
            policy_digest text NOT NULL,
            given_back bigint NOT NULL DEFAULT 0,
            seen bigint[] NOT NULL DEFAULT '{}',   -- the live leases that it goes by
            expires timestamptz NOT NULL,
            lost timestamptz)""",
        """CREATE TABLE relay.batch (
            lease bigint NOT NULL,
            n bigint NOT NULL,
            void boolean NOT NULL,
            PRIMARY KEY (lease, n))""",
        """CREATE TABLE relay.event (
            node integer NOT NULL,
            seq bigint NOT NULL,
            at bigint NOT NULL,
            name text COLLATE "C" NOT NULL,
            queue_id text COLLATE "C" NOT NULL,
            sender text COLLATE "C" NOT NULL,
            recipient text COLLATE "C" NOT NULL,
            id text COLLATE "C" NOT NULL,
            line text COLLATE "C" NOT NULL,
            PRIMARY KEY (node, seq, at)) PARTITION BY RANGE (at)""",
        # Events are written in the order of their times, nearly: this index costs them nothing.
        "CREATE INDEX event_at ON relay.event USING brin (at) WITH (pages_per_range = 32)",
        "CREATE INDEX event_queue_id ON relay.event (queue_id)",
        """CREATE INDEX event_recipient ON relay.event (lower(recipient))
            WHERE recipient <> ''""",
        """CREATE TABLE relay.domain_settings (
            domain text COLLATE "C" NOT NULL PRIMARY KEY,
            require_tls boolean,
            skip_verification boolean)""",
        """CREATE TABLE relay.webhook (
            domain text COLLATE "C" NOT NULL,
            name text COLLATE "C" NOT NULL,
            urls text NOT NULL,              -- a JSON list
            since jsonb NOT NULL,            -- by node: its events up to this seq came before it
            PRIMARY KEY (domain, name))""",
        """CREATE TABLE relay.call (
            number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            due bigint NOT NULL,
            attempts integer NOT NULL,
            lease bigint,                    -- of the node that makes it now
            url text NOT NULL,
            line text NOT NULL)""",
        "CREATE INDEX call_due ON relay.call (due)",
        "CREATE INDEX call_lease ON relay.call (lease) WHERE lease IS NOT NULL",
        *(
            f"""CREATE TABLE relay.{table} (
            recipient_domain text COLLATE "C" NOT NULL,
            sender_domain text COLLATE "C" NOT NULL,
            hour integer NOT NULL,
            result text COLLATE "C" NOT NULL,
            protection text COLLATE "C" NOT NULL,
            policy text COLLATE "C" NOT NULL,
            reason text COLLATE "C" NOT NULL,
            number bigint NOT NULL{more})"""
            for table, more in (
                (
                    "statistic",
                    ", PRIMARY KEY (recipient_domain, sender_domain, hour, result, protection,"
                    " policy, reason)",
                ),
                ("counted", ", id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY"),
            )
        ),
        "CREATE INDEX statistic_hour ON relay.statistic (hour)",
        """CREATE TABLE relay.exception (
            recipient_domain text COLLATE "C" NOT NULL,
            sender_domain text COLLATE "C" NOT NULL,
            at bigint NOT NULL,
            event_id text COLLATE "C" NOT NULL,
            queue_id text COLLATE "C" NOT NULL,
            result text COLLATE "C" NOT NULL,
            protection text COLLATE "C" NOT NULL,
            sentence text COLLATE "C" NOT NULL,
            PRIMARY KEY (recipient_domain, sender_domain, at, event_id))""",
        "CREATE INDEX exception_at ON relay.exception (at)",
        "CREATE INDEX exception_sender ON relay.exception (sender_domain, at)",
        """CREATE TABLE relay.tls_policy (
            day integer NOT NULL,
            domain text COLLATE "C" NOT NULL,
            policy text COLLATE "C" NOT NULL,
            data text NOT NULL,
            PRIMARY KEY (day, domain, policy))""",
        """CREATE TABLE relay.tls_session (
            day integer NOT NULL,
            domain text COLLATE "C" NOT NULL,
            policy text COLLATE "C" NOT NULL,
            failure text COLLATE "C" NOT NULL,
            node integer NOT NULL,
            number bigint NOT NULL,
            PRIMARY KEY (day, domain, policy, failure, node))""",
        """CREATE TABLE relay.tls_report (
            day integer NOT NULL,
            domain text COLLATE "C" NOT NULL,
            place text COLLATE "C" NOT NULL,
            result text NOT NULL,            -- "": claimed
            lease bigint NOT NULL,           -- by whom
            PRIMARY KEY (day, domain, place))""",
        """CREATE TABLE relay.policy (
            domain text COLLATE "C" NOT NULL PRIMARY KEY,
            id text NOT NULL,
            body bytea NOT NULL,
            fetched bigint NOT NULL,
            refresh_at bigint NOT NULL)""",
        "CREATE INDEX policy_refresh_at ON relay.policy (refresh_at)",
        """CREATE TABLE relay.memory (
            domain text COLLATE "C" NOT NULL PRIMARY KEY,
            last bigint NOT NULL,
            data text NOT NULL)""",
        "CREATE INDEX memory_last ON relay.memory (last)",
        *map(_busy, ("message", "recipient", "content", "staged", "owed", "call")),
        *map(_busy, ("batch", "lease", "node", "counted", "statistic", "tls_session")),
    ),
    oldest_compatible=1,
)

_VERSION_2 = Migration(
    (
        """CREATE TABLE relay.leaving (
            queue_id text COLLATE "C" NOT NULL PRIMARY KEY,
            stamp text NOT NULL,             -- of this move of the message
            target text NOT NULL)""",  # the directory it goes to
        """CREATE TABLE relay.imported (
            queue_id text COLLATE "C" NOT NULL,
            stamp text NOT NULL,
            at bigint NOT NULL,
            PRIMARY KEY (queue_id, stamp))""",
        _busy("leaving"),
    ),
    oldest_compatible=1,
)

MIGRATIONS: Sequence[Migration] = (_VERSION_1, _VERSION_2)


async def describe(server: Server) -> Mapping[str, str]:
    """What the server says of itself and of the tables, for a person. It changes nothing."""
    db = await server.connect()
    try:
        found = {"server": f"PostgreSQL {await db.fetchval('SHOW server_version')}"}
        if await db.fetchval("SELECT to_regclass('relay.meta')") is None:
            found["tables"] = "none yet: the first start makes them"
        else:
            version = await db.fetchval("SELECT version FROM relay.meta")
            found["tables"] = f"version {version}; this relay knows {len(MIGRATIONS)}"
        for name in ("fsync", "synchronous_commit", "synchronous_standby_names"):
            found[name] = await db.fetchval(f"SHOW {name}") or "none"
        return found
    except asyncpg.PostgresError as exc:
        raise translated(exc) from exc
    finally:
        db.terminate()


async def migrate(db: Db, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Bring the tables to the newest version, in one transaction that every other start waits for.

    Raises `StartRefused` with what a person has to change, and `NoServer` where another program
    uses the tables: all mail would wait behind this, so it is tried again later.
    """
    server = int(await db.fetchval("SHOW server_version_num"))
    if server // 10000 < OLDEST_SERVER:
        raise StartRefused(
            f"the server is PostgreSQL {server // 10000}; {OLDEST_SERVER} or later is needed"
        )
    if await db.fetchval("SHOW fsync") != "on":
        raise StartRefused("the server has fsync off: what it commits does not survive a crash")
    try:
        await _make_schema(db)
        async with db.transaction():
            await _migrate(db, migrations)
    except asyncpg.LockNotAvailableError as exc:
        raise NoServer(f"a transaction of another program uses the tables ({exc})") from None
    except asyncpg.InsufficientPrivilegeError as exc:
        user = await db.fetchval("SELECT current_user")
        raise StartRefused(
            f"the role {user} may not make the schema relay ({exc}): make it with"
            f" CREATE SCHEMA relay AUTHORIZATION {user}"
        ) from None


async def newer_owner(db: Db) -> str:
    """Why this relay may not work with the tables any more; "" where it may."""
    version, oldest = await db.fetchrow("SELECT version, oldest_compatible FROM relay.meta")
    return _newer_owner(version, oldest, len(MIGRATIONS))


def _newer_owner(version: int, oldest: int, known: int) -> str:
    if oldest <= known:
        return ""
    return (
        f"the queue belongs to a newer relay (its tables have version {version} and need a"
        f" relay that knows {oldest}; this one knows {known}): start that version"
    )


async def _make_schema(db: Db) -> None:
    if await db.fetchval("SELECT to_regclass('relay.meta')") is not None:
        return
    try:
        async with db.transaction():
            if await db.fetchval("SELECT to_regnamespace('relay')") is None:
                await db.execute("CREATE SCHEMA relay")
            await db.execute(
                """CREATE TABLE relay.meta (
                    version integer NOT NULL,
                    oldest_compatible integer NOT NULL,
                    changes bigint NOT NULL,     -- of what was set over HTTP
                    give_back bigint NOT NULL)   -- asked of all nodes by a verb of the operator"""
            )
            await db.execute("INSERT INTO relay.meta VALUES (0, 0, 0, 0)")
    except (
        asyncpg.DuplicateTableError,
        asyncpg.DuplicateSchemaError,
        asyncpg.UniqueViolationError,
    ):
        pass  # another node was quicker


async def _migrate(db: Db, migrations: Sequence[Migration]) -> None:
    await db.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
    await db.execute("LOCK TABLE relay.meta IN ACCESS EXCLUSIVE MODE")
    found = await db.fetchrow("SELECT version, oldest_compatible FROM relay.meta")
    assert found is not None
    version, oldest = found
    if owner := _newer_owner(version, oldest, len(migrations)):
        raise StartRefused(owner)
    for number, migration in enumerate(migrations[version:], start=version + 1):
        for statement in migration.statements:
            await db.execute(statement)
        await db.execute(
            "UPDATE relay.meta SET version = $1, oldest_compatible = $2",
            number,
            migration.oldest_compatible,
        )
