"""The queue by destination and by message, and the verbs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from relay.admin import operations
from relay.queue.entry import State
from relay.queue.store import ListedMessage, QueueFilter, more_follows
from relay.queue.verbs import VERBS
from relay.web.guard import PageRefused
from relay.web.pages.visit import Visit, read_domain
from relay.web.queries import count_messages

_LISTED_DESTINATIONS = 200

_QUEUE_PAGE = 50

_SEARCH_SECONDS = 0.2
_LONG_SEARCH_SECONDS = 20.0
"""How long a page looks for messages, unless it is asked to look longer."""


async def queue(visit: Visit) -> web.StreamResponse:
    """The queue by destination; with a filter, the messages that match."""
    counted = await visit.site.counted.get()
    wanted, said = _queue_filter(visit.query)
    if not said and "all" not in visit.query:
        return visit.show(
            "queue.html",
            counted=counted,
            destinations=counted.destinations[:_LISTED_DESTINATIONS],
            silent=(await visit.state.facts()).silent,
        )
    now = visit.state.clock()
    page: list[ListedMessage] = []
    is_unfinished, is_long = False, "long" in visit.query
    try:
        async with asyncio.timeout(_LONG_SEARCH_SECONDS if is_long else _SEARCH_SECONDS):
            page = await visit.state.view.list_messages(
                wanted, now=now, after=visit.query.get("after", ""), limit=_QUEUE_PAGE
            )
    except TimeoutError:
        is_unfinished = True
    return visit.show(
        "messages.html",
        said=said,
        is_unfinished=is_unfinished,
        is_long=is_long,
        items=operations.page_as_json(page),
        following=page[-1].queue_id if more_follows(page, _QUEUE_PAGE) else "",
    )


def _queue_filter(form: Mapping[str, str]) -> tuple[QueueFilter, dict[str, str]]:
    """The filter of a query or a form, and its words. `PageRefused` where it is invalid."""
    said = {
        name: form[name].strip()
        for name in ("domain", "sender", "state")
        if form.get(name, "").strip()
    }
    if said.get("state", "queued") not in ("queued", "deferred", "held"):
        raise PageRefused(400, "No such state: queued, deferred and held are known.")
    domain = read_domain(said["domain"]) if "domain" in said else ""
    state = State(said["state"]) if "state" in said else None
    return QueueFilter(domain=domain, sender=said.get("sender", ""), state=state), said


def _meant(form: Mapping[str, str], ids: list[str]) -> tuple[QueueFilter, dict[str, str]]:
    """The messages of a verb: those that are marked, or a filter, or all if the form says so."""
    if ids:
        return QueueFilter(queue_ids=frozenset(ids)), {"marked": f"{len(ids)} messages"}
    wanted, said = _queue_filter(form)
    if not said and form.get("all") != "yes":
        raise PageRefused(400, "Nothing is marked: mark messages, or choose all that match.")
    return wanted, said or {"all": "the whole queue"}


async def confirm(visit: Visit) -> web.StreamResponse:
    """Ask for confirmation, and say how many messages a verb would change."""
    form, verb, ids = await _verb_form(visit)
    wanted, said = _meant(form, ids)
    if ids:
        count, is_whole = len(ids), True
    else:
        count, is_whole = await count_messages(visit.state.view, wanted, visit.state.clock())
        if not is_whole and set(said) == {"domain"}:
            counted = await visit.site.counted.get()
            count, is_whole = counted.of(wanted.domain).total, counted.is_whole
    fields = {name: form[name] for name in ("domain", "sender", "state", "all") if name in form}
    return visit.show(
        "confirm.html", verb=verb, said=said, count=count, is_whole=is_whole, ids=ids, fields=fields
    )


async def change(visit: Visit) -> web.StreamResponse:
    """Begin a change, and lead to the page of its progress."""
    form, verb, ids = await _verb_form(visit)
    wanted, said = _meant(form, ids)
    if ids and len(ids) <= 10:
        said = {"id": ", ".join(ids)}
    job = visit.site.jobs.start(visit.visitor.user.name, verb, wanted, said)
    await visit.site.jobs.settled(job, 0.3)
    visit.site.counted.forget()
    raise web.HTTPSeeOther(f"/job/{job.name}")


async def _verb_form(visit: Visit) -> tuple[Mapping[str, str], str, list[str]]:
    form = await visit.site.form(visit.request)
    visit.site.guard.check_form(visit.visitor, form)
    verb = form.get("verb", "")
    if verb not in VERBS:
        raise PageRefused(400, "No such verb.")
    return form, verb, [str(one) for one in form.getall("id", [])]


async def show_job(visit: Visit) -> web.StreamResponse:
    """The progress of a change."""
    job = visit.site.jobs.find(visit.request.match_info["name"])
    if job is None:
        raise PageRefused(404, "No such change: the newest fifty are kept, until a restart.")
    return visit.show("job.html", job=job)
