"""`relay.queue.tls_sessions` in memory: every session is kept, and counted when it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime

from relay.mail.tls_session import TlsSession
from relay.queue.store import SpoolError
from relay.queue.tls_sessions import (
    CountedSessions,
    DomainSessions,
    ReportResult,
    day_of,
    sessions_added_up,
)

Key = tuple[date, str, str]


class MemoryTlsSessions:
    """Knows no bounds: the tests of those are about engines."""

    def __init__(self) -> None:
        self._counted: list[tuple[date, TlsSession]] = []
        self._reports: dict[Key, ReportResult | None] = {}

    def add(self, sessions: Sequence[TlsSession], at: datetime) -> None:
        self._counted += [(day_of(at), one) for one in sessions]

    def days(self) -> list[date]:
        return sorted({day for day, _ in self._counted})

    def domains(self, day: date) -> list[DomainSessions]:
        found = []
        for domain in sorted({one.domain for on, one in self._counted if on == day}):
            failures = [
                one.failure for on, one in self._counted if on == day and one.domain == domain
            ]
            successful = failures.count(None)
            found.append(DomainSessions(domain, successful, len(failures) - successful))
        return found

    def sessions(self, day: date, domain: str) -> list[CountedSessions]:
        matching = [one for on, one in self._counted if on == day and one.domain == domain]
        return sessions_added_up(
            [[CountedSessions(one.judged_by, one.failure, 1)] for one in matching]
        )

    def claim(self, *key: *Key) -> bool:
        if key in self._reports:
            return False
        self._reports[key] = None
        return True

    def release(self, *key: *Key) -> None:
        if self._reports.get(key, ReportResult.SENT) is None:
            del self._reports[key]

    def forget_claims(self) -> None:
        self._reports = {key: result for key, result in self._reports.items() if result}

    def finish(self, day: date, domain: str, place: str, result: ReportResult) -> None:
        if self._reports.get((day, domain, place), ReportResult.SENT) is not None:
            raise SpoolError("the report is not claimed")
        self._reports[day, domain, place] = result

    def finished(self, day: date, domain: str) -> dict[str, ReportResult]:
        return {
            place: result
            for (on, of, place), result in self._reports.items()
            if (on, of) == (day, domain) and result
        }

    def domains_reported(self, day: date) -> set[str]:
        return {
            domain
            for (on, domain, place), result in self._reports.items()
            if on == day and place == "" and result
        }

    def purge(self, before: date) -> int:
        count = len(self._counted) + len(self._reports)
        self._counted = [(day, one) for day, one in self._counted if day >= before]
        self._reports = {key: result for key, result in self._reports.items() if key[0] >= before}
        return count - len(self._counted) - len(self._reports)
