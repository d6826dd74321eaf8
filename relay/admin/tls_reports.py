"""The operator's verbs for reports on TLS, in the values of the interface's JSON.

tls-report-list    domains and days with sessions, and where the report of each stands
tls-report-show    the report of a domain and day as it is so far
tls-report-send    send now what was not sent
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import date
from typing import Any, Protocol

from relay.admin.requests import RequestError, domain_in, text_in
from relay.queue.tls_sessions import ListedReport, SentReport

__all__ = ["Reports", "tls_report_answer"]


class Reports(Protocol):
    """The reports of a running relay: `relay.deliver.tls_reports.TlsReporter`."""

    async def document(self, domain: str, day: date | None = None) -> dict[str, Any] | None: ...

    def listing(self) -> AsyncIterator[list[ListedReport]]: ...

    def send(self, domain: str = "", day: date | None = None) -> AsyncIterator[SentReport]: ...

    def is_over(self, day: date) -> bool: ...


async def tls_report_answer(
    reports: Reports, verb: str, request: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """The lines that answer a request. "unknown" at the end has the domain that had no session."""
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
                raise RequestError(f"{day} is not over: its report would not be whole")
            async for sent in reports.send(domain, day):
                yield {"item": _sent_as_json(sent)}
                unknown = []
    yield {"done": {"unknown": unknown}}


def _day_in(request: Mapping[str, Any]) -> date | None:
    text = text_in(request, "day")
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise RequestError("day is a day of UTC such as 2030-01-31") from None


def _listed_as_json(one: ListedReport) -> dict[str, Any]:
    return {
        "day": one.day.isoformat(),
        "domain": one.sessions.domain,
        "successful": one.sessions.successful,
        "failed": one.sessions.failed,
        "state": one.state.value,
        "due": one.due.isoformat(timespec="seconds") if one.due is not None else None,
    }


def _sent_as_json(one: SentReport) -> dict[str, Any]:
    return {
        "day": one.day.isoformat(),
        "domain": one.domain,
        "state": one.state.value,
        "reason": one.reason,
        "was-settled": one.was_settled,
    }
