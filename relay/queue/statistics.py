"""What is counted of mail, by the hour: the history that outlives the events.

A count is kept for each hour (of UTC), sender domain, recipient domain, result, protection, policy
and reason. It commits with the result it counts. Beside the counts stand the exceptions: of mail
that was not delivered over verified TLS, one row each with the sentence that says why.

Both are bounded. Beyond `PAIRS_AN_HOUR` pairs of domains in an hour the rest is counted for the
domain `other`; beyond `EXCEPTIONS_AN_HOUR` in all, and `EXCEPTIONS_OF_PAIR` of one pair, exceptions
are counted and not listed. The sums of all domains, and those of each sender domain, are kept as
rows of their own (domain ""), so that a look at them costs no more than a look at one pair. Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from relay.mail.event import Counted, Event, EventResult
from relay.queue.rows import micros, moment

PAIRS_AN_HOUR = 10_000
EXCEPTIONS_AN_HOUR = 1_000
EXCEPTIONS_OF_PAIR = 100

OTHER = "other"
"""Stands for the domains of an hour that had too many. It has no dot, so it is nobody's domain."""

_HOUR = timedelta(hours=1)
_EPOCH_HOUR = 3600
_HOURS_REMEMBERED = 3


@dataclass(frozen=True, slots=True)
class CountFilter:
    """Which counts are asked for. The domains are normalised; "" is all of them, "<>" the null
    reverse-path. `begin` (included) and `end` (not included) are whole hours.
    """

    begin: datetime
    end: datetime
    sender_domain: str = ""
    recipient_domain: str = ""


class CountedMail(NamedTuple):
    """How much mail had one result, one protection, one policy and one reason.

    `first` and `last`: the hours of the period in which there was such mail. `number`: recipients;
    for the result `deferred`, attempts.
    """

    result: str
    protection: str
    policy: str
    reason: str
    number: int
    first: datetime
    last: datetime


class HourlyCount(NamedTuple):
    """How much mail had a result and a protection in one hour."""

    hour: datetime
    result: str
    protection: str
    number: int


class CountedException(NamedTuple):
    """Mail that was not delivered over verified TLS, and why. `event_id`: in the delivery log."""

    at: datetime
    event_id: str
    queue_id: str
    sender_domain: str
    recipient_domain: str
    result: str
    protection: str
    sentence: str


@dataclass(frozen=True, slots=True)
class ExceptionPage:
    """Which of the exceptions of a period: at most `limit` by time.

    `after`: time and event id of the last one of the page before. `newest`: of the last ones, the
    newest first.
    """

    after: tuple[datetime, str] | None = None
    limit: int = 500
    newest: bool = False


FIRST_EXCEPTIONS = ExceptionPage()


class StatisticsView(Protocol):
    """The history. All methods may raise `SpoolError`."""

    async def count_mail(self, wanted: CountFilter) -> list[CountedMail]:
        """The counts of a period, added up over its hours."""

    async def count_hours(self, wanted: CountFilter) -> list[HourlyCount]:
        """The counts of a period by the hour, in the order of the hours."""

    async def find_exceptions(
        self, wanted: CountFilter, page: ExceptionPage = FIRST_EXCEPTIONS
    ) -> list[CountedException]:
        """A page of the exceptions by time."""


def hour_of(at: datetime) -> int:
    """The hours since 1970 in UTC."""
    return int(at.timestamp()) // _EPOCH_HOUR


def first_micros(hour: int) -> int:
    """When an hour of `hour_of` begins, in whole microseconds since 1970."""
    return hour * 3_600_000_000


# --- what a commit counts -------------------------------------------------------------------------

Pair = tuple[str, str]
"""Recipient domain and sender domain."""

CountKey = tuple[str, str, int, str, str, str, str]
"""Recipient domain, sender domain, hour, result, protection, policy and reason of a count."""

ExceptionRow = tuple[Any, ...]
"""Recipient domain, sender domain, time, event id, queue id, result, protection and sentence."""

_RULE_NAME = re.compile(r"\(([^\s()]+) [^()]*\)")


@dataclass(slots=True)
class HourBounds:
    """The bounds of one hour: its pairs, and how many exceptions each has."""

    pairs: set[Pair] = field(default_factory=set)
    exceptions: Counter[Pair] = field(default_factory=Counter)
    listed: int = 0

    def within(self, pair: Pair) -> Pair:
        """The pair, or what stands for those that are too many."""
        if pair not in self.pairs:
            if len(self.pairs) >= PAIRS_AN_HOUR:
                return OTHER, OTHER
            self.pairs.add(pair)
        return pair

    def has_room(self, pair: Pair) -> bool:
        """Whether an exception of this pair is listed; it is counted then."""
        if self.listed >= EXCEPTIONS_AN_HOUR or self.exceptions[pair] >= EXCEPTIONS_OF_PAIR:
            return False
        self.listed += 1
        self.exceptions[pair] += 1
        return True


