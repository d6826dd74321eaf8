"""The content of a message that is held in memory until it goes to the store. Pure.

Octets are kept in the blocks in which they came. So a large block is not copied when it is added,
and not when it is taken alone. Small blocks are put together: a client that sends octet by octet
takes no more memory than others.
"""

from __future__ import annotations

_SMALL_BYTES = 16 * 1024


class Held:
    """Octets in order: added at the end, taken from the beginning."""

    def __init__(self) -> None:
        self._blocks: list[bytes | bytearray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, block: bytes) -> None:
        """Add octets at the end."""
        if not block:
            return
        self._count += len(block)
        if len(block) >= _SMALL_BYTES or not self._blocks:
            self._blocks.append(block)
            return
        last = self._blocks[-1]
        if isinstance(last, bytearray):
            last += block
        elif len(last) < _SMALL_BYTES:
            self._blocks[-1] = bytearray(last) + block
        else:
            self._blocks.append(bytearray(block))

    def find(self, octets: bytes, start: int = 0, end: int | None = None) -> int:
        """Where these octets are; -1: nowhere. It puts all blocks together."""
        if len(self._blocks) > 1:
            self._blocks = [bytearray().join(self._blocks)]
        return self._blocks[0].find(octets, start, end) if self._blocks else -1

    def put_back(self, octets: bytes) -> None:
        """Put octets before all that is held."""
        if octets:
            self._blocks.insert(0, octets)
            self._count += len(octets)

    def take_all(self) -> bytes:
        """All octets, which are then no longer held."""
        taken = b"".join(self._blocks)
        self.clear()
        return taken

    def take(self, most: int) -> bytes:
        """Octets from the beginning, at most so many. Blocks that are not larger stay whole."""
        count = size = 0
        for block in self._blocks:
            if size + len(block) > most:
                break
            size += len(block)
            count += 1
        if not count:
            return self._cut(most)
        taken = b"".join(self._blocks[:count])
        del self._blocks[:count]
        self._count -= size
        return taken

    def _cut(self, most: int) -> bytes:
        """The beginning of the first block, which is larger."""
        if not self._blocks:
            return b""
        with memoryview(self._blocks[0]) as block:
            taken, self._blocks[0] = bytes(block[:most]), bytes(block[most:])
        self._count -= most
        return taken

    def clear(self) -> None:
        """Hold nothing."""
        self._blocks.clear()
        self._count = 0
