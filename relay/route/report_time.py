"""When a day's report on TLS is sent, and when it is tried again (RFC 8460 §4.1, §5.5). Pure.

A report is about a day of UTC, and goes out between 00:05 and 04:00 of the next one: each domain at
a moment of its own, so that no receiver hears of all senders at once (§4.1). After a failure it is
tried again after longer and longer waits, and given up 24 hours after the first try (§5.5).
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from hashlib import sha256

RETRIED_FOR = timedelta(hours=24)
KEPT = timedelta(days=7)
"""How long the sessions of a day are kept, and what became of its reports."""

_FIRST = timedelta(minutes=5)
_LAST = timedelta(hours=4)
_FIRST_WAIT = timedelta(minutes=10)


def reports_begin(day: date) -> datetime:
    """When the first report about a day is due: all sessions of the day are counted by then."""
    return datetime.combine(day, time(), UTC) + timedelta(days=1) + _FIRST


def report_due(day: date, domain: str) -> datetime:
    """When the report about a day is due: always the same moment of a domain and day."""
    digest = sha256(f"{day} {domain}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return reports_begin(day) + share * (_LAST - _FIRST)


def next_try(tries: int, *, first: datetime, now: datetime) -> datetime | None:
    """When a report that failed so many times, once at least, is tried again; None: it is given up.

    The last try falls on the end of the time.
    """
    ends = first + RETRIED_FOR
    if now >= ends:
        return None
    doublings = 2.0 ** min(tries - 1, 10)
    return min(now + _FIRST_WAIT * doublings, ends)
