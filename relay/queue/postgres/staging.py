"""Content that comes before its message, in pieces: a short transaction each.

Nothing is promised about a piece, so its commit waits for no sync; the commit that accepts the
message comes behind it in the write-ahead log, and checks that all of it is there. What belongs to
no message in the end is removed: by `discard`, or when the lease of this node is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress

from relay.queue.postgres.connection import Db, Link
from relay.queue.postgres.lease import Lease
from relay.queue.store import CHUNK_BYTES, STAGE_BYTES, NewMessage, SpoolError

INLINE_BYTES = 64 * 1024
"""Content up to this size lies with its message."""


class Staging:
    """The pieces of messages that are on their way in."""

    def __init__(self, link: Link, lease: Lease) -> None:
        self._link = link
        self._lease = lease
        self._staged: dict[str, int] = {}
        self._under_way: set[asyncio.Future[None]] = set()

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write a piece of content ahead of its message."""
        if not offset and queue_id in self._staged:
            raise SpoolError(f"{queue_id}: another message has this queue id")
        self._require(queue_id, offset, self._staged.get(queue_id, 0))
        if len(piece) > STAGE_BYTES:
            raise SpoolError(f"a piece of {len(piece)} octets is too large")
        await self._put(queue_id, offset, piece)
        self._staged[queue_id] = offset + len(piece)

    def _require(self, queue_id: str, offset: int, staged: int) -> None:
        if offset != staged:
            raise SpoolError(f"{queue_id}: what is before octet {offset} is not there")

    async def _put(self, queue_id: str, offset: int, piece: bytes) -> None:
        """Write octets at `offset`, in the pieces in which they are read."""
        for start in range(0, len(piece), CHUNK_BYTES):
            part = piece[start : start + CHUNK_BYTES]
            await self._link.ask(_stage, self._lease.id, queue_id, offset + start, part)

    async def discard(self, queue_id: str) -> None:
        """Remove what was staged, unless its message was given to `accept`."""
        if self._staged.pop(queue_id, None) is not None:
            await self._remove(queue_id)

    async def accept(self, new: NewMessage, commit: Callable[[], Awaitable[object]]) -> None:
        """Complete the content, then have the commit made; both run to their end if the caller is
        cancelled.
        """
        staged = self._staged.pop(new.message.queue_id, None)
        await asyncio.shield(self._to_its_end(self._accept(new, staged, commit)))

    async def _accept(
        self, new: NewMessage, staged: int | None, commit: Callable[[], Awaitable[object]]
    ) -> None:
        queue_id = new.message.queue_id
        is_ours = staged is not None
        try:
            self._require(queue_id, new.staged_bytes, staged or 0)
            is_ours = is_ours or bool(new.content)
            await self._put(queue_id, new.staged_bytes, new.content)
            await commit()
        except BaseException:
            if is_ours:
                await self._remove(queue_id)
            raise

    def _to_its_end(self, work: Coroutine[object, object, None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return task

    async def _remove(self, queue_id: str) -> None:
        with suppress(SpoolError):  # what stays is removed when the lease has ended
            await self._link.ask(_remove, queue_id)


async def _stage(db: Db, lease: int, queue_id: str, offset: int, piece: bytes) -> None:
    async with db.transaction():
        await db.execute("SET LOCAL synchronous_commit = off")
        if not offset:
            await db.execute("INSERT INTO relay.staged VALUES ($1, $2)", queue_id, lease)
        await db.execute("INSERT INTO relay.content VALUES ($1, $2, $3)", queue_id, offset, piece)


async def _remove(db: Db, queue_id: str) -> None:
    """A message that has just been accepted after all keeps its content."""
    async with db.transaction():
        await db.execute("SET LOCAL synchronous_commit = off")
        gone = await db.fetchval(
            "DELETE FROM relay.staged WHERE queue_id = $1 RETURNING queue_id", queue_id
        )
        if gone is not None:
            await db.execute("DELETE FROM relay.content WHERE queue_id = $1", queue_id)
