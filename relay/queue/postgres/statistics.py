"""The statistics: counts by the hour, and the exceptions beside them.

Every commit counts, and a row that every commit changes would have all nodes wait for each other
and leave a dead row a commit. So a commit adds rows to `counted`, and once a minute one node adds
these to `statistic` (`fold`). Who asks reads both.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from relay.queue.postgres.connection import Db
from relay.queue.postgres.matching import Values
from relay.queue.rows import micros, moment
from relay.queue.statistics import (
    CountedException,
    CountedMail,
    CountFilter,
    HourlyCount,
    hour_of,
)

__all__ = ["count_hours", "count_mail", "find_exceptions", "fold", "purge_statistics"]

_FOLDED = 20_000
_KEY = "recipient_domain, sender_domain, hour, result, protection, policy, reason"


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
    return int(status.rpartition(" ")[2])


def _where(wanted: CountFilter, values: Values, *, has_sums: bool) -> str:
    """The condition on the two domains. `has_sums`: there are rows of the sums, for all domains and
    for each sender domain.
    """
    parts = []
    if wanted.recipient_domain:
        parts.append(f"recipient_domain = {values.add(wanted.recipient_domain)}")
    elif has_sums:
        parts.append("recipient_domain = ''")
    if wanted.sender_domain:
        parts.append(f"sender_domain = {values.add(wanted.sender_domain)}")
    elif has_sums and not wanted.recipient_domain:
        parts.append("sender_domain = ''")
    return " AND ".join(parts) or "true"


def _counts(wanted: CountFilter, values: Values) -> str:
    """The rows that are meant, of both tables."""
    where = _where(wanted, values, has_sums=True)
    begin, end = values.add(hour_of(wanted.begin)), values.add(hour_of(wanted.end))
    return " UNION ALL ".join(
        f"SELECT hour, result, protection, policy, reason, number FROM relay.{table}"
        f" WHERE {where} AND hour >= {begin} AND hour < {end}"
        for table in ("statistic", "counted")
    )


async def count_mail(db: Db, wanted: CountFilter) -> list[CountedMail]:
    """The counts of a period, added up."""
    values = Values()
    rows = await db.fetch(
        "SELECT result, protection, policy, reason, sum(number)::bigint, min(hour), max(hour)"
        f" FROM ({_counts(wanted, values)}) AS meant GROUP BY 1, 2, 3, 4",
        *values.all,
    )
    return [
        CountedMail(result, protection, policy, reason, number, _hour(first), _hour(last))
        for result, protection, policy, reason, number, first, last in rows
    ]


async def count_hours(db: Db, wanted: CountFilter) -> list[HourlyCount]:
    """The counts of a period, hour by hour."""
    values = Values()
    rows = await db.fetch(
        "SELECT hour, result, protection, sum(number)::bigint"
        f" FROM ({_counts(wanted, values)}) AS meant GROUP BY 1, 2, 3 ORDER BY 1",
        *values.all,
    )
    return [HourlyCount(_hour(row[0]), row[1], row[2], row[3]) for row in rows]


def _hour(number: int) -> datetime:
    return datetime.fromtimestamp(number * 3600, UTC)


async def find_exceptions(
    db: Db,
    wanted: CountFilter,
    *,
    after: tuple[datetime, str] | None = None,
    limit: int = 500,
    newest: bool = False,
) -> list[CountedException]:
    """A page of the exceptions by time; `newest`: from the end."""
    values = Values()
    where = _where(wanted, values, has_sums=False)
    order = "DESC" if newest else "ASC"
    begin, last = (after[0], after[1]) if after is not None else (wanted.begin, "")
    first = values.add(micros(begin))
    rows: Sequence[Sequence[object]] = await db.fetch(
        "SELECT at, event_id, queue_id, sender_domain, recipient_domain, result, protection,"
        f" sentence FROM relay.exception WHERE {where} AND at >= {first}"
        f" AND at < {values.add(micros(wanted.end))}"
        f" AND (at > {first} OR event_id > {values.add(last)})"
        f" ORDER BY at {order}, event_id {order} LIMIT {values.add(limit)}::integer",
        *values.all,
    )
    return [CountedException(moment(at), *rest) for at, *rest in rows]  # type: ignore[arg-type]


async def purge_statistics(db: Db, before: datetime, limit: int) -> int:
    """Forget some of what is older; how many rows."""
    hour = hour_of(before)
    total = 0
    for table, column, bound in (
        ("statistic", "hour", hour),
        ("counted", "hour", hour),
        ("exception", "at", hour * 3_600_000_000),
    ):
        status = await db.execute(
            f"DELETE FROM relay.{table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM relay.{table}"
            f" WHERE {column} < $1 LIMIT $2))",
            bound,
            limit,
        )
        total += int(status.rpartition(" ")[2])
    return total
