"""How much of the messages that are coming in is held in memory, all sessions of a node together.

A session holds a piece of its message until there is enough of it to go to the store, and its
header section until that is complete. For a thousand sessions at once that would be too much, so
what they hold is counted. From half of `total_bytes` on, pieces are smaller; from all of it on, a
header section that is long already is not waited for (452). Messages of less than
`SMALL_BYTES` are not counted: that many connections may be open.
"""

from __future__ import annotations

from relay.queue.store import CHUNK_BYTES

__all__ = ["SMALL_BYTES", "Memory"]

SMALL_BYTES = 32 * 1024
_TOTAL_BYTES = 64 * 1024 * 1024


class Memory:
    """What is held in all."""

    def __init__(self, total_bytes: int = _TOTAL_BYTES) -> None:
        self.held_bytes = 0
        self._total_bytes = total_bytes

    @property
    def piece_bytes(self) -> int:
        """How much of a message may be held before it goes to the store."""
        return CHUNK_BYTES if self.held_bytes < self._total_bytes // 2 else SMALL_BYTES

    @property
    def is_full(self) -> bool:
        """Whether nothing large should be waited for."""
        return self.held_bytes >= self._total_bytes
