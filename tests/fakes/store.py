"""A store in memory, to see exactly what was handed to it, and to fail on demand.

Only the receiving half: `stage`, `discard`, `accept`. Where a test is about what survives,
it uses the real store.
"""

from __future__ import annotations

import asyncio
from typing import Any

from relay.queue.store import NewMessage


class FakeStore:
    """`fail_with` is raised by the next calls; `gate`, when set, holds `accept` back until it is opened."""

    def __init__(self) -> None:
        self.messages: list[NewMessage] = []
        self.contents: list[bytes] = []
        self.staged: dict[str, bytearray] = {}
        self.largest_piece = 0
        self.fail_with: Exception | None = None
        self.fail_stage_with: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.accepting = asyncio.Event()

    async def stage(self, queue_id: str, offset: int, piece: bytes) -> None:
        if self.fail_stage_with is not None:
            raise self.fail_stage_with
        staged = self.staged.setdefault(queue_id, bytearray())
        assert len(staged) == offset
        self.largest_piece = max(self.largest_piece, len(piece))
        staged += piece

    async def discard(self, queue_id: str) -> None:
        self.staged.pop(queue_id, None)

    async def accept(self, new: NewMessage) -> None:
        self.accepting.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fail_with is not None:
            raise self.fail_with
        staged = self.staged.pop(new.message.queue_id, b"")
        assert len(staged) == new.staged_bytes
        content = bytes(staged) + new.content
        assert len(content) == new.message.size_bytes
        self.messages.append(new)
        self.contents.append(content)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"receiving mail has no use for Store.{name}")
