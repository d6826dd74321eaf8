"""Limits how fast clients without a right key get answers, and asks a question once for many.

A flood of refused requests would cost much time. After so many answers a second for one address (of
IPv6 a /64), each further answer waits a second. It waits on a connection of that client, whose
number is limited (`relay.api.entrance`), so other clients are not affected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from relay.mail.newest import keep_newest
from relay.submit.failures import client_key

T = TypeVar("T")

_WAIT_SECONDS = 1.0
_REMEMBERED = 10_000


class AnswerRate:
    """Limits answers. `a_second`: how many a client gets at once in each second."""

    def __init__(self, a_second: int) -> None:
        self._a_second = a_second
        self._counts: dict[str, tuple[int, int]] = {}

    async def wait(self, client: str) -> None:
        """Return when this client may get an answer."""
        if self._count(client_key(client)) > self._a_second:
            await asyncio.sleep(_WAIT_SECONDS)

    def _count(self, source: str) -> int:
        """How many answers a client has had in this second, with this one."""
        now = int(asyncio.get_running_loop().time())
        second, count = self._counts.get(source, (now, 0))
        count = count + 1 if second == now else 1
        keep_newest(self._counts, source, (now, count), most=_REMEMBERED)
        return count


class Shared(Generic[T]):
    """A question that is asked once at a time: callers who come meanwhile get the same answer."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._asking: asyncio.Future[T] | None = None

    async def __call__(self) -> T:
        """The answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)
