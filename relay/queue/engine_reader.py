"""What is read from a queue in the same way whichever engine keeps it.

A search goes through the queue in steps, each of which is one short question to the engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from datetime import datetime

from relay.queue.change_steps import FoundStep, WantedStep
from relay.queue.header import header_section
from relay.queue.store import CHUNK_BYTES, ContentFile, ListedMessage, QueueFilter, more_follows

_ITEMS_AT_ONCE = 200


class EngineReader(ABC):
    """An engine's reader adds what it asks its database; see `relay.queue.store` for what each
    method promises.
    """

    @abstractmethod
    def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content in pieces, in order. `SpoolError` where it is not whole."""

    async def open_content(self, queue_id: str) -> ContentFile | None:
        """None, where content does not lie in files."""
        return None

    @abstractmethod
    async def _find_ids(
        self, wanted: QueueFilter, now: datetime, after: str, limit: int, /
    ) -> tuple[list[str], str | None]:
        """The ids of the next messages that match, and up to where that looked; None: to the end.

        Not more of them than have `PAGE_RECIPIENTS` together.
        """

    @abstractmethod
    async def _list(self, ids: Sequence[str], /) -> list[ListedMessage]:
        """Messages as a listing shows them."""

    @abstractmethod
    async def _find_change(self, step: WantedStep, limit: int, /) -> FoundStep:
        """The same, with the event of each of their recipients that is not final."""

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section."""
        return await header_section(self.read_content(queue_id), limit_bytes=limit_bytes)

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[ListedMessage]:
        """A page of what matches, by queue id."""
        found: list[ListedMessage] = []
        reached: str | None = after
        while reached is not None and not more_follows(found, limit):
            few = min(limit - len(found), _ITEMS_AT_ONCE)
            ids, reached = await self._find_ids(wanted, now, reached, few)
            found += await self._list(ids)
        return found

    async def find_change(self, step: WantedStep, limit: int) -> FoundStep:
        """At most `limit` messages that match, with the event of each of their recipients that is
        not final; none only at the end of the queue.
        """
        found = await self._find_change(step, limit)
        while found.until is not None and not found.ids:
            found = await self._find_change(step._replace(after=found.until), limit)
        return found
