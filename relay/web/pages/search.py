"""Where a text that is searched for belongs, and the help."""

from __future__ import annotations

import re

from aiohttp import web

from relay.mail.address import AddressError, normalise_domain
from relay.web.filters import read_filter
from relay.web.pages.visit import Visit

__all__ = ["search", "show_help"]

_QUEUE_ID = re.compile(r"[0-9A-HJKMNP-TV-Z]{17}")


async def search(visit: Visit) -> web.StreamResponse:
    """Leads where an address, a domain, a queue id or a message-id belongs."""
    text = visit.query.get("q", "").strip()[:300]
    raise web.HTTPSeeOther(_place_of(text))


def _place_of(text: str) -> str:
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
    """The keys and the words."""
    return visit.show("help.html")
