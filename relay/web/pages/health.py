"""The state of the relay."""

from __future__ import annotations

from aiohttp import web

from relay.web.pages.visit import Visit


async def health(visit: Visit) -> web.StreamResponse:
    """The state of the relay."""
    facts = await visit.state.facts()
    return visit.show(
        "health.html",
        facts=facts,
        now=visit.state.clock(),
        queue=await visit.state.view.counts(),
        configuration=visit.state.configuration(),
        viewers=visit.site.live.viewers,
    )
