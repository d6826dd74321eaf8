"""The sessions that are counted for reports on TLS (RFC 8460): the values, and what bounds them.

Sessions are counted for each day (of UTC), domain that is told, policy and failure, in the commit
of the result they belong to.

All of it is bounded, since a stranger chooses policies, hosts and the words of an error. Of a day,
`DOMAINS_A_DAY` domains are counted. Of a domain and day, `POLICIES_OF_DOMAIN` policies are kept
with their text, further ones by their type; `FAILURES_OF_DOMAIN` different failures with their
details, further ones by their result. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from relay.mail.jsontext import of_json, to_json
from relay.mail.outcome import PolicyResult, PolicyType
from relay.mail.tls_session import JudgedBy, SessionFailure, TlsSession

DOMAINS_A_DAY = 20_000
POLICIES_OF_DOMAIN = 20
FAILURES_OF_DOMAIN = 100
_POLICY_CHARS = 16 * 1024
_REASON_CHARS = 200

_FIRST_DAY = date(1970, 1, 1).toordinal()
_DAYS_REMEMBERED = 2


class ReportResult(StrEnum):
    """What became of a report to one place, or of a domain's report as a whole."""

    SENT = "sent"
    GIVEN_UP = "given-up"
    NOT_WANTED = "not-wanted"
    """The domain names no place to send reports to."""


class ReportState(StrEnum):
    """Where the report of a domain and day stands."""

    SO_FAR = "so-far"
    """The day is not over."""
    DUE = "due"
    SENT = "sent"
    GIVEN_UP = "given-up"
    NOT_WANTED = "not-wanted"


@dataclass(frozen=True, slots=True)
class ListedReport:
    """A domain and day with sessions, for the operator. `due`: when its report is sent, None: never
    more.
    """

    day: date
    sessions: DomainSessions
    state: ReportState
    due: datetime | None = None


@dataclass(frozen=True, slots=True)
class SentReport:
    """What came of sending a report now. `reason`: why it was not sent to all its places.
    `was_settled`: its state stood before, and nothing was sent now.
    """

    day: date
    domain: str
    state: ReportState
    reason: str = ""
    was_settled: bool = False


class CountedSessions(NamedTuple):
    """How many sessions of a day and domain had one policy and one failure, None for success."""

    judged_by: JudgedBy
    failure: SessionFailure | None
    number: int


class DomainSessions(NamedTuple):
    """How many sessions a domain had in a day."""

    domain: str
    successful: int
    failed: int


class TlsSessionsView(Protocol):
    """The sessions that were counted. All methods may raise `SpoolError`."""

    async def tls_days(self) -> list[date]:
        """The days of which sessions are kept, oldest first."""

    async def tls_domains(
        self, day: date, *, after: str = "", limit: int = 500
    ) -> list[DomainSessions]:
        """A page of the domains that had sessions in a day, by domain; `after`: the last before."""

    async def tls_sessions(self, day: date, domain: str) -> list[CountedSessions]:
        """The sessions of a day and domain, each policy with each of its failures once."""


@dataclass(slots=True)
class _DomainBounds:
    policies: set[str] = field(default_factory=set)
    failures: set[tuple[str, str]] = field(default_factory=set)


@dataclass(slots=True)
class DayBounds:
    """What a day has so far of each domain: its policies (by id), and its failures by policy."""

    domains: dict[str, _DomainBounds] = field(default_factory=dict)

    def note(self, domain: str, policy: str, failure: str) -> None:
        """What was counted before."""
        bounds = self.domains.setdefault(domain, _DomainBounds())
        bounds.policies.add(policy)
        if failure:
            bounds.failures.add((policy, failure))

    def admit(self, session: TlsSession) -> tuple[JudgedBy, str, str, bool] | None:
        """As what a session is counted: policy, its id, the data of its failure, and whether the
        policy is new; None where its domain is one too many.
        """
        bounds = self.domains.get(session.domain)
        if bounds is None:
            if len(self.domains) >= DOMAINS_A_DAY:
                return None
            bounds = self.domains[session.domain] = _DomainBounds()
        policy = _cut(session.judged_by)
        id = policy_id(policy)
        if id not in bounds.policies and len(bounds.policies) >= POLICIES_OF_DOMAIN:
            policy = JudgedBy(policy.type, session.domain)
            id = policy_id(policy)
        failure = failure_data(session.failure)
        if failure and (id, failure) not in bounds.failures:
            if len(bounds.failures) >= FAILURES_OF_DOMAIN:
                assert session.failure is not None
                failure = failure_data(SessionFailure(session.failure.result))
            else:
                bounds.failures.add((id, failure))
        is_new = id not in bounds.policies
        bounds.policies.add(id)
        return policy, id, failure, is_new


