"""The log: its rows, new rows as they come, and the export of rows that match."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator, Iterable

from aiohttp import web

from relay.admin import report as reports
from relay.mail.event import Event
from relay.queue.store import EventFilter, EventPage
from relay.web.facts import setting_text
from relay.web.filters import EVENTS, PROTECTIONS, SOURCES, read_filter
from relay.web.guard import PageRefused
from relay.web.live import TooManyViewers, message
from relay.web.pages.stream import stream, write
from relay.web.pages.visit import Visit
from relay.web.queries import log_page
from relay.web.rows import row_of
from relay.web.state import Web


async def log(visit: Visit) -> web.StreamResponse:
    """Events, newest first."""
    wanted = read_filter(visit.query)
    before = _number(visit.query.get("before", ""))
    page = await log_page(visit.state.view, wanted.wanted, before=before)
    return visit.show(
        "log.html",
        filter=wanted,
        page=page,
        before=before,
        events=EVENTS,
        protections=PROTECTIONS,
        sources=SOURCES,
    )


def _number(text: str) -> int:
    """A sequence number, which is long where there are several queues; 0 for none."""
    is_number = text.isascii() and text.removeprefix("-").isdigit() and len(text) < 1000
    return int(text) if is_number else 0


async def live(visit: Visit) -> web.StreamResponse:
    """New rows as server-sent events, until the browser or its session ends."""
    response = visit.site.secured(web.StreamResponse())
    response.content_type = "text/event-stream"
    rows = visit.site.live.follow(read_filter(visit.query).wanted)
    try:
        first = asyncio.ensure_future(anext(rows))
        await response.prepare(visit.request)
        await write(response, b": following\n\n")
        html, left_out = await first
        while not _is_over(visit):
            await write(response, message(html, left_out))
            html, left_out = await anext(rows)
    except TooManyViewers:
        raise PageRefused(503, "Too many pages follow the log; close some.") from None
    except (ConnectionError, TimeoutError):
        pass
    finally:
        await rows.aclose()
    return response


def _is_over(visit: Visit) -> bool:
    """Whether the session has ended: to follow the log does not extend it."""
    session = visit.visitor.session
    return session is not None and session.is_over(visit.state.clock())


_EXPORT_PAGE = 500


async def export(visit: Visit) -> web.StreamResponse:
    """All events that match, oldest first."""
    as_csv = visit.query.get("format") == "csv"
    wanted = read_filter(visit.query).wanted
    name = "events.csv" if as_csv else "events.jsonl"
    kind = "text/csv" if as_csv else "application/x-ndjson"
    return await stream(visit, name, kind, _exported(visit.state, wanted, as_csv=as_csv))


async def _exported(state: Web, wanted: EventFilter, *, as_csv: bool) -> AsyncIterator[str]:
    if as_csv:
        yield _csv([_EXPORT_COLUMNS])
    after = 0
    while page := await state.view.find_events(wanted, EventPage(after, _EXPORT_PAGE)):
        after = page[-1].seq
        if as_csv:
            yield _csv([_export_row(one.seq, one.event) for one in page])
        else:
            yield "".join(f"{one.event.line}\n" for one in page)


_EXPORT_COLUMNS = (
    "time",
    "event",
    "protection",
    "queue-id",
    "sender",
    "recipients",
    "subject",
    "description",
    "rule",
    "id",
)


def _export_row(seq: int, event: Event) -> tuple[str, ...]:
    row = row_of(seq, event)
    rule = setting_text(row.event["policy"]) if "policy" in row.event else ""
    cells = (row.kind, row.protection, row.queue_id, row.sender, row.targets)
    return (row.at.isoformat(), *cells, row.subject, row.sentence, rule, event.id)


def _csv(rows: Iterable[Iterable[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([map(reports.csv_cell, row) for row in rows])
    return text.getvalue()