class RecentHours:
    """Counts what commits count, and remembers the bounds of the newest hours between them.

    A transaction that is undone leaves a pair here that has no row, which does no harm.
    """

    def __init__(self) -> None:
        self._hours: dict[int, HourBounds] = {}

    def unknown(self, events: Iterable[Event]) -> set[int]:
        """The hours in which these events count something and which have to be learned first."""
        moments = {event.at for event in events if event.counted}
        return set(map(hour_of, moments)) - self._hours.keys()

    def learn(
        self, hour: int, pairs: Iterable[Sequence[str]], listed: Iterable[Sequence[Any]]
    ) -> None:
        """What an hour has already: it may have begun before this process did.

        `pairs`: recipient domain and sender domain; `listed`: the same with a number of exceptions.
        """
        exceptions = Counter({(recipient, sender): number for recipient, sender, number in listed})
        known = {(recipient, sender) for recipient, sender in pairs}
        self._hours[hour] = HourBounds(known, exceptions, exceptions.total())

    def count(self, events: Iterable[Event]) -> tuple[Counter[CountKey], list[ExceptionRow]]:
        """What these events add to the counts, and the exceptions. Their hours are learned."""
        counts = _count_events(events, self._hours)
        while len(self._hours) > _HOURS_REMEMBERED:
            del self._hours[min(self._hours)]
        return counts


def _count_events(
    events: Iterable[Event], hours: Mapping[int, HourBounds]
) -> tuple[Counter[CountKey], list[ExceptionRow]]:
    numbers: Counter[CountKey] = Counter()
    exceptions: list[ExceptionRow] = []
    at: datetime | None = None
    last: Counted | None = None
    for event in events:
        if not event.counted:
            continue
        if event.at is not at:
            at, last = event.at, None
            hour = hour_of(at)
            bounds = hours[hour]
        for one in event.counted:
            if one is not last:  # events of one verb often count the same, at the same time
                last = one
                pair = bounds.within((one.recipient_domain, one.sender_domain))
                key = (*pair, hour, one.result.value, one.protection, one.policy, one.reason)
            numbers[key] += one.number
            if one.exception and bounds.has_room(pair):
                exceptions.append(
                    (
                        *pair,
                        micros(event.at),
                        event.id,
                        event.queue_id,
                        one.result.value,
                        one.protection,
                        one.exception,
                    )
                )
    return _with_sums(numbers), exceptions


def _with_sums(numbers: Counter[CountKey]) -> Counter[CountKey]:
    """The numbers of pairs of domains, and the sums that are rows of their own."""
    sums = numbers.copy()
    for (_, sender, hour, result, protection, policy, reason), number in numbers.items():
        sums[("", sender, hour, result, protection, policy, reason)] += number
        sums[("", "", hour, result, protection, _without_rule_names(policy), reason)] += number
    return sums


@lru_cache(maxsize=1024)
def _without_rule_names(policy: str) -> str:
    return _RULE_NAME.sub(r"(\1)", policy)


# --- what was counted, of the rows that an engine found -------------------------------------------


def counted_mail(rows: Iterable[Sequence[Any]]) -> list[CountedMail]:
    """`rows`: the columns of `CountedMail`, its hours as numbers."""
    return [
        CountedMail(result, protection, policy, reason, number, _hour(first), _hour(last))
        for result, protection, policy, reason, number, first, last in rows
    ]


def hourly_counts(rows: Iterable[Sequence[Any]]) -> list[HourlyCount]:
    """`rows`: the columns of `HourlyCount`, the hour as a number."""
    return [HourlyCount(_hour(hour), *rest) for hour, *rest in rows]


def counted_exceptions(rows: Iterable[Sequence[Any]]) -> list[CountedException]:
    """`rows`: the columns of `CountedException`, the time in microseconds."""
    return [CountedException(moment(at), *rest) for at, *rest in rows]


def _hour(number: int) -> datetime:
    return datetime.fromtimestamp(number * _EPOCH_HOUR, UTC)


# --- periods --------------------------------------------------------------------------------------


def whole_hours(begin: datetime, end: datetime) -> tuple[datetime, datetime]:
    """A period widened to whole hours of UTC."""
    first = begin - timedelta(seconds=begin.timestamp() % _EPOCH_HOUR)
    past = end.timestamp() % _EPOCH_HOUR
    return first, end if not past else end - timedelta(seconds=past) + _HOUR


def added_up(parts: Sequence[Sequence[CountedMail]]) -> list[CountedMail]:
    """The counts of several queues as one; mail that was delivered first, largest number first."""
    sums: dict[tuple[str, str, str, str], CountedMail] = {}
    for part in parts:
        for one in part:
            key = one[:4]
            other = sums.get(key)
            sums[key] = (
                one
                if other is None
                else CountedMail(
                    *key,
                    one.number + other.number,
                    min(one.first, other.first),
                    max(one.last, other.last),
                )
            )
    order = [*EventResult]
    return sorted(
        sums.values(), key=lambda one: (order.index(EventResult(one.result)), -one.number)
    )
