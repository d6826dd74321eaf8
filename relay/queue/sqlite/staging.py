"""Content that is too large for the database: in its file before the commit that tells of it.

After a commit that failed nobody knows yet whether it tells of the file: that is asked when the
database works again, and the file of a message that was refused is removed then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress

from relay.queue.sqlite.contents import Contents
from relay.queue.store import STAGE_BYTES, NewMessage, SpoolError


class Staging:
    """`unknown` tells which of some messages are not in the queue, after a commit."""

    def __init__(
        self, contents: Contents, unknown: Callable[[Collection[str]], Awaitable[list[str]]]
    ) -> None:
        self._contents = contents
        self._unknown = unknown
        self._staged: set[str] = set()
        self._in_doubt: set[str] = set()
        self._under_way: set[asyncio.Future[None]] = set()

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write a piece of content ahead of its message."""
        if len(piece) > STAGE_BYTES:
            raise SpoolError(f"a piece of {len(piece)} octets is too large")
        self._staged.add(queue_id)
        await self._contents.append(queue_id, offset, piece)

    async def discard(self, queue_id: str) -> None:
        """Remove what was staged, unless its message was given to `accept`."""
        if queue_id in self._staged:
            self._staged.remove(queue_id)
            self._contents.remove([queue_id])

    async def accept(self, new: NewMessage, commit: Callable[[], Awaitable[object]]) -> None:
        """Complete the file, then have the commit made; both run to their end if the caller is
        cancelled.
        """
        self._staged.discard(new.message.queue_id)
        await asyncio.shield(self._to_its_end(self._accept(new, commit)))

    async def _accept(self, new: NewMessage, commit: Callable[[], Awaitable[object]]) -> None:
        queue_id = new.message.queue_id
        try:
            await self._contents.complete(queue_id, new.staged_bytes, new.content)
            await commit()
        except Exception:
            self._in_doubt.add(queue_id)
            await self._remove_refused()
            raise

    def _to_its_end(self, work: Coroutine[object, object, None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    def remove_refused(self) -> None:
        """The database works again: look which files belong to no message."""
        self._to_its_end(self._remove_refused())

    async def _remove_refused(self) -> None:
        asked = frozenset(self._in_doubt)
        with suppress(SpoolError):  # asked again later; what stays is removed at the next start
            refused = await self._unknown(asked)
            self._in_doubt -= asked
            self._contents.remove(refused)
