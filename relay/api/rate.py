"""How fast a client is answered that has shown no right key, and questions asked once for many.

A flood of requests that are refused costs little each and much together. Beyond so many a second
from one address (of IPv6 a /64) every answer waits a second, on the client's own connection, of
which it has so many and no more (`relay.api.entrance`). So the rest of the relay goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from relay.mail.newest import keep_newest
from relay.submit.failures import client_key

__all__ = ["AnswerRate", "Shared"]

T = TypeVar("T")

_WAIT_SECONDS = 1.0
_REMEMBERED = 10_000


class AnswerRate:
    """`a_second`: answers that a client gets at once."""

    def __init__(self, a_second: int) -> None:
        self._a_second = a_second
        self._counts: dict[str, tuple[int, int]] = {}

    async def wait(self, client: str) -> None:
        """Return when this client may be answered."""
        if self._count(client_key(client)) > self._a_second:
            await asyncio.sleep(_WAIT_SECONDS)

    def _count(self, source: str) -> int:
        """How many answers this one has had in this second, this one included."""
        now = int(asyncio.get_running_loop().time())
        second, count = self._counts.get(source, (now, 0))
        count = count + 1 if second == now else 1
        keep_newest(self._counts, source, (now, count), most=_REMEMBERED)
        return count


class Shared(Generic[T]):
    """A question that is asked once at a time: whoever comes meanwhile gets the same answer."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._asking: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        """The answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)
