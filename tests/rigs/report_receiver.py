"""A web server that takes reports on TLS (RFC 8460 §5.4)."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from relay.sandbox.certificates import Authority, Kind, server_context
from tests.rigs.tlsrpt import read_document


class ReportReceiver:
    """One server. `statuses`: what it answers, the last again and again. `seconds`: how long it
    takes for that. `documents`: what it was sent, also where it answered something else than 2xx.
    """

    def __init__(
        self,
        name: str,
        *statuses: int,
        authority: Authority,
        address: str,
        port: int,
        seconds: float = 0.0,
        kind: Kind = Kind.GOOD,
    ) -> None:
        self.name = name
        self.address = address
        self.documents: list[dict[str, Any]] = []
        self.octets: list[bytes] = []
        self._statuses = list(statuses or (201,))
        self._seconds = seconds
        self._port = port
        self._context = server_context(authority.leaf(name, kind))
        application = web.Application()
        application.router.add_post("/{path:.*}", self._take)
        self._runner = web.AppRunner(application)

    async def __aenter__(self) -> ReportReceiver:
        await self._runner.setup()
        await web.TCPSite(self._runner, self.address, self._port, ssl_context=self._context).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/tlsrpt+gzip"
        octets = await request.read()
        self.octets.append(octets)
        self.documents.append(read_document(octets))
        await asyncio.sleep(self._seconds)
        status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        headers = {"Location": "https://elsewhere.test/"} if 300 <= status < 400 else {}
        return web.Response(status=status, headers=headers)
