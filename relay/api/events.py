"""Lists events of the delivery log: `GET /v3/{domain}/events` and its pages."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from aiohttp import web

from relay.api.mailgun_events import EventQuery, item_of, links, read_query
from relay.api.mailgun_form import ApiError, shown
from relay.api.state import Api, answer, sender_domain
from relay.queue.store import EventPage, SearchTooLong, StoredEvent

_PATIENCE = timedelta(seconds=1)
"""The time for a page: a search for rare events would go through the whole log."""


async def list_events(api: Api, request: web.Request) -> web.Response:
    """A page of the events of mail from a domain."""
    domain = sender_domain(api, request)
    token = request.match_info.get("page", "")
    query = read_query(_parameters(request), domain=domain, token=token)
    found = await _look(api, query)
    following, preceding = links(query, found)
    base = f"{request.scheme}://{request.host}/v3/{domain}/events"
    first = read_query(dict(query.parameters), domain=domain)
    return answer(
        {
            "items": [item_of(stored.event.line) for stored in found],
            "paging": {
                "next": _page(base, following),
                "previous": _page(base, preceding),
                "first": _page(base, links(replace(first, after=0), ())[0]),
                "last": _page(base, links(replace(first, after=0), ())[1]),
            },
        }
    )


def _parameters(request: web.Request) -> dict[str, str]:
    """The parameters of the query. One with two different values is refused."""
    for name in request.query:
        if len(set(request.query.getall(name))) > 1:
            raise ApiError(400, f"{shown(name)} is there more than once")
    return dict(request.query)


async def _look(api: Api, query: EventQuery) -> list[StoredEvent]:
    try:
        page = EventPage(query.after, query.limit, query.looks_ascending, _PATIENCE)
        found = await api.operator.view.find_events(query.wanted, page)
    except SearchTooLong as error:
        raise ApiError(400, f"{error}: ask for a shorter time, with begin and end") from None
    return found[::-1] if query.backward else found


def _page(base: str, token: str) -> str:
    """The URL of a page. Some clients read the token from the path, others from the query."""
    return f"{base}/{token}?page={token}"
