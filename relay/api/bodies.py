"""Reads the body of a request, within limits of size, pace and memory.

    size      413: the Content-Length, or what has come, is over the endpoint's limit
    pace      408: a body has 20 seconds, and one more for each 4,096 octets that have come
    time      408: it never has more than the time of the whole request
    memory    503: a body of up to 256 KiB needs no reservation; a larger one reserves its full
              size first, and waits for that. There is memory for three of the largest bodies, and
              half of that for one client (by its address and by its key)

So a client that sends large bodies, or bodies that do not end, waits for its own, and small bodies
are never held up. A body comes in pieces of at most 32 KiB, and other tasks run after each. A
client that sends `Expect: 100-continue` gets the answer when the body is read, which is after the
check of its key.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from aiohttp import StreamReader, web

from relay.api.mailgun_form import ApiError

_PIECE_OCTETS = 32 * 1024
_FREE_OCTETS = 256 * 1024
_WAIT_SECONDS = 10.0

_BEGIN_SECONDS = 20.0
_OCTETS_A_SECOND = 4096
"""Apache's mod_reqtimeout and Postfix's smtpd_min_data_rate have 500, for slower clients."""


class BodyBuffers:
    """The memory for large bodies: `octets` in all, `share` of them for one client."""

    def __init__(self, octets: int, share: int) -> None:
        self._octets = octets
        self._share = share
        self._held = 0
        self._held_by: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], tuple[int, Sequence[str]]] = {}

    async def reserve(self, octets: int, client: Sequence[str]) -> None:
        """Reserve memory for a body, or `TimeoutError`. `client`: its names (address, key)."""
        if self._fits(octets, client):
            self._add(octets, client)
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[granted] = (octets, client)
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await granted
        except BaseException:
            if granted.done() and not granted.cancelled():  # granted in the moment of the timeout
                self.give_back(octets, client)
            raise
        finally:
            del self._waiting[granted]

    def give_back(self, octets: int, client: Sequence[str]) -> None:
        """Give the memory of a body back."""
        self._add(-octets, client)
        for granted, wanted in self._waiting.items():
            if not granted.done() and self._fits(*wanted):
                self._add(*wanted)
                granted.set_result(None)

    def _fits(self, octets: int, client: Sequence[str]) -> bool:
        return self._held + octets <= self._octets and all(
            self._held_by[name] + octets <= self._share for name in client
        )

    def _add(self, octets: int, client: Sequence[str]) -> None:
        self._held += octets
        for name in client:
            self._held_by[name] += octets
            if not self._held_by[name]:
                del self._held_by[name]


class Body:
    """The body of one request, which is read once. `close` gives its memory back."""

    def __init__(
        self,
        request: web.Request,
        buffers: BodyBuffers,
        *,
        client: Sequence[str],
        limit: int,
        seconds: float,
    ) -> None:
        self._request = request
        self._buffers = buffers
        self._client = client
        self._limit = limit
        self._seconds = seconds
        self._reserved = 0
        self._received = 0

    def at_most(self, octets: int) -> None:
        """Set a lower limit of the size."""
        self._limit = min(self._limit, octets)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in pieces. `ApiError` where it is too large, too slow or cannot be read."""
        length = self._request.content_length
        if length is not None and length > self._limit:
            raise _too_large()
        await self._reserve(length or 0)
        await self._let_it_come()
        content, began = self._request.content, _now()
        is_whole = False
        # A body that has come completely is accepted, even if its client is gone by now.
        while not is_whole and (piece := await self._next(content, began)):
            is_whole = content.at_eof()
            self._received += len(piece)
            if self._received > self._limit:
                raise _too_large()
            if not self._reserved and self._received > _FREE_OCTETS:
                waits = _now()
                await self._reserve(self._limit)
                began += _now() - waits
            for start in range(0, len(piece), _PIECE_OCTETS):
                yield piece[start : start + _PIECE_OCTETS]
                await asyncio.sleep(0)

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """Give the memory back."""
        if self._reserved:
            self._buffers.give_back(self._reserved, self._client)
        self._reserved = 0

    async def _next(self, content: StreamReader, began: float) -> bytes:
        due = began + min(self._seconds, _BEGIN_SECONDS + self._received / _OCTETS_A_SECOND)
        try:
            async with asyncio.timeout_at(due):
                return await content.readany()
        except TimeoutError:
            raise ApiError(408, "The request took too long to come") from None
        except web.RequestPayloadError:
            raise ApiError(400, "the body is not valid HTTP") from None

    async def _reserve(self, octets: int) -> None:
        if octets <= _FREE_OCTETS:
            return
        try:
            await self._buffers.reserve(octets, self._client)
        except TimeoutError:
            raise ApiError(503, "Too many large requests at a time, try again later") from None
        self._reserved = octets

    async def _let_it_come(self) -> None:
        """Answer `Expect: 100-continue` (RFC 9110 §10.1.1), unless the body has come anyway."""
        request = self._request
        if "Expect" in request.headers and not request.content.is_eof():
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # Without this aiohttp counts these octets as the beginning of the answer.
            request.writer.output_size = 0


BODY: web.RequestKey[Body] = web.RequestKey("body", Body)


def _too_large() -> ApiError:
    return ApiError(413, "Request entity too large")


def _now() -> float:
    return asyncio.get_running_loop().time()
