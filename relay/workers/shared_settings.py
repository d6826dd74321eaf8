"""What the first worker tells the others: a text in memory that all share, and the number of its
edition.

One worker writes, the others read, without a lock. An edition carries a checksum: a worker that
reads in the middle of a change keeps what it has, and looks again with its next message. To look is
to compare a number, which every message can afford.
"""

from __future__ import annotations

import mmap
import struct
import zlib

CAPACITY_BYTES = 8 * 1024 * 1024
"""Pages that were never written cost nothing."""

_HEAD = struct.Struct("=III")  # edition, length, checksum


class SharedSettings:
    """Made before the workers are forked. Edition 0 is none yet."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD.size + CAPACITY_BYTES)

    @property
    def edition(self) -> int:
        """The number of the edition that is published now."""
        number: int = _HEAD.unpack_from(self._memory)[0]
        return number

    def tell(self, octets: bytes) -> None:
        """Publish this in the place of the edition before; ValueError where it is too long."""
        if len(octets) > CAPACITY_BYTES:
            raise ValueError(f"{len(octets)} octets of settings are more than workers can share")
        following = self.edition % 0xFFFFFFFF + 1
        self._memory[_HEAD.size : _HEAD.size + len(octets)] = octets
        _HEAD.pack_into(self._memory, 0, following, len(octets), zlib.crc32(octets))

    def read(self) -> tuple[int, bytes] | None:
        """The edition's number and text; None where there is none, or one is being written."""
        edition, length, checksum = _HEAD.unpack_from(self._memory)
        if not edition or length > CAPACITY_BYTES:
            return None
        octets = self._memory[_HEAD.size : _HEAD.size + length]
        return (edition, octets) if zlib.crc32(octets) == checksum else None