SessionKey = tuple[int, str, str, str]
"""Day, domain, policy and failure of a count."""

PolicyRow = tuple[int, str, str, str]
"""Day, domain, id and text of a policy."""


class RecentDays:
    """Counts the sessions of commits, and remembers the bounds of the newest days between them."""

    def __init__(self) -> None:
        self._days: dict[int, DayBounds] = {}

    def forget(self) -> None:
        """A transaction was undone: what the tables have is not known any more."""
        self._days.clear()

    def unknown(self, counted: Iterable[tuple[datetime, Sequence[TlsSession]]]) -> set[int]:
        """The days of these sessions that have to be learned first."""
        return {day_number(day_of(at)) for at, _ in counted} - self._days.keys()

    def learn(self, day: int, rows: Iterable[Sequence[str]]) -> None:
        """What a day has already. `rows`: domain, policy, failure."""
        bounds = self._days[day] = DayBounds()
        for domain, policy, failure in rows:
            bounds.note(domain, policy, failure)

    def count(
        self, counted: Iterable[tuple[datetime, Sequence[TlsSession]]]
    ) -> tuple[Counter[SessionKey], list[PolicyRow]]:
        """What sessions, each with its time, add to the counts, and the policies that are new.
        Their days are learned.
        """
        numbers: Counter[SessionKey] = Counter()
        policies: list[PolicyRow] = []
        for at, sessions in counted:
            day = day_number(day_of(at))
            bounds = self._days[day]
            for session in sessions:
                admitted = bounds.admit(session)
                if admitted is None:
                    continue
                policy, id, failure, is_new = admitted
                numbers[day, session.domain, id, failure] += 1
                if is_new:
                    policies.append((day, session.domain, id, policy_data(policy)))
        while len(self._days) > _DAYS_REMEMBERED:
            del self._days[min(self._days)]
        return numbers, policies


def _cut(policy: JudgedBy) -> JudgedBy:
    """A policy without a text that is too long to be kept."""
    if sum(map(len, policy.strings)) + sum(map(len, policy.mx)) <= _POLICY_CHARS:
        return policy
    return JudgedBy(policy.type, policy.domain)


def day_of(at: datetime) -> date:
    """The day of UTC."""
    return date.fromordinal(_FIRST_DAY + int(at.timestamp()) // 86400)


def day_number(day: date) -> int:
    """The days since 1970."""
    return day.toordinal() - _FIRST_DAY


def day_from(number: int) -> date:
    """The day of `day_number`."""
    return date.fromordinal(number + _FIRST_DAY)


# --- as columns -----------------------------------------------------------------------------------


def policy_data(policy: JudgedBy) -> str:
    """A policy as an engine keeps it."""
    return to_json([policy.type.value, policy.domain, policy.strings, policy.mx])


def policy_of(data: str) -> JudgedBy:
    """What `policy_data` made it of."""
    type, domain, strings, mx = of_json(data)
    return JudgedBy(PolicyType(type), domain, tuple(strings), tuple(mx))


@lru_cache(maxsize=256)
def policy_id(policy: JudgedBy) -> str:
    """What stands for a policy among those of its domain: the same in every queue."""
    return sha256(policy_data(policy).encode()).hexdigest()[:16]


def failure_data(failure: SessionFailure | None) -> str:
    """A failure as an engine keeps it; "" for success."""
    if failure is None:
        return ""
    return to_json(
        [
            failure.result.value,
            failure.sending_ip,
            failure.mx_host,
            failure.mx_ip,
            failure.reason[:_REASON_CHARS],
        ]
    )


def failure_of(data: str) -> SessionFailure | None:
    """What `failure_data` made it of."""
    if not data:
        return None
    result, *rest = of_json(data)
    return SessionFailure(PolicyResult(result), *rest)


def counted_sessions(rows: Iterable[Sequence[Any]]) -> list[CountedSessions]:
    """What an engine found. `rows`: the data of a policy, that of a failure, and a number."""
    return [
        CountedSessions(policy_of(policy), failure_of(failure), number)
        for policy, failure, number in rows
    ]


def sessions_added_up(parts: Iterable[Sequence[CountedSessions]]) -> list[CountedSessions]:
    """The sessions of several queues as one, in an order that is always the same."""
    sums: dict[tuple[JudgedBy, SessionFailure | None], int] = {}
    for part in parts:
        for judged_by, failure, number in part:
            sums[judged_by, failure] = sums.get((judged_by, failure), 0) + number
    found = [CountedSessions(*key, number) for key, number in sums.items()]
    return sorted(found, key=lambda one: (policy_data(one[0]), failure_data(one[1])))
