"""The store in memory, for tests of receiving: shows what it was given, and fails on demand."""

from __future__ import annotations

import asyncio

from relay.queue.store import NewMessage
from tests.fakes.memory_store import MemoryStore


class FakeStore(MemoryStore):
    """`fail_with` is raised by the next calls; `gate`, when set, holds `accept` back until it is
    opened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[NewMessage] = []
        self.largest_piece = 0
        self.fail_with: Exception | None = None
        self.fail_stage_with: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.accepting = asyncio.Event()

    @property
    def staged(self) -> list[str]:
        """Queue ids of content that no message has."""
        return list(self._staged)

    @property
    def contents(self) -> list[bytes]:
        """The content of each message that is still there: one in test mode is not."""
        kept = (self._kept.get(new.message.queue_id) for new in self.messages)
        return [one.content for one in kept if one is not None]

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        if self.fail_stage_with is not None:
            raise self.fail_stage_with
        await super().stage(queue_id, offset, piece)
        self.largest_piece = max(self.largest_piece, len(piece))

    async def accept(self, new: NewMessage) -> None:
        self.accepting.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fail_with is not None:
            raise self.fail_with
        assert new.message.size_bytes == new.staged_bytes + len(new.content)
        await super().accept(new)
        self.messages.append(new)
