"""The page of a message: its events, its recipients and, on request, its content."""

from __future__ import annotations

from aiohttp import web

from relay.admin import operations
from relay.queue.store import SpoolError
from relay.web.guard import PageRefused
from relay.web.pages.visit import Visit
from relay.web.queries import events_of, reports_on
from relay.web.state import Web
from relay.web.story import story_of

_SHOWN_CONTENT_BYTES = 256 * 1024


async def show_message(visit: Visit) -> web.StreamResponse:
    """The page of a message."""
    queue_id = visit.request.match_info["id"]
    view = visit.state.view
    try:
        item = await operations.show_message(view, queue_id)
    except SpoolError:
        item = None  # the message left the queue meanwhile
    events = await events_of(view, queue_id)
    story = story_of(queue_id, events, item, await reports_on(view, events))
    if story is None:
        raise PageRefused(
            404, "No such message: it was never here, or its events are older than log.keep_events."
        )
    content = None
    if item is not None and visit.state.options().show_content:
        content = await _content(visit.state, queue_id)
    caught = visit.state.caught(queue_id) if visit.state.caught is not None else None
    received = _as_text(caught) if caught is not None else None
    silent = (await visit.state.facts()).silent if item is not None else {}
    return visit.show(
        "message.html", story=story, content=content, received=received, silent=silent
    )


async def _content(state: Web, queue_id: str) -> str:
    """The beginning of the content as text. The page shows HTML in it as text too."""
    found = b""
    try:
        async for piece in state.view.read_content(queue_id):
            found += piece
            if len(found) >= _SHOWN_CONTENT_BYTES:
                break
    except SpoolError:
        return ""
    return _as_text(found)


def _as_text(content: bytes) -> str:
    text = content[:_SHOWN_CONTENT_BYTES].decode("utf-8", "backslashreplace")
    return text.replace("\r\n", "\n")
