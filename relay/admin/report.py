"""Reports how the mail of a period, from one domain to another, was protected.

The answer comes from the statistics, which are kept longer than the events and the files of the
log. The command line, the page and programs get the same answer: `counts` has the numbers,
`listing` all exceptions in the store. Numbers are recipients; those of `deferred` are attempts.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from relay.mail.event import EventResult, Protection
from relay.mail.jsontext import JsonFields, JsonObject
from relay.queue.statistics import (
    CountedException,
    CountedMail,
    CountFilter,
    ExceptionPage,
    StatisticsView,
    added_up,
    whole_hours,
)

PAGE = 500

_COLUMNS = (
    "kind",
    "result",
    "protection",
    "policy",
    "reason",
    "number",
    "first",
    "last",
    "at",
    "id",
    "queue-id",
    "sender-domain",
    "recipient-domain",
    "description",
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_LISTED = {
    (EventResult.DELIVERED, Protection.ENCRYPTED),
    (EventResult.DELIVERED, Protection.CLEAR),
    (EventResult.DELIVERED, Protection.NOT_SENT),
    (EventResult.FAILED, Protection.NOT_SENT),
}


@dataclass(frozen=True, slots=True)
class Summary:
    """The counts for people. `rules`: each policy text with the number of recipients under it, and
    the first and last hour. `exceptions`: their number, also of those that are not in the store.
    """

    accepted: int = 0
    delivered: int = 0
    verified: int = 0
    encrypted: int = 0
    clear: int = 0
    failed: int = 0
    deferred: int = 0
    stopped: int = 0
    """Attempts that ended because no host had the TLS that was required."""
    exceptions: int = 0
    rules: tuple[tuple[str, int, datetime, datetime], ...] = ()
    reasons: tuple[tuple[str, str, int], ...] = field(default=())
    """Result, reason and number of recipients not delivered over verified TLS."""

    def share(self, number: int) -> float:
        """The part of the delivered mail, from 0 to 1."""
        return number / self.delivered if self.delivered else 0.0


def period(
    begin: datetime, end: datetime, *, sender_domain: str = "", recipient_domain: str = ""
) -> CountFilter:
    """The filter for a period, extended to whole hours, because mail is counted by the hour."""
    first, last = whole_hours(begin.astimezone(UTC), end.astimezone(UTC))
    return CountFilter(first, last, sender_domain, recipient_domain)


async def counts(view: StatisticsView, wanted: CountFilter) -> list[CountedMail]:
    """The numbers of recipients by result, protection, policy and reason."""
    return added_up([await view.count_mail(wanted)])


async def listing(
    view: StatisticsView, wanted: CountFilter
) -> AsyncIterator[list[CountedException]]:
    """All exceptions in the store, by time, in pages."""
    after: tuple[datetime, str] | None = None
    while page := await view.find_exceptions(wanted, ExceptionPage(after, PAGE)):
        yield page
        if len(page) < PAGE:
            return
        after = page[-1].at, page[-1].event_id


def summary_of(found: Sequence[CountedMail]) -> Summary:
    """The counts, added up."""

    def total(result: EventResult, protection: Protection | None = None, reason: str = "") -> int:
        return sum(
            one.number
            for one in found
            if one.result == result
            and (protection is None or one.protection == protection)
            and (not reason or one.reason == reason)
        )

    return Summary(
        accepted=total(EventResult.ACCEPTED),
        delivered=total(EventResult.DELIVERED),
        verified=total(EventResult.DELIVERED, Protection.VERIFIED),
        encrypted=total(EventResult.DELIVERED, Protection.ENCRYPTED),
        clear=total(EventResult.DELIVERED, Protection.CLEAR),
        failed=total(EventResult.FAILED),
        deferred=total(EventResult.DEFERRED),
        stopped=total(EventResult.DEFERRED, reason="tls-required"),
        exceptions=sum(one.number for one in found if _is_exception(one)),
        rules=_rules(found),
        reasons=_reasons(found),
    )


def _is_exception(one: CountedMail) -> bool:
    return (one.result, one.protection) in _LISTED or (
        one.result == EventResult.DEFERRED and one.reason == "tls-required"
    )


def _rules(found: Sequence[CountedMail]) -> tuple[tuple[str, int, datetime, datetime], ...]:
    """The policies of attempts and acceptances. A rule that was changed later counts as two."""
    rules: dict[str, tuple[int, datetime, datetime]] = {}
    for one in found:
        number, first, last = rules.get(one.policy, (0, one.first, one.last))
        if one.result in (EventResult.DELIVERED, EventResult.FAILED):
            number += one.number
        rules[one.policy] = number, min(first, one.first), max(last, one.last)
    return tuple(
        (policy, *rest) for policy, rest in sorted(rules.items(), key=lambda item: item[1][1])
    )


def _reasons(found: Sequence[CountedMail]) -> tuple[tuple[str, str, int], ...]:
    sums: dict[tuple[str, str], int] = {}
    for one in found:
        if one.reason:
            key = one.result, one.reason
            sums[key] = sums.get(key, 0) + one.number
    return tuple((*key, number) for key, number in sorted(sums.items()))


# --- as JSON and CSV ----------------------------------------------------------------------------


def counts_as_json(found: Sequence[CountedMail]) -> list[JsonObject]:
    """The counts; `first` and `last` are the hours, in UTC."""
    return [
        {
            "result": one.result,
            "protection": one.protection,
            "policy": one.policy,
            "reason": one.reason,
            "number": one.number,
            "first": one.first.isoformat(),
            "last": one.last.isoformat(),
        }
        for one in found
    ]


def count_of_json(one: JsonFields) -> CountedMail:
    """The count that `counts_as_json` wrote."""
    return CountedMail(
        one["result"],
        one["protection"],
        one["policy"],
        one["reason"],
        one["number"],
        datetime.fromisoformat(one["first"]),
        datetime.fromisoformat(one["last"]),
    )


def exception_as_json(one: CountedException) -> JsonObject:
    """An exception, with its time in UTC."""
    return {
        "at": one.at.isoformat(),
        "id": one.event_id,
        "queue-id": one.queue_id,
        "sender-domain": one.sender_domain,
        "recipient-domain": one.recipient_domain,
        "result": one.result,
        "protection": one.protection,
        "description": one.sentence,
    }


def csv_lines(kind: str, rows: Iterable[Mapping[str, object]], *, with_head: bool = False) -> str:
    """Counts or exceptions (`kind`) as lines of one table in CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="")
    if with_head:
        writer.writeheader()
    for row in rows:
        writer.writerow({"kind": kind} | {key: csv_cell(value) for key, value in row.items()})
    return text.getvalue()


def csv_cell(value: object) -> object:
    """A value for CSV. No text of a stranger becomes a formula of a spreadsheet."""
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value
