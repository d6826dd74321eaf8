"""The statistics: counts by the hour, and the exceptions beside them.

Every commit counts, and a row that every commit changes would have all nodes wait for each other
and leave a dead row a commit. So a commit adds rows to `counted`, and once a minute one node adds
these to `statistic` (`fold`). Who asks reads both.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from relay.mail.event import Event
from relay.queue.batch import Row
from relay.queue.conditions import all_of, domain_conditions, exceptions_query
from relay.queue.postgres.connection import Db, changed_rows
from relay.queue.postgres.inserts import COUNTED, EXCEPTIONS, ONCE, columns, numbered
from relay.queue.postgres.matching import PostgresValues
from relay.queue.statistics import (
    FIRST_EXCEPTIONS,
    CountedException,
    CountedMail,
    CountFilter,
    ExceptionPage,
    ExceptionRow,
    HourlyCount,
    RecentHours,
    counted_exceptions,
    counted_mail,
    first_micros,
    hour_of,
    hourly_counts,
)

_FOLDED = 20_000
_KEY = "recipient_domain, sender_domain, hour, result, protection, policy, reason"


class Counts(NamedTuple):
    """What events add to the statistics. `numbers`: the columns of `counted`."""

    numbers: list[Row]
    exceptions: list[ExceptionRow]


class MailCounter:
    """Adds to the statistics, for the writer."""

    def __init__(self) -> None:
        self._hours = RecentHours()

    async def count(self, db: Db, events: Sequence[Event]) -> Counts:
        """What these events add, to be written in the transaction that writes them."""
        for hour in self._hours.unknown(events):
            self._hours.learn(hour, *await _known_of(db, hour))
        numbers, exceptions = self._hours.count(events)
        return Counts([(*key, number) for key, number in numbers.items()], exceptions)

    async def add(self, db: Db, events: Sequence[Event]) -> None:
        """Count these events, within the transaction that writes them."""
        numbers, exceptions = await self.count(db, events)
        if numbers:
            await db.execute(numbered(COUNTED, 1, 8), *columns(numbers, 8))
        if exceptions:
            await db.execute(numbered(EXCEPTIONS, 1, 8) + ONCE, *columns(exceptions, 8))


async def _known_of(db: Db, hour: int) -> tuple[list[Row], list[Row]]:
    """The pairs of an hour, and how many exceptions of each are listed."""
    pairs = await db.fetch(
        "SELECT DISTINCT recipient_domain, sender_domain FROM"
        " (SELECT recipient_domain, sender_domain, hour FROM relay.statistic"
        " UNION ALL SELECT recipient_domain, sender_domain, hour FROM relay.counted) AS every"
        " WHERE hour = $1 AND recipient_domain <> ''",
        hour,
    )
    listed = await db.fetch(
        "SELECT recipient_domain, sender_domain, count(*) FROM relay.exception"
        " WHERE at >= $1 AND at < $2 GROUP BY 1, 2",
        first_micros(hour),
        first_micros(hour + 1),
    )
    return pairs, listed


async def fold(db: Db) -> int:
    """Add some of what was counted to the statistics; how many rows. Other nodes pass over the
    same rows meanwhile.
    """
    status = await db.execute(
        f"""WITH part AS (DELETE FROM relay.counted WHERE id IN
            (SELECT id FROM relay.counted ORDER BY id LIMIT {_FOLDED} FOR UPDATE SKIP LOCKED)
            RETURNING *)
        INSERT INTO relay.statistic SELECT {_KEY}, sum(number) FROM part GROUP BY {_KEY}
        ORDER BY {_KEY}
        ON CONFLICT ({_KEY}) DO UPDATE SET number = statistic.number + excluded.number"""
    )
    return changed_rows(status)


def _counts(wanted: CountFilter, values: PostgresValues) -> str:
    """The rows that are meant, of both tables."""
    where = all_of(domain_conditions(wanted, values, has_sums=True))
    begin, end = values.add(hour_of(wanted.begin)), values.add(hour_of(wanted.end))
    return " UNION ALL ".join(
        f"SELECT hour, result, protection, policy, reason, number FROM relay.{table}"
        f" WHERE {where} AND hour >= {begin} AND hour < {end}"
        for table in ("statistic", "counted")
    )


async def count_mail(db: Db, wanted: CountFilter) -> list[CountedMail]:
    """The counts of a period, added up."""
    values = PostgresValues()
    rows = await db.fetch(
        "SELECT result, protection, policy, reason, sum(number)::bigint, min(hour), max(hour)"
        f" FROM ({_counts(wanted, values)}) AS meant GROUP BY 1, 2, 3, 4",
        *values.all,
    )
    return counted_mail(rows)


async def count_hours(db: Db, wanted: CountFilter) -> list[HourlyCount]:
    """The counts of a period, hour by hour."""
    values = PostgresValues()
    rows = await db.fetch(
        "SELECT hour, result, protection, sum(number)::bigint"
        f" FROM ({_counts(wanted, values)}) AS meant GROUP BY 1, 2, 3 ORDER BY 1",
        *values.all,
    )
    return hourly_counts(rows)


async def find_exceptions(
    db: Db, wanted: CountFilter, page: ExceptionPage = FIRST_EXCEPTIONS
) -> list[CountedException]:
    """A page of the exceptions by time."""
    values = PostgresValues()
    query = exceptions_query(wanted, page, values, table="relay.exception")
    return counted_exceptions(await db.fetch(query, *values.all))


async def purge_statistics(db: Db, before: datetime, limit: int) -> int:
    """Forget some of what is older; how many rows."""
    hour = hour_of(before)
    total = 0
    for table, column, bound in (
        ("statistic", "hour", hour),
        ("counted", "hour", hour),
        ("exception", "at", first_micros(hour)),
    ):
        status = await db.execute(
            f"DELETE FROM relay.{table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM relay.{table}"
            f" WHERE {column} < $1 LIMIT $2))",
            bound,
            limit,
        )
        total += changed_rows(status)
    return total
