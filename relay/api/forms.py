"""A request's body: a form, or JSON, and never more of it than was agreed.

A form comes as multipart/form-data (RFC 7578) or urlencoded. All bodies that are being read share
one budget, so that a few large messages at a time are the most that is held.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from relay.api.mailgun import ApiError, File, Form

__all__ = ["Budget", "read_form", "read_json"]

_MOST_FIELDS = 10_000
_AT_ONCE_OCTETS = 64 * 1024
_JSON_OCTETS = 1024 * 1024
_PIECE_OCTETS = 64 * 1024


class Budget:
    """How many octets of bodies may be under way at a time."""

    def __init__(self, octets: int) -> None:
        self._left = octets

    def reserve(self, octets: int) -> bool:
        """Room for a body, or not."""
        if octets > self._left:
            return False
        self._left -= octets
        return True

    def give_back(self, octets: int) -> None:
        """The body is no longer held."""
        self._left += octets


async def read_form(request: web.Request) -> Form:
    """The form of a request; a body of another kind is an empty form."""
    try:
        if request.content_type == "multipart/form-data":
            return await _multipart(request)
        if request.content_type in ("application/x-www-form-urlencoded", ""):
            return await _urlencoded(request)
    except (
        ValueError,
        LookupError,
        AssertionError,
        RuntimeError,
        EOFError,
        HttpProcessingError,
    ) as error:
        if isinstance(error, web.HTTPException):
            raise
        raise ApiError(
            400, "the form cannot be read as multipart/form-data or urlencoded UTF-8"
        ) from error
    return Form(())


async def read_json(request: web.Request) -> Mapping[str, Any]:
    """The JSON object of a request. Its type has to be said, which a page of another site cannot do."""
    if request.content_type != "application/json":
        raise ApiError(415, "the body has to be application/json")
    body = await request.content.read(_JSON_OCTETS + 1)
    while len(body) <= _JSON_OCTETS and (more := await request.content.read(_JSON_OCTETS + 1)):
        body += more
    if len(body) > _JSON_OCTETS:
        raise ApiError(413, "the body is too large")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is no JSON") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object")
    return values


async def _urlencoded(request: web.Request) -> Form:
    body = await request.read()
    if len(body) <= _AT_ONCE_OCTETS:
        return Form(_pairs(body))
    return Form(await asyncio.to_thread(_pairs, body))


def _pairs(body: bytes) -> tuple[tuple[str, str], ...]:
    text = body.decode("utf-8")
    return tuple(
        parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
    )


async def _multipart(request: web.Request) -> Form:
    fields: list[tuple[str, str]] = []
    files: list[File] = []
    reader, left = await request.multipart(), request.client_max_size
    while (part := await reader.next()) is not None:
        if not isinstance(part, BodyPartReader) or part.name is None:
            raise ApiError(400, "the form has a part without a name")
        content = await _contents(part, left)
        left -= len(content)
        if part.filename:
            kind = part.headers.get("Content-Type", "")
            files.append(File(part.name, part.filename, kind, content))
        else:
            fields.append((part.name, content.decode(part.get_charset("utf-8"))))
        if len(fields) + len(files) > _MOST_FIELDS:
            raise ApiError(400, f"the form has too many fields, max is {_MOST_FIELDS}")
    return Form(tuple(fields), tuple(files))


async def _contents(part: BodyPartReader, most: int) -> bytes:
    """What a part holds, as it was before its transfer encoding."""
    content = bytearray()
    while piece := await part.read_chunk(_PIECE_OCTETS):
        content += piece
        if len(content) > most:
            raise ApiError(413, "Request entity too large")
    if "Content-Transfer-Encoding" in part.headers:
        return bytes(part.decode(bytes(content)))
    return bytes(content)
