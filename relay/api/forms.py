"""Reads the body of a request as a form or as JSON, within the limits of `relay.api.bodies`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from aiohttp import web

from relay.api.bodies import BODY
from relay.api.formparser import FIELDS_OCTETS, parser_for
from relay.api.mailgun_form import ApiError, Form


async def read_form(request: web.Request) -> Form:
    """The form of a request; a body of another kind is an empty form."""
    parser = parser_for(request.headers.get("Content-Type", ""))
    if parser is None:
        return Form(())
    if request.content_type != "multipart/form-data":
        request[BODY].at_most(FIELDS_OCTETS)
    async for piece in request[BODY].pieces():
        parser.feed(piece)
    return parser.end()


async def read_json(request: web.Request) -> Mapping[str, object]:
    """The JSON object of a request. The Content-Type is required: a page of another site cannot
    send it.
    """
    if request.content_type != "application/json":
        raise ApiError(415, "the body has to be application/json")
    try:
        values = json.loads(await request[BODY].read())
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object")
    return values
