"""The overview: numbers, charts, the queue, and what an operator should look at."""

from __future__ import annotations

from datetime import datetime, timedelta

from aiohttp import web

from relay.admin import report as reports
from relay.mail.event import Protection
from relay.policy.settings import FloorUse
from relay.queue.statistics import ExceptionPage
from relay.queue.store import EventFilter, QueueFilter
from relay.web.charts import chart_of
from relay.web.pages.visit import Visit, latest
from relay.web.queries import log_page
from relay.web.state import Facts, Web

_PERIODS = {1: "1 hour", 24: "24 hours", 168: "7 days", 720: "30 days"}

_SOON = timedelta(days=14)

_LITTLE_ROOM_BYTES = 1024 * 1024 * 1024

_NO_DANE = (
    "The name servers do not validate DNSSEC, so DANE protects no mail:"
    " run a validating resolver on this machine (resolver.trust_ad), or set policy.dane: ignore."
)
_LAG_EVENTS = 10_000

_LOOKED_AT_DOMAINS = 10
_LOOKED_AT_EXCEPTIONS = ExceptionPage(limit=500, newest=True)


async def overview(visit: Visit) -> web.StreamResponse:
    """The overview."""
    asked = visit.query.get("hours", "24")
    hours = int(asked) if asked.isdigit() and int(asked) in _PERIODS else 24
    now = visit.state.clock()
    wanted = latest(now, hours)
    view = visit.state.view
    found = await view.count_hours(wanted)
    summary = reports.summary_of(await reports.counts(view, wanted))
    counted = await visit.site.counted.get()
    facts = await visit.state.facts()
    oldest = await view.list_messages(QueueFilter(), now=now, limit=1)
    return visit.show(
        "overview.html",
        hours=hours,
        periods=_PERIODS,
        summary=summary,
        chart=chart_of(found, begin=wanted.begin, hours=max(hours, 2)),
        since=wanted.begin.strftime("%Y-%m-%dT%H:%M"),
        queue=await view.counts(),
        oldest=oldest[0] if oldest else None,
        troubled=[one for one in counted.destinations if one.deferred or one.held][:8],
        counted=counted,
        alarms=await _alarms(visit.state, facts, now),
        facts=facts,
        latest=await log_page(view, EventFilter(), limit=8),
    )


async def _alarms(state: Web, facts: Facts, now: datetime) -> list[tuple[str, str]]:
    """What an operator should look at: sentences, each with the page it leads to."""
    found = [(sentence, "/health") for sentence in facts.trouble]
    for path, at in facts.certificates.items():
        if at - now < _SOON:
            days = (at - now).days
            left = f"expires in {days} days" if days >= 0 else "has expired"
            found.append((f"The certificate {path} {left}.", "/health"))
    if facts.free_bytes and facts.free_bytes < _LITTLE_ROOM_BYTES:
        found.append(("Less than 1 GiB is free on the disk of the queue.", "/health"))
    if facts.log_lag_events > _LAG_EVENTS:
        found.append((f"The log file lacks {facts.log_lag_events:,} events.", "/health"))
    if facts.validates is False and state.rules().dane is not FloorUse.IGNORE:
        found.append((_NO_DANE, "/health"))
    for domain in await _downgraded(state, now):
        sentence = f"Mail to {domain} went out in clear today, and over verified TLS before."
        found.append((sentence, f"/destination/{domain}"))
    return found


async def _downgraded(state: Web, now: datetime) -> list[str]:
    """Destinations that got mail in clear in the last day, and over verified TLS in a month."""
    day = reports.period(now - timedelta(hours=24), now + timedelta(microseconds=1))
    exceptions = await state.view.find_exceptions(day, _LOOKED_AT_EXCEPTIONS)
    clear = {one.recipient_domain for one in exceptions if one.protection == Protection.CLEAR}
    found = []
    for domain in sorted(clear)[:_LOOKED_AT_DOMAINS]:
        month = reports.period(now - timedelta(days=30), now, recipient_domain=domain)
        if reports.summary_of(await reports.counts(state.view, month)).verified:
            found.append(domain)
    return found
