"""Reads the filters of the log from a URL into an `EventFilter`, and writes them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

from relay.mail.event import Protection
from relay.policy.settings import Source
from relay.queue.store import EventFilter

EVENTS = ("accepted", "delivered", "deferred", "failed", "operator")
PROTECTIONS = tuple(one.value for one in Protection)
SOURCES = tuple(one.value for one in Source)

_LONGEST = 300


@dataclass(frozen=True, slots=True)
class LogFilter:
    """The fields of the form, as text. "" is no condition. Times are in UTC."""

    q: str = ""
    event: str = ""
    protection: str = ""
    source: str = ""
    sender: str = ""
    recipient: str = ""
    begin: str = ""
    end: str = ""

    def query(self, **more: str | int) -> str:
        """The query of a URL with this filter, and with `more`."""
        values = {one.name: getattr(self, one.name) for one in fields(self)} | more
        return urlencode({name: value for name, value in values.items() if value not in ("", 0)})

    @property
    def is_empty(self) -> bool:
        """Whether every event matches."""
        return self == LogFilter()

    @property
    def wanted(self) -> EventFilter:
        """The events that match."""
        found = EventFilter(
            begin=read_time(self.begin),
            end=read_time(self.end, is_end=True),
            sender_domain=self.sender.removeprefix("@"),
            recipient_domain=self.recipient.removeprefix("@"),
        )
        conditions: list[tuple[str, str]] = []
        match self.event:
            case "deferred":
                found, conditions = _failed(found), [("severity", "temporary")]
            case "failed":
                found, conditions = _failed(found), [("severity", "permanent")]
            case "":
                pass
            case name:
                found = replace(found, names=frozenset({name}))
        if self.protection:
            conditions.append(("protection", self.protection))
        if self.source:
            conditions.append(("policy-source", self.source))
        if self.q:
            conditions.append(("text", self.q))
        return replace(found, fields=tuple(conditions))


def _failed(wanted: EventFilter) -> EventFilter:
    return replace(wanted, names=frozenset({"failed"}))


def read_filter(query: Mapping[str, str]) -> LogFilter:
    """The filter of a query. An unknown word is left out."""
    text = {one.name: query.get(one.name, "").strip()[:_LONGEST] for one in fields(LogFilter)}
    known = {"event": EVENTS, "protection": PROTECTIONS, "source": SOURCES}
    for name, words in known.items():
        if text[name] not in words:
            text[name] = ""
    for name in ("begin", "end"):
        if read_time(text[name]) is None:
            text[name] = ""
    return LogFilter(**text)


def read_time(text: str, *, is_end: bool = False) -> datetime | None:
    """A day or a time in UTC; None where it is neither. `is_end`: of a day, take its end."""
    try:
        at = datetime.fromisoformat(text)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        if is_end and len(text) == len("2030-01-31"):
            at += timedelta(days=1) - timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return None
    return at
