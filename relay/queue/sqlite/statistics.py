"""The statistics in SQLite: counts by the hour, and the exceptions beside them.

    statistic   one row for each hour, pair of domains, result, protection, policy and reason; rows
                without a recipient domain are the sums of a sender domain, and rows without either
                those of all pairs, their policies without the names of the rules
    exception   one row for each message that was not delivered over verified TLS

`CommitCounts` adds what a commit counts, within its transaction: one statement for all of it. What
it remembers between commits are the pairs and exceptions of the newest hours, for the bounds alone;
a transaction that is undone leaves a pair there that has no row, which does no harm.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain

from relay.mail.event import Event
from relay.queue.rows import micros, moment
from relay.queue.statistics import (
    CountedException,
    CountedMail,
    CountFilter,
    CountKey,
    ExceptionRow,
    HourBounds,
    HourlyCount,
    count_events,
    hour_of,
    hours_counted,
)

__all__ = ["CommitCounts", "count_hours", "count_mail", "find_exceptions", "purge_statistics"]

_HOURS_REMEMBERED = 3
_MOST_ROWS = 64


class CommitCounts:
    """Adds to the statistics; used on the writer's thread."""

    def __init__(self) -> None:
        self._hours: dict[int, HourBounds] = {}

    def add(self, db: sqlite3.Connection, events: Sequence[Event]) -> None:
        """Count these events. Called within the transaction that writes them."""
        hours = {hour: self._bounds(db, hour) for hour in hours_counted(events)}
        numbers, exceptions = count_events(events, hours)
        _write(db, numbers, exceptions)

    def _bounds(self, db: sqlite3.Connection, hour: int) -> HourBounds:
        found = self._hours.get(hour)
        if found is None:
            found = self._hours[hour] = _read_bounds(db, hour)
            if len(self._hours) > _HOURS_REMEMBERED:
                del self._hours[min(self._hours)]
        return found


def _read_bounds(db: sqlite3.Connection, hour: int) -> HourBounds:
    """What the hour has already: it may have begun before this process did."""
    pairs = db.execute(
        "SELECT DISTINCT recipient_domain, sender_domain FROM statistic"
        " WHERE hour = ? AND recipient_domain <> ''",
        (hour,),
    )
    counted = db.execute(
        "SELECT recipient_domain, sender_domain, count(*) FROM exception"
        " WHERE at >= ? AND at < ? GROUP BY 1, 2",
        (_micros_of(hour), _micros_of(hour + 1)),
    )
    exceptions = Counter({(recipient, sender): number for recipient, sender, number in counted})
    return HourBounds(set(pairs), exceptions, exceptions.total())


def _micros_of(hour: int) -> int:
    return hour * 3_600_000_000


@lru_cache(maxsize=2 * _MOST_ROWS)
def _add_statement(rows: int) -> str:
    values = ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?)"] * rows)
    return (
        f"INSERT INTO statistic VALUES {values}"
        " ON CONFLICT DO UPDATE SET number = number + excluded.number"
    )


def _write(
    db: sqlite3.Connection, numbers: Counter[CountKey], exceptions: list[ExceptionRow]
) -> None:
    rows = list(numbers.items())
    for start in range(0, len(rows), _MOST_ROWS):
        piece = rows[start : start + _MOST_ROWS]
        values = chain.from_iterable((*key, number) for key, number in piece)
        db.execute(_add_statement(len(piece)), list(values))
    if exceptions:
        # An event that is told twice has one id.
        db.executemany(
            "INSERT OR IGNORE INTO exception VALUES (?, ?, ?, ?, ?, ?, ?, ?)", exceptions
        )


def _where(wanted: CountFilter, *, has_sums: bool) -> tuple[str, dict[str, object]]:
    """The condition on the two domains. `has_sums`: there are rows of the sums, for all domains and
    for each sender domain.
    """
    values: dict[str, object] = {
        "sender": wanted.sender_domain,
        "recipient": wanted.recipient_domain,
    }
    if wanted.recipient_domain and wanted.sender_domain:
        return "recipient_domain = :recipient AND sender_domain = :sender", values
    if wanted.recipient_domain:
        return "recipient_domain = :recipient", values
    if wanted.sender_domain:
        sums = "recipient_domain = '' AND " if has_sums else ""
        return f"{sums}sender_domain = :sender", values
    return ("recipient_domain = '' AND sender_domain = ''" if has_sums else "1"), values


def count_mail(db: sqlite3.Connection, wanted: CountFilter) -> list[CountedMail]:
    """The counts of a period, added up."""
    where, values = _where(wanted, has_sums=True)
    rows = db.execute(
        "SELECT result, protection, policy, reason, sum(number), min(hour), max(hour)"
        f" FROM statistic WHERE {where} AND hour >= :begin AND hour < :end GROUP BY 1, 2, 3, 4",
        values | {"begin": hour_of(wanted.begin), "end": hour_of(wanted.end)},
    )
    return [
        CountedMail(result, protection, policy, reason, number, _hour(first), _hour(last))
        for result, protection, policy, reason, number, first, last in rows
    ]


def count_hours(db: sqlite3.Connection, wanted: CountFilter) -> list[HourlyCount]:
    """The counts of a period, hour by hour."""
    where, values = _where(wanted, has_sums=True)
    rows = db.execute(
        "SELECT hour, result, protection, sum(number) FROM statistic"
        f" WHERE {where} AND hour >= :begin AND hour < :end GROUP BY 1, 2, 3 ORDER BY 1",
        values | {"begin": hour_of(wanted.begin), "end": hour_of(wanted.end)},
    )
    return [HourlyCount(_hour(row[0]), *row[1:]) for row in rows]


def _hour(number: int) -> datetime:
    return datetime.fromtimestamp(number * 3600, UTC)


def find_exceptions(
    db: sqlite3.Connection,
    wanted: CountFilter,
    *,
    after: tuple[datetime, str] | None = None,
    limit: int = 500,
    newest: bool = False,
) -> list[CountedException]:
    """A page of the exceptions by time; `newest`: from the end."""
    where, values = _where(wanted, has_sums=False)
    order = "DESC" if newest else "ASC"
    begin, last = (after[0], after[1]) if after is not None else (wanted.begin, "")
    rows = db.execute(
        "SELECT at, event_id, queue_id, sender_domain, recipient_domain, result, protection,"
        f" sentence FROM exception WHERE {where} AND at >= :begin AND at < :end"
        " AND (at > :begin OR event_id > :last)"
        f" ORDER BY at {order}, event_id {order} LIMIT :limit",
        values | {"begin": micros(begin), "end": micros(wanted.end), "last": last, "limit": limit},
    )
    return [CountedException(moment(at), *rest) for at, *rest in rows]


def purge_statistics(db: sqlite3.Connection, before: datetime, limit: int) -> int:
    """Forget some of what is older; how many rows."""
    hours = db.execute(
        "DELETE FROM statistic WHERE (recipient_domain, sender_domain, hour, result, protection,"
        " policy, reason) IN (SELECT recipient_domain, sender_domain, hour, result, protection,"
        " policy, reason FROM statistic WHERE hour < ? LIMIT ?)",
        (hour_of(before), limit),
    ).rowcount
    exceptions = db.execute(
        "DELETE FROM exception WHERE (recipient_domain, sender_domain, at, event_id) IN"
        " (SELECT recipient_domain, sender_domain, at, event_id FROM exception"
        " WHERE at < ? LIMIT ?)",
        (_micros_of(hour_of(before)), limit),
    ).rowcount
    return hours + exceptions
