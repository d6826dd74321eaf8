"""A request's body as it arrives: how large it may be, how fast it has to be, what all hold
together.

    size      413 where the length that is told, or what has come, is over the endpoint's limit
    pace      408: a body has 20 seconds, and one more for each 4,096 octets that have come
    time      408: and never longer than the request may take altogether
    memory    the first 256 KiB of any body are free; a larger one takes room for all of it first.
              There is room for three of the largest, and for half of that from one client, whom
              both address and key name. Where there is none in time: 503

So a client that sends large bodies, or bodies that do not end, waits for its own; what is small
always gets through. Bodies come in pieces of 32 KiB at most, and other work has a turn after each.
A client that asks whether to go on (`Expect: 100-continue`) hears yes when the body is read, which
is after its key was judged.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from aiohttp import StreamReader, web

from relay.api.mailgun_form import ApiError

__all__ = ["BODY", "Body", "BodyMemory"]

_PIECE_OCTETS = 32 * 1024
_FREE_OCTETS = 256 * 1024
_WAIT_SECONDS = 10.0

_BEGIN_SECONDS = 20.0
_OCTETS_A_SECOND = 4096
"""Apache's mod_reqtimeout, and Postfix's smtpd_min_data_rate, have 500; servers send here."""


class BodyMemory:
    """Octets that large bodies may hold: `octets` in all, `share` of them for one client."""

    def __init__(self, octets: int, share: int) -> None:
        self._octets = octets
        self._share = share
        self._held = 0
        self._held_by: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], tuple[int, Sequence[str]]] = {}

    async def take(self, octets: int, client: Sequence[str]) -> None:
        """Room for a body; `TimeoutError` where there is none in time. `client`: its names."""
        if self._fits(octets, client):
            self._add(octets, client)
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[granted] = (octets, client)
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await granted
        except BaseException:
            if granted.done() and not granted.cancelled():  # in the very moment we gave up
                self.give_back(octets, client)
            raise
        finally:
            del self._waiting[granted]

    def give_back(self, octets: int, client: Sequence[str]) -> None:
        """The body is no longer held."""
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
    """The body of one request, read once, through `pieces`. `close` gives its room back."""

    def __init__(
        self,
        request: web.Request,
        room: BodyMemory,
        *,
        client: Sequence[str],
        limit: int,
        seconds: float,
    ) -> None:
        self._request = request
        self._room = room
        self._client = client
        self._limit = limit
        self._seconds = seconds
        self._taken = 0
        self._received = 0

    def at_most(self, octets: int) -> None:
        """A narrower limit: what this body is read into takes more memory than others."""
        self._limit = min(self._limit, octets)

    async def pieces(self) -> AsyncIterator[bytes]:
        """What arrives, in pieces. `ApiError` where it is too large, too slow or cannot be read."""
        length = self._request.content_length
        if length is not None and length > self._limit:
            raise _too_large()
        await self._take_room(length or 0)
        await self._let_it_come()
        content, began = self._request.content, _now()
        is_whole = False
        # What has come whole is taken, even if its client has gone before the next turn.
        while not is_whole and (piece := await self._next(content, began)):
            is_whole = content.at_eof()
            self._received += len(piece)
            if self._received > self._limit:
                raise _too_large()
            if not self._taken and self._received > _FREE_OCTETS:
                waits = _now()
                await self._take_room(self._limit)
                began += _now() - waits
            for start in range(0, len(piece), _PIECE_OCTETS):
                yield piece[start : start + _PIECE_OCTETS]
                await asyncio.sleep(0)

    async def read(self) -> bytes:
        """All of it at once."""
        return b"".join([piece async for piece in self.pieces()])

    def close(self) -> None:
        """Give back what is held."""
        if self._taken:
            self._room.give_back(self._taken, self._client)
        self._taken = 0

    async def _next(self, content: StreamReader, began: float) -> bytes:
        due = began + min(self._seconds, _BEGIN_SECONDS + self._received / _OCTETS_A_SECOND)
        try:
            async with asyncio.timeout_at(due):
                return await content.readany()
        except TimeoutError:
            raise ApiError(408, "The request took too long to come") from None
        except web.RequestPayloadError:
            raise ApiError(400, "the body is not what HTTP makes of one") from None

    async def _take_room(self, octets: int) -> None:
        if octets <= _FREE_OCTETS:
            return
        try:
            await self._room.take(octets, self._client)
        except TimeoutError:
            raise ApiError(503, "Too many large requests at a time, try again later") from None
        self._taken = octets

    async def _let_it_come(self) -> None:
        """Answer `Expect: 100-continue` (RFC 9110 §10.1.1), unless the body has come anyway."""
        request = self._request
        if "Expect" in request.headers and not request.content.is_eof():
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # aiohttp would take it for the beginning of the answer, which may still be any.
            request.writer.output_size = 0


BODY: web.RequestKey[Body] = web.RequestKey("body", Body)


def _too_large() -> ApiError:
    return ApiError(413, "Request entity too large")


def _now() -> float:
    return asyncio.get_running_loop().time()
