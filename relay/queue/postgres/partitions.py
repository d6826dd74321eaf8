"""The table of events: one partition for each day (of UTC), named `event_20261128`.

An old event is never removed by itself, which would leave a dead row: its whole day is dropped. A
partition is made two days ahead, by whichever node looks first, and for any other day when an event
of it is to be written. Only the making and the removal of partitions, and vacuum, wait for the lock
that this takes.

A day is dropped when no event of it is to be kept, and every node's log file has all of its own.
Nobody waits for that, either: the partition is detached concurrently, which waits for all who use
the table, and not they for it; `_LOCK_SECONDS` at most. What a node began and did not finish, the
next one finishes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta

import asyncpg

from relay.mail.event import Event
from relay.queue.postgres.connection import Db
from relay.queue.rows import micros
from relay.queue.tls_sessions import day_of

log = logging.getLogger(__name__)

_AHEAD = timedelta(days=2)
_LOCK_SECONDS = 3
_NAME = "event_%Y%m%d"
_LIKE = "event\\_________"

_IN_THE_WAY = (
    asyncpg.LockNotAvailableError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedObjectError,
)
"""Errors that say that somebody uses the partition, or that another node is removing it."""

_PARTITIONS = f"""
    SELECT relname, inhrelid IS NOT NULL AS is_attached,
        coalesce(inhdetachpending, false) AS is_pending
    FROM pg_class LEFT JOIN pg_inherits ON inhrelid = pg_class.oid
    WHERE relnamespace = 'relay'::regnamespace AND relkind = 'r' AND relname LIKE '{_LIKE}'
    ORDER BY relname"""


class EventDays:
    """The days that are known to have a partition."""

    def __init__(self) -> None:
        self._known: set[date] = set()

    def are_made(self, now: datetime) -> bool:
        """Whether there are partitions as far ahead as there have to be now."""
        return self._known.issuperset(_days_ahead(now))

    async def make_ahead(self, db: Db, now: datetime) -> None:
        """Make those that are missing. Others may have been dropped since they were made."""
        days = _days_ahead(now)
        await _make(db, days)
        self._known = set(days)

    async def make_for(self, db: Db, events: Iterable[Event], *, within: bool) -> None:
        """Nearly always there are some for these events: they are made ahead. `within`: a
        transaction.
        """
        days = {day_of(event.at) for event in events}
        if missing := days - self._known:
            await (_make_within if within else _make)(db, sorted(missing))
            self._known |= missing

    def forget(self) -> None:
        """A transaction is undone, and what it may have made."""
        self._known.clear()


def _days_ahead(now: datetime) -> list[date]:
    today = day_of(now)
    return [today + timedelta(days=number) for number in range(_AHEAD.days + 1)]


async def _make(db: Db, days: Iterable[date]) -> None:
    """Make the partitions that are missing, as a transaction."""
    async with db.transaction():
        await _make_within(db, days)


async def _make_within(db: Db, days: Iterable[date]) -> None:
    """The same, within a transaction."""
    await db.execute(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'")
    # Two nodes do it one after the other, and the second finds it done.
    await db.execute("LOCK TABLE relay.event IN SHARE UPDATE EXCLUSIVE MODE")
    for day in days:
        name = f"relay.{day.strftime(_NAME)}"
        if await db.fetchval("SELECT to_regclass($1)", name) is not None:
            continue
        # Made by itself and then attached: `PARTITION OF` would have all writers wait.
        await db.execute(f"CREATE TABLE {name} (LIKE relay.event)")
        await db.execute(
            f"ALTER TABLE relay.event ATTACH PARTITION {name}"
            f" FOR VALUES FROM ({_begin(day)}) TO ({_begin(day + timedelta(days=1))})"
        )
    await db.execute("SET LOCAL lock_timeout TO DEFAULT")


def _begin(day: date) -> int:
    return micros(datetime(day.year, day.month, day.day, tzinfo=UTC))


async def old_ones(db: Db, before: datetime, now: datetime) -> list[tuple[str, bool, bool]]:
    """The partitions of days that ended before a time and before today: name, whether they are
    attached, and whether they are being detached.
    """
    last = day_of(min(before, now)).strftime(_NAME)
    return [tuple(row) for row in await db.fetch(_PARTITIONS) if row["relname"] < last]


async def drop_old(db: Db, before: datetime, now: datetime) -> int:
    """Drop the days that ended before a time and before today, and that all log files have; how
    many. Not within a transaction.
    """
    dropped = 0
    # Of the session: what is detached concurrently is no transaction. Behind a pooler it may stay
    # with the pool's connection for a while; nothing of the relay waits that long for a lock.
    await db.execute(f"SET lock_timeout = '{_LOCK_SECONDS}s'")
    try:
        for name, is_attached, is_pending in await old_ones(db, before, now):
            if is_pending:
                await _detach(db, name, "FINALIZE")
            elif is_attached:
                if await _has_unwritten(db, name):
                    continue
                await _detach(db, name, "CONCURRENTLY")
            await db.execute(f"DROP TABLE relay.{name}")
            dropped += 1
    except _IN_THE_WAY as exc:
        log.info("old events cannot be removed yet: %s", exc)
    finally:
        if not db.is_closed():
            await db.execute("RESET lock_timeout")
    return dropped


async def _detach(db: Db, name: str, how: str) -> None:
    await db.execute(f"ALTER TABLE relay.event DETACH PARTITION relay.{name} {how}")


async def _has_unwritten(db: Db, name: str) -> bool:
    """Whether a partition has an event that is in no log file yet."""
    found: bool = await db.fetchval(
        f"SELECT EXISTS (SELECT 1 FROM relay.node WHERE EXISTS (SELECT 1 FROM relay.{name} AS one"
        " WHERE one.node = node.id AND one.seq > node.log_mark))"
    )
    return found
