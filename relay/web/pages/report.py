"""The report: how mail of a period was protected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, timedelta

from aiohttp import web

from relay.admin import report as reports
from relay.queue.statistics import CountFilter, ExceptionPage
from relay.web.filters import read_time
from relay.web.guard import PageRefused
from relay.web.pages.stream import stream
from relay.web.pages.visit import Visit, read_domain
from relay.web.state import Web

_LISTED_EXCEPTIONS = ExceptionPage(limit=200)


async def report(visit: Visit) -> web.StreamResponse:
    """The report of a period."""
    asked, wanted = _period(visit)
    found = await reports.counts(visit.state.view, wanted)
    exceptions = await visit.state.view.find_exceptions(wanted, _LISTED_EXCEPTIONS)
    return visit.show(
        "report.html",
        asked=asked,
        wanted=wanted,
        summary=reports.summary_of(found),
        is_empty=not found,
        exceptions=exceptions,
    )


async def report_file(visit: Visit) -> web.StreamResponse:
    """The report as JSON or CSV, with all exceptions in the store."""
    _, wanted = _period(visit)
    if visit.request.path.endswith(".csv"):
        return await stream(visit, "report.csv", "text/csv", _report_csv(visit.state, wanted))
    found = await reports.counts(visit.state.view, wanted)
    exceptions = [
        reports.exception_as_json(one)
        async for page in reports.listing(visit.state.view, wanted)
        for one in page
    ]
    response = web.json_response(
        {
            "begin": wanted.begin.isoformat(),
            "end": wanted.end.isoformat(),
            "sender-domain": wanted.sender_domain,
            "recipient-domain": wanted.recipient_domain,
            "counts": reports.counts_as_json(found),
            "exceptions": exceptions,
        }
    )
    response.headers["Content-Disposition"] = 'attachment; filename="report.json"'
    return visit.site.secured(response)


async def _report_csv(state: Web, wanted: CountFilter) -> AsyncIterator[str]:
    found = await reports.counts(state.view, wanted)
    yield reports.csv_lines("count", reports.counts_as_json(found), with_head=True)
    async for page in reports.listing(state.view, wanted):
        yield reports.csv_lines("exception", map(reports.exception_as_json, page))


def _period(visit: Visit) -> tuple[dict[str, str], CountFilter]:
    """The form of the report, and its filter: days in UTC, by default the last thirty."""
    now = visit.state.clock().astimezone(UTC)
    asked = {name: visit.query.get(name, "").strip() for name in ("sender", "recipient")}
    begin = read_time(visit.query.get("since", ""))
    end = read_time(visit.query.get("until", ""), is_end=True)
    end = end or read_time(now.date().isoformat(), is_end=True) or now
    begin = begin or read_time((end - timedelta(days=29)).date().isoformat()) or end
    if begin >= end:
        raise PageRefused(400, "The period ends before it begins.")
    domains = {
        name: ("<>" if text == "<>" else read_domain(text.removeprefix("@"))) if text else ""
        for name, text in asked.items()
    }
    asked |= {"since": begin.date().isoformat(), "until": end.date().isoformat()}
    wanted = reports.period(
        begin, end, sender_domain=domains["sender"], recipient_domain=domains["recipient"]
    )
    return asked, wanted
