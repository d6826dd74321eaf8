"""Reads a date-time strictly by its grammar (RFC 5322 §3.3, §4.3). Pure.

Python's email package accepts dates that it misreads: it takes an unknown zone name and `+01:00`
for UTC, and `10:00 PM` for ten in the morning. A time that a client asks for must not be wrong by
hours, so a text outside the grammar is an error here. Of the obsolete zones, those with a fixed
offset are read; a military letter other than Z has no reliable meaning (§4.3).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_HOURS = {"ut": 0, "utc": 0, "gmt": 0, "z": 0, "edt": -4, "est": -5, "cdt": -5, "cst": -6} | {
    "mdt": -6,
    "mst": -7,
    "pdt": -7,
    "pst": -8,
}
_DATE = re.compile(
    r"(?:([A-Za-z]{3})[ \t]*,[ \t]*)?"
    r"([0-9]{1,2})[ \t]+([A-Za-z]{3})[ \t]+([0-9]{4})[ \t]+"
    r"([0-9]{2}):([0-9]{2})(?::([0-9]{2}))?[ \t]+"
    r"(?:([+-])([0-9]{2})([0-5][0-9])|([A-Za-z]{1,3}))"
    r"(?:[ \t]*\([^()]*\))?"
)


def read_date(text: str) -> datetime:
    """The instant, in UTC; ValueError where the text is not exactly a date-time."""
    match = _DATE.fullmatch(text.strip(" \t"))
    if match is None:
        raise ValueError("not a date of RFC 5322")
    day_name, day, month, year, hour, minute, second, sign, hours, minutes, zone = match.groups()
    if month.lower() not in _MONTHS:
        raise ValueError("no month has this name")
    offset = _named(zone) if zone else timedelta(hours=int(hours), minutes=int(minutes))
    at = datetime(
        int(year),
        _MONTHS.index(month.lower()) + 1,
        int(day),
        int(hour),
        int(minute),
        int(second or 0),
        tzinfo=timezone(-offset if sign == "-" else offset),
    )
    if day_name and day_name.lower() != _DAYS[at.weekday()]:
        raise ValueError("the date is another day of the week")
    try:
        return at.astimezone(UTC)
    except OverflowError as exc:
        raise ValueError("no such year") from exc


def _named(zone: str) -> timedelta:
    hours = _HOURS.get(zone.lower())
    if hours is None:
        raise ValueError("no zone with a fixed offset has this name")
    return timedelta(hours=hours)
