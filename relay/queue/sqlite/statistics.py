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
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import chain

from relay.mail.event import Event
from relay.queue.conditions import all_of, domain_conditions, exceptions_query
from relay.queue.sqlite.matching import SqliteValues
from relay.queue.statistics import (
    FIRST_EXCEPTIONS,
    CountedException,
    CountedMail,
    CountFilter,
    CountKey,
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

_MOST_ROWS = 64


class CommitCounts:
    """Adds to the statistics; used on the writer's thread."""

    def __init__(self) -> None:
        self._hours = RecentHours()

    def add(self, db: sqlite3.Connection, events: Sequence[Event]) -> None:
        """Count these events. Called within the transaction that writes them."""
        for hour in self._hours.unknown(events):
            self._hours.learn(hour, *_known_of(db, hour))
        numbers, exceptions = self._hours.count(events)
        _write(db, numbers, exceptions)


def _known_of(
    db: sqlite3.Connection, hour: int
) -> tuple[Iterable[tuple[str, str]], Iterable[tuple[str, str, int]]]:
    """The pairs of an hour, and how many exceptions of each are listed."""
    pairs = db.execute(
        "SELECT DISTINCT recipient_domain, sender_domain FROM statistic"
        " WHERE hour = ? AND recipient_domain <> ''",
        (hour,),
    )
    listed = db.execute(
        "SELECT recipient_domain, sender_domain, count(*) FROM exception"
        " WHERE at >= ? AND at < ? GROUP BY 1, 2",
        (first_micros(hour), first_micros(hour + 1)),
    )
    return pairs, listed


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


def _counts(wanted: CountFilter, values: SqliteValues) -> str:
    """The rows that are meant."""
    where = domain_conditions(wanted, values, has_sums=True)
    begin, end = values.add(hour_of(wanted.begin)), values.add(hour_of(wanted.end))
    return f"FROM statistic WHERE {all_of(where)} AND hour >= {begin} AND hour < {end}"


def count_mail(db: sqlite3.Connection, wanted: CountFilter) -> list[CountedMail]:
    """The counts of a period, added up."""
    values = SqliteValues()
    rows = db.execute(
        "SELECT result, protection, policy, reason, sum(number), min(hour), max(hour)"
        f" {_counts(wanted, values)} GROUP BY 1, 2, 3, 4",
        values.all,
    )
    return counted_mail(rows)


def count_hours(db: sqlite3.Connection, wanted: CountFilter) -> list[HourlyCount]:
    """The counts of a period, hour by hour."""
    values = SqliteValues()
    rows = db.execute(
        "SELECT hour, result, protection, sum(number)"
        f" {_counts(wanted, values)} GROUP BY 1, 2, 3 ORDER BY 1",
        values.all,
    )
    return hourly_counts(rows)


def find_exceptions(
    db: sqlite3.Connection, wanted: CountFilter, page: ExceptionPage = FIRST_EXCEPTIONS
) -> list[CountedException]:
    """A page of the exceptions by time."""
    values = SqliteValues()
    query = exceptions_query(wanted, page, values, table="exception")
    return counted_exceptions(db.execute(query, values.all))


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
        (first_micros(hour_of(before)), limit),
    ).rowcount
    return hours + exceptions
