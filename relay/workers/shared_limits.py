"""What all workers know of the limits of next hops, in memory that they share.

The table has a row for each next hop, found by a hash of its name, and in it the cells that
`relay.deliver.hop_limits` reads and writes. A row is locked by a lock of the kernel on a part of
the memory's file (`fcntl`), which the kernel takes away from a worker that is killed.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from relay.deliver.hop_limits import CELLS, CELLS_OF_A_WORKER, Cells

ROWS = 2048
"""The most next hops with a limit, with those that were in the configuration before a reload."""
_NAME = 1
_TRIES = 20
_PAUSE_SECONDS = 0.0005


class SharedLimits:
    """The memory. Made before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.width = _NAME + CELLS + workers * CELLS_OF_A_WORKER
        self.file = os.memfd_create("relay-limits", os.MFD_CLOEXEC)
        size = ROWS * self.width * 8
        os.ftruncate(self.file, size)
        # Pages that were never written cost nothing.
        self.cells: memoryview[float] = memoryview(mmap.mmap(self.file, size)).cast("d")

    def of_worker(self, number: int) -> LimitsOfWorker:
        """What one worker reads and writes."""
        return LimitsOfWorker(self, number)

    def clear(self, worker: int) -> None:
        """A worker has ended, and its connections with it."""
        begin = _NAME + CELLS + worker * CELLS_OF_A_WORKER
        nothing = memoryview(bytes(8 * CELLS_OF_A_WORKER)).cast("d")
        for start in range(0, ROWS * self.width, self.width):
            if self.cells[start]:
                self.cells[start + begin : start + begin + CELLS_OF_A_WORKER] = nothing


class LimitsOfWorker:
    """A `relay.deliver.hop_limits.Table`."""

    def __init__(self, shared: SharedLimits, number: int) -> None:
        self.number = number
        self.workers = shared.workers
        self._shared = shared
        self._rows: dict[str, int] = {}

    def cells(self, name: str) -> Cells:
        """The cells of a next hop."""
        begin = self._row(name) * self._shared.width
        return self._shared.cells[begin + _NAME : begin + self._shared.width]

    @contextmanager
    def locked(self, name: str) -> Iterator[Cells | None]:
        """The cells of a next hop, while no other worker may use them; None where another keeps
        them for longer than some milliseconds: it was stopped, or has no processor.
        """
        row = self._row(name)
        if not self._lock(row):
            yield None
            return
        try:
            yield self.cells(name)
        finally:
            fcntl.lockf(self._shared.file, fcntl.LOCK_UN, 1, row)

    def _lock(self, row: int) -> bool:
        for _ in range(_TRIES):
            try:
                fcntl.lockf(self._shared.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row)
            except OSError:
                time.sleep(_PAUSE_SECONDS)
            else:
                return True
        return False

    def _row(self, name: str) -> int:
        if name not in self._rows:
            self._rows[name] = self._find(name)
        return self._rows[name]

    def _find(self, name: str) -> int:
        """The row of a next hop, or the first that is free. Names are few and known to the
        operator: should there ever be more than rows, two share one.
        """
        # 48 bits: a double has room for them. Never 0, which is a free row.
        digest: bytes = hashlib.sha256(name.encode()).digest()
        key = float(int.from_bytes(digest[:6], "big") | 1)
        first = int.from_bytes(digest[6:8], "big") % ROWS
        cells, width = self._shared.cells, self._shared.width
        row = first
        fcntl.lockf(self._shared.file, fcntl.LOCK_EX, 1, ROWS)
        try:
            while cells[row * width] not in (0.0, key) and (row := (row + 1) % ROWS) != first:
                pass
            if not cells[row * width]:
                cells[row * width] = key
            return row
        finally:
            fcntl.lockf(self._shared.file, fcntl.LOCK_UN, 1, ROWS)
