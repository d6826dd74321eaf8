"""How logins at next hops do, in memory that all workers share: `relay.route.credentials.Rests`.

A login at a host has a slot, found by its key. There is no lock: two workers that try a login at
the very same moment both try it, once. Should two logins ever meet in one slot, the one waits with
the other, for a quarter of an hour at most.
"""

from __future__ import annotations

import mmap

from relay.route.credentials import Rest

SLOTS = 4096
_WIDTH = 3


class SharedRests:
    """Made before the workers are forked."""

    def __init__(self) -> None:
        # Pages that were never written cost nothing.
        self._cells = memoryview(mmap.mmap(-1, SLOTS * _WIDTH * 8)).cast("d")

    def get(self, key: bytes, default: Rest, /) -> Rest:
        """How a login does."""
        at = _slot(key)
        return Rest(int(self._cells[at]), self._cells[at + 1], self._cells[at + 2])

    def __setitem__(self, key: bytes, rest: Rest, /) -> None:
        at = _slot(key)
        self._cells[at], self._cells[at + 1] = float(rest.refusals), rest.until
        self._cells[at + 2] = rest.tried_until


def _slot(key: bytes) -> int:
    return int.from_bytes(key[:8], "big") % SLOTS * _WIDTH
