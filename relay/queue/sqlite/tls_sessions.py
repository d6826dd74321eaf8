"""The sessions that reports on TLS count, in SQLite, and the reports that are sent.

    tls_policy    one row for each day, domain and policy: its text
    tls_session   one row for each day, domain, policy and failure: how many
    tls_report    one row for each day, domain and place that a report is being sent to, or was

`SessionCounter` adds what a commit counts, within its transaction: one statement, and another where
a domain has a policy that was not seen that day.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from datetime import date, datetime
from functools import lru_cache
from itertools import chain

from relay.mail.tls_session import TlsSession
from relay.queue.batch import FinishedReport
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

_CLAIMED = ""
_MOST_ROWS = 64


class SessionCounter:
    """Adds to the counts; used on the writer's thread."""

    def __init__(self) -> None:
        self._days = RecentDays()
        self.forget = self._days.forget

    def add(
        self, db: sqlite3.Connection, counted: Sequence[tuple[datetime, Sequence[TlsSession]]]
    ) -> None:
        """Count sessions, each with its time. Called within the transaction of their results."""
        for day in self._days.unknown(counted):
            kept = "SELECT domain, policy, failure FROM tls_session WHERE day = ?"
            self._days.learn(day, db.execute(kept, (day,)))
        numbers, policies = self._days.count(counted)
        if policies:
            db.executemany("INSERT OR IGNORE INTO tls_policy VALUES (?, ?, ?, ?)", policies)
        rows = list(numbers.items())
        for start in range(0, len(rows), _MOST_ROWS):
            piece = rows[start : start + _MOST_ROWS]
            values = chain.from_iterable((*key, number) for key, number in piece)
            db.execute(_add_statement(len(piece)), list(values))


@lru_cache(maxsize=_MOST_ROWS)
def _add_statement(rows: int) -> str:
    values = ", ".join(["(?, ?, ?, ?, ?)"] * rows)
    return (
        f"INSERT INTO tls_session VALUES {values}"
        " ON CONFLICT DO UPDATE SET number = number + excluded.number"
    )


# --- what was counted -----------------------------------------------------------------------------


def days(db: sqlite3.Connection) -> list[date]:
    """The days of which sessions are kept. Each is found in one step."""
    found = []
    day = db.execute("SELECT min(day) FROM tls_session").fetchone()[0]
    while day is not None:
        found.append(day_from(day))
        day = db.execute("SELECT min(day) FROM tls_session WHERE day > ?", (day,)).fetchone()[0]
    return found


def domains(
    db: sqlite3.Connection, day: date, *, after: str = "", limit: int = 500
) -> list[DomainSessions]:
    """A page of the domains of a day."""
    rows = db.execute(
        "SELECT domain, sum(iif(failure = '', number, 0)), sum(iif(failure = '', 0, number))"
        " FROM tls_session WHERE day = ? AND domain > ? GROUP BY domain ORDER BY domain LIMIT ?",
        (day_number(day), after, limit),
    )
    return [DomainSessions(*row) for row in rows]


def sessions(db: sqlite3.Connection, day: date, domain: str) -> list[CountedSessions]:
    """The sessions of a day and domain."""
    rows = db.execute(
        "SELECT data, failure, number FROM tls_session JOIN tls_policy"
        " USING (day, domain, policy) WHERE day = ? AND domain = ?",
        (day_number(day), domain),
    )
    return counted_sessions(rows)


def purge_sessions(db: sqlite3.Connection, before: date, limit: int) -> int:
    """Forget some of what is of earlier days; how many rows."""
    return sum(
        db.execute(
            f"DELETE FROM {table} WHERE (day, domain, {key}) IN"
            f" (SELECT day, domain, {key} FROM {table} WHERE day < ? LIMIT ?)",
            (day_number(before), limit),
        ).rowcount
        for table, key in (
            ("tls_session", "policy, failure"),
            ("tls_policy", "policy"),
            ("tls_report", "place"),
        )
    )


# --- reports --------------------------------------------------------------------------------------


def claim_report(db: sqlite3.Connection, day: date, domain: str, place: str) -> bool:
    """Claim a report, if nobody has it."""
    row = (day_number(day), domain, place, _CLAIMED)
    return db.execute("INSERT OR IGNORE INTO tls_report VALUES (?, ?, ?, ?)", row).rowcount > 0


def release_report(db: sqlite3.Connection, day: date, domain: str, place: str) -> None:
    """End a claim."""
    db.execute(
        "DELETE FROM tls_report WHERE day = ? AND domain = ? AND place = ? AND result = ?",
        (day_number(day), domain, place, _CLAIMED),
    )


def forget_claims(db: sqlite3.Connection) -> None:
    """Claims of a relay that is no more."""
    db.execute("DELETE FROM tls_report WHERE result = ?", (_CLAIMED,))


def finish_reports(db: sqlite3.Connection, finished: Iterable[FinishedReport]) -> None:
    """Write down what became of claimed reports. What is not claimed is refused."""
    finish = (
        "UPDATE tls_report SET result = ? WHERE day = ? AND domain = ? AND place = ? AND result = ?"
    )
    for day, domain, place, result in finished:
        row = (result.value, day_number(day), domain, place, _CLAIMED)
        if not db.execute(finish, row).rowcount:
            raise Refused(f"the report on TLS for {domain} of {day} to {place} is not claimed")


def finished_reports(db: sqlite3.Connection, day: date, domain: str) -> dict[str, ReportResult]:
    """What became of the reports of a day and domain."""
    rows = db.execute(
        "SELECT place, result FROM tls_report WHERE day = ? AND domain = ? AND result <> ?",
        (day_number(day), domain, _CLAIMED),
    )
    return {place: ReportResult(result) for place, result in rows}


def domains_reported(db: sqlite3.Connection, day: date) -> set[str]:
    """The domains whose report of a day is finished."""
    rows = db.execute(
        "SELECT domain FROM tls_report WHERE day = ? AND place = '' AND result <> ?",
        (day_number(day), _CLAIMED),
    )
    return {domain for (domain,) in rows}
