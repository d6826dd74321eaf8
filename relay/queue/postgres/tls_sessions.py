"""The sessions that reports on TLS count, and the reports that are sent.

As in SQLite; the numbers of a session's row are its node's own, so that no node waits for another.
`SessionCounter` adds what a commit counts, within its transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, datetime

from relay.mail.tls_session import TlsSession
from relay.queue.batch import FinishedReport
from relay.queue.postgres.connection import Db, changed_rows
from relay.queue.postgres.inserts import columns
from relay.queue.postgres.lease import Lease
from relay.queue.request import Refused
from relay.queue.tls_sessions import (
    CountedSessions,
    DomainSessions,
    RecentDays,
    ReportResult,
    counted_sessions,
    day_from,
    day_number,
)


class SessionCounter:
    """Adds to the counts, for the writer."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._days = RecentDays()
        self.forget = self._days.forget

    async def add(self, db: Db, counted: Sequence[tuple[datetime, Sequence[TlsSession]]]) -> None:
        """Count sessions, each with its time, within the transaction of their results."""
        for day in self._days.unknown(counted):
            kept = "SELECT DISTINCT domain, policy, failure FROM relay.tls_session WHERE day = $1"
            self._days.learn(day, await db.fetch(kept, day))
        numbers, policies = self._days.count(counted)
        if policies:
            await db.execute(
                "INSERT INTO relay.tls_policy SELECT * FROM"
                " unnest($1::integer[], $2::text[], $3::text[], $4::text[]) ON CONFLICT DO NOTHING",
                *columns(policies, 4),
            )
        if numbers:
            rows = [(*key, self._lease.node, number) for key, number in sorted(numbers.items())]
            await db.execute(
                "INSERT INTO relay.tls_session SELECT * FROM unnest($1::integer[], $2::text[],"
                " $3::text[], $4::text[], $5::integer[], $6::bigint[])"
                " ON CONFLICT (day, domain, policy, failure, node)"
                " DO UPDATE SET number = tls_session.number + excluded.number",
                *columns(rows, 6),
            )


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
    return [day_from(day) for (day,) in rows]


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
    return counted_sessions(rows)


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
        total += changed_rows(status)
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


async def finish_reports(db: Db, lease: int, finished: Iterable[FinishedReport]) -> None:
    """Write down what became of claimed reports. What is not claimed is refused."""
    for day, domain, place, result in finished:
        changed = await db.execute(
            "UPDATE relay.tls_report SET result = $4"
            " WHERE day = $1 AND domain = $2 AND place = $3 AND result = '' AND lease = $5",
            day_number(day),
            domain,
            place,
            result.value,
            lease,
        )
        if not changed_rows(changed):
            raise Refused(f"the report on TLS for {domain} of {day} to {place} is not claimed")


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
