"""Counts the memory that messages use while they come in, for all sessions of a node together.

A session holds a piece of its message until the piece is large enough for the store, and its
header section until that is complete. For a thousand sessions at once that would be too much, so
the held octets are counted. From a quarter of `total_bytes` on, pieces are smaller, and from half
of it on, smaller still. From all of it on, a message whose long header section is not complete is
refused (452). Messages of less than `SMALL_BYTES` are not counted: the limit of connections bounds
their memory.
"""

from __future__ import annotations

from relay.queue.store import CHUNK_BYTES, STAGE_BYTES

SMALL_BYTES = 32 * 1024
_TOTAL_BYTES = 64 * 1024 * 1024


class Buffered:
    """The octets that all sessions hold."""

    def __init__(self, total_bytes: int = _TOTAL_BYTES) -> None:
        self.held_bytes = 0
        self._total_bytes = total_bytes

    @property
    def piece_bytes(self) -> int:
        """How much of a message may be held before it goes to the store."""
        if self.held_bytes < self._total_bytes // 4:
            return STAGE_BYTES
        return CHUNK_BYTES if self.held_bytes < self._total_bytes // 2 else SMALL_BYTES

    @property
    def is_full(self) -> bool:
        """Whether a long header section that is not complete has to be refused."""
        return self.held_bytes >= self._total_bytes
