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
        self.staged: dict[str, list[bytes]] = {}
        self.largest_chunk = 0
        self.fail_with: Exception | None = None
        self.fail_stage_with: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.accepting = asyncio.Event()

    async def stage(self, queue_id: str, seq: int, chunk: bytes) -> None:
        if self.fail_stage_with is not None:
            raise self.fail_stage_with
        chunks = self.staged.setdefault(queue_id, [])
        assert len(chunks) == seq
        self.largest_chunk = max(self.largest_chunk, len(chunk))
        chunks.append(chunk)

    async def discard(self, queue_id: str) -> None:
        self.staged.pop(queue_id, None)

    async def accept(self, new: NewMessage) -> None:
        self.accepting.set()
        if self.gate is not None:
            await self.gate.wait()
        if self.fail_with is not None:
            raise self.fail_with
        chunks = self.staged.pop(new.message.queue_id, [])
        assert len(chunks) == new.staged_chunks
        content = b"".join(chunks) + new.content
        assert len(content) == new.message.size_bytes
        self.messages.append(new)
        self.contents.append(content)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"receiving mail has no use for Store.{name}")
