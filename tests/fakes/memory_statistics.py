"""`relay.queue.statistics` in memory: every counted event is kept, and counted when it is asked."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from relay.mail.event import Counted, Event
from relay.queue.statistics import (
    CountedException,
    CountedMail,
    CountFilter,
    HourlyCount,
    added_up,
    hour_of,
)


class MemoryStatistics:
    """Knows no bounds: the tests of those are about engines."""

    def __init__(self) -> None:
        self._counted: list[tuple[Event, Counted]] = []

    def add(self, event: Event) -> None:
        self._counted += [(event, one) for one in event.counted]

    def _matching(self, wanted: CountFilter) -> list[tuple[Event, Counted]]:
        return [
            (event, one)
            for event, one in self._counted
            if hour_of(wanted.begin) <= hour_of(event.at) < hour_of(wanted.end)
            and wanted.sender_domain in ("", one.sender_domain)
            and wanted.recipient_domain in ("", one.recipient_domain)
        ]

    def count_mail(self, wanted: CountFilter) -> list[CountedMail]:
        names = wanted.sender_domain or wanted.recipient_domain
        return added_up(
            [
                [
                    CountedMail(
                        one.result,
                        one.protection,
                        one.policy if names else _without_rule_names(one.policy),
                        one.reason,
                        one.number,
                        _hour(event),
                        _hour(event),
                    )
                ]
                for event, one in self._matching(wanted)
            ]
        )

    def count_hours(self, wanted: CountFilter) -> list[HourlyCount]:
        sums: Counter[tuple[datetime, str, str]] = Counter()
        for event, one in self._matching(wanted):
            sums[_hour(event), one.result, one.protection] += one.number
        return [HourlyCount(*key, number) for key, number in sorted(sums.items())]

    def find_exceptions(self, wanted: CountFilter) -> list[CountedException]:
        return sorted(
            CountedException(
                event.at,
                event.id,
                event.queue_id,
                one.sender_domain,
                one.recipient_domain,
                one.result,
                one.protection,
                one.exception,
            )
            for event, one in self._matching(wanted)
            if one.exception
        )

    def purge(self, before: datetime) -> int:
        kept = [one for one in self._counted if hour_of(one[0].at) >= hour_of(before)]
        gone = len(self._counted) - len(kept)
        self._counted[:] = kept
        return gone


def _hour(event: Event) -> datetime:
    return datetime.fromtimestamp(hour_of(event.at) * 3600, UTC)


def _without_rule_names(policy: str) -> str:
    words = []
    for part in policy.split(", "):
        head, _, source = part.partition("(")
        words.append(f"{head}({source.rstrip(')').split(' ')[0]})")
    return ", ".join(words)
