"""Sends files of any length."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from relay.web.pages.visit import Visit

_WRITE_SECONDS = 30.0


async def stream(
    visit: Visit, name: str, kind: str, parts: AsyncIterator[str]
) -> web.StreamResponse:
    """Send a file of any length, as fast as the browser reads it."""
    response = visit.site.secured(web.StreamResponse())
    response.headers["Content-Type"] = f"{kind}; charset=utf-8"
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    await response.prepare(visit.request)
    try:
        async for part in parts:
            await write(response, part.encode())
    except TimeoutError:
        if visit.request.transport is not None:
            visit.request.transport.abort()  # so that the browser knows that the file is cut off
    return response


async def write(response: web.StreamResponse, octets: bytes) -> None:
    async with asyncio.timeout(_WRITE_SECONDS):
        await response.write(octets)
