"""The search, which leads to the right page, and the help."""

from __future__ import annotations

import re

from aiohttp import web

from relay.mail.address import AddressError, normalise_domain
from relay.web.filters import read_filter
from relay.web.pages.visit import Visit

_QUEUE_ID = re.compile(r"[0-9A-HJKMNP-TV-Z]{17}")


async def search(visit: Visit) -> web.StreamResponse:
    """Lead to the page of an address, a domain, a queue id or a message-id."""
    text = visit.query.get("q", "").strip()[:300]
    raise web.HTTPSeeOther(_page_for(text))


def _page_for(text: str) -> str:
    if not text:
        return "/log"
    if _QUEUE_ID.fullmatch(text.upper()):
        return f"/message/{text.upper()}"
    if "@" not in text and "." in text and " " not in text:
        try:
            return f"/destination/{normalise_domain(text)}"
        except AddressError:
            pass
    return f"/log?{read_filter({'q': text.removeprefix('<').removesuffix('>')}).query()}"


async def show_help(visit: Visit) -> web.StreamResponse:
    """The keys of the page, and its words."""
    return visit.show("help.html")
