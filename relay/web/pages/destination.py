"""The page of a destination: the protection of mail to it, and the results."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from aiohttp import web

from relay.admin import report as reports
from relay.admin.mta_sts import policy_as_json
from relay.mail.jsontext import JsonFields
from relay.policy.rules import floor_rules, resolve
from relay.queue.statistics import ExceptionPage
from relay.queue.store import EventFilter
from relay.web.charts import chart_of
from relay.web.pages.visit import Visit, latest, read_domain
from relay.web.queries import log_page
from relay.web.rows import EventRow

_HOURS = 720
_LISTED_EXCEPTIONS = ExceptionPage(limit=20, newest=True)


async def destination(visit: Visit, probed: JsonFields | None = None) -> web.StreamResponse:
    """The page of a destination. `probed`: what its hosts have just shown."""
    domain = read_domain(visit.request.match_info["domain"], status=404)
    state, now = visit.state, visit.state.clock()
    month = latest(now, _HOURS, recipient_domain=domain)
    found = await reports.counts(state.view, month)
    exceptions = await state.view.find_exceptions(month, _LISTED_EXCEPTIONS)
    counted = await visit.site.counted.get()
    rules = state.rules()
    kept = await state.policies.kept(domain)
    published, trouble = await visit.site.forecasts.of(domain)
    newest = await log_page(state.view, EventFilter(recipient_domain=domain), limit=30)
    return visit.show(
        "destination.html",
        domain=domain,
        probed=probed,
        queue=counted.of(domain),
        silent=(await state.facts()).silent,
        settings=resolve(rules, reverse_path="", recipient_domain=domain),
        floors=floor_rules(rules, domain),
        policy=policy_as_json(kept) if kept is not None else None,
        published=published,
        trouble=trouble,
        hosts=_hosts_of(newest.rows),
        summary=reports.summary_of(found),
        chart=chart_of(await state.view.count_hours(month), begin=month.begin, hours=_HOURS),
        exceptions=exceptions,
        latest=newest,
    )


def _hosts_of(rows: Iterable[EventRow]) -> list[EventRow]:
    """The newest row about each host."""
    hosts: dict[str, EventRow] = {}
    for row in rows:
        host = row.event.get("delivery-status", {}).get("mx-host")
        if host:
            hosts.setdefault(host, row)
    return list(hosts.values())


async def probe(visit: Visit) -> web.StreamResponse:
    """Connect to the hosts of a domain, and show what they prove of themselves."""
    visit.site.guard.check_form(visit.visitor, await visit.site.form(visit.request))
    domain = read_domain(visit.request.match_info["domain"], status=404)
    async with asyncio.timeout(60):
        found = await visit.state.operator.running().probe(domain)
    await visit.site.jobs.note(visit.visitor.user.name, "probe", {"domain": domain}, 0)
    return await destination(visit, found)
