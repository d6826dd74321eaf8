"""The operator's verbs for reports on TLS, with values as JSON.

tls-report-list    domains and days with sessions, and the state of each report
tls-report-show    the present report of a domain and day
tls-report-send    sends the reports that were not sent
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import date
from typing import Protocol

from relay.admin.requests import RequestError, domain_in, text_in
from relay.mail.jsontext import JsonObject
from relay.queue.tls_sessions import ListedReport, SentReport


class Reports(Protocol):
    """The reports of a running relay: `relay.deliver.tls_reports.TlsReporter`."""

    async def document(self, domain: str, day: date | None = None) -> JsonObject | None: ...

    def listing(self) -> AsyncIterator[list[ListedReport]]: ...

    def send(self, domain: str = "", day: date | None = None) -> AsyncIterator[SentReport]: ...

    def is_over(self, day: date) -> bool: ...


async def tls_report_answer(
    reports: Reports, verb: str, request: Mapping[str, object]
) -> AsyncIterator[JsonObject]:
    """The lines that answer a request. "unknown" in the last: a domain without sessions."""
    domain, day = domain_in(request), _day_in(request)
    unknown = [domain] if domain else []
    match verb:
        case "tls-report-list":
            async for page in reports.listing():
                yield {"items": [_listed_as_json(one) for one in page]}
            unknown = []
        case "tls-report-show":
            if not domain:
                raise RequestError("name a domain")
            document = await reports.document(domain, day)
            if document is not None:
                yield {"item": document}
                unknown = []
        case _:
            if day is not None and not reports.is_over(day):
                raise RequestError(f"{day} is not over: its report would not be complete")
            async for sent in reports.send(domain, day):
                yield {"item": _sent_as_json(sent)}
                unknown = []
    yield {"done": {"unknown": unknown}}


def _day_in(request: Mapping[str, object]) -> date | None:
    text = text_in(request, "day")
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise RequestError("day is a day of UTC such as 2030-01-31") from None


def _listed_as_json(one: ListedReport) -> JsonObject:
    return {
        "day": one.day.isoformat(),
        "domain": one.sessions.domain,
        "successful": one.sessions.successful,
        "failed": one.sessions.failed,
        "state": one.state.value,
        "due": one.due.isoformat(timespec="seconds") if one.due is not None else None,
    }


def _sent_as_json(one: SentReport) -> JsonObject:
    return {
        "day": one.day.isoformat(),
        "domain": one.domain,
        "state": one.state.value,
        "reason": one.reason,
        "was-settled": one.was_settled,
    }
