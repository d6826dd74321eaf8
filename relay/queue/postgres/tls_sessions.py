"""The sessions that reports on TLS count, and the reports that are sent.

As in SQLite; the numbers of a session's row are its node's own, so that no node waits for another.
What a commit counts is written by `statements`.
"""

from __future__ import annotations

from datetime import date

from relay.queue.postgres.connection import Db
from relay.queue.tls_sessions import (
    CountedSessions,
    DomainSessions,
    ReportResult,
    day_number,
    failure_of,
    policy_of,
)

__all__ = [
    "claim_report",
    "days",
    "domains",
    "domains_reported",
    "finished_reports",
    "purge_sessions",
    "release_report",
    "sessions",
]

_FIRST_DAY = date(1970, 1, 1).toordinal()


async def days(db: Db) -> list[date]:
    """The days of which sessions are kept."""
    rows = await db.fetch(
        """WITH RECURSIVE kept (day) AS (
            SELECT min(day) FROM relay.tls_session
            UNION ALL
            SELECT (SELECT min(day) FROM relay.tls_session WHERE tls_session.day > kept.day)
            FROM kept WHERE kept.day IS NOT NULL)
        SELECT day FROM kept WHERE day IS NOT NULL ORDER BY day"""
    )
    return [date.fromordinal(day + _FIRST_DAY) for (day,) in rows]


async def domains(db: Db, day: date, *, after: str = "", limit: int = 500) -> list[DomainSessions]:
    """A page of the domains of a day."""
    rows = await db.fetch(
        "SELECT domain, coalesce(sum(number) FILTER (WHERE failure = ''), 0)::bigint,"
        " coalesce(sum(number) FILTER (WHERE failure <> ''), 0)::bigint FROM relay.tls_session"
        " WHERE day = $1 AND domain > $2 GROUP BY domain ORDER BY domain LIMIT $3",
        day_number(day),
        after,
        limit,
    )
    return [DomainSessions(row[0], row[1], row[2]) for row in rows]


async def sessions(db: Db, day: date, domain: str) -> list[CountedSessions]:
    """The sessions of a day and domain."""
    rows = await db.fetch(
        "SELECT data, failure, sum(number)::bigint FROM relay.tls_session JOIN relay.tls_policy"
        " USING (day, domain, policy) WHERE day = $1 AND domain = $2 GROUP BY 1, 2",
        day_number(day),
        domain,
    )
    return [
        CountedSessions(policy_of(policy), failure_of(failure), number)
        for policy, failure, number in rows
    ]


async def purge_sessions(db: Db, before: date, limit: int) -> int:
    """Forget some of what is of earlier days; how many rows."""
    total = 0
    for table in ("tls_session", "tls_policy", "tls_report"):
        status = await db.execute(
            f"DELETE FROM relay.{table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM relay.{table}"
            " WHERE day < $1 LIMIT $2))",
            day_number(before),
            limit,
        )
        total += int(status.rpartition(" ")[2])
    return total


async def claim_report(db: Db, lease: int, day: date, domain: str, place: str) -> bool:
    """Claim a report, if no node has it."""
    status = await db.execute(
        "INSERT INTO relay.tls_report VALUES ($1, $2, $3, '', $4) ON CONFLICT DO NOTHING",
        day_number(day),
        domain,
        place,
        lease,
    )
    return status.endswith(" 1")


async def release_report(db: Db, lease: int, day: date, domain: str, place: str) -> None:
    """End a claim."""
    await db.execute(
        "DELETE FROM relay.tls_report"
        " WHERE day = $1 AND domain = $2 AND place = $3 AND result = '' AND lease = $4",
        day_number(day),
        domain,
        place,
        lease,
    )


async def finished_reports(db: Db, day: date, domain: str) -> dict[str, ReportResult]:
    """What became of the reports of a day and domain."""
    rows = await db.fetch(
        "SELECT place, result FROM relay.tls_report"
        " WHERE day = $1 AND domain = $2 AND result <> ''",
        day_number(day),
        domain,
    )
    return {place: ReportResult(result) for place, result in rows}


async def domains_reported(db: Db, day: date) -> set[str]:
    """The domains whose report of a day is finished."""
    rows = await db.fetch(
        "SELECT domain FROM relay.tls_report WHERE day = $1 AND place = '' AND result <> ''",
        day_number(day),
    )
    return {domain for (domain,) in rows}
