"""The connections of all workers, and the wrong passwords, in memory that the workers share.

Each worker writes its own row and reads the others', so there is no lock: what two workers let in
at the very same moment they see a moment later, and a limit may be passed by as many as there are
workers. Clients are kept by a hash of their address; two that meet in one slot count as one, and
with `SLOTS` of them that is rare enough for a limit that is a round number anyway.
"""

from __future__ import annotations

import mmap
import zlib
from datetime import datetime

SLOTS = 16_384
_TOTAL = SLOTS
_FAILURES = SLOTS + 1
_MINUTES = _FAILURES + SLOTS
"""When the last of these failures was: minutes since 1970."""
_WIDTH = _MINUTES + SLOTS


class SharedCounters:
    """A row for each worker. Made before they are forked."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        # Pages that were never written cost nothing.
        self._counts = memoryview(mmap.mmap(-1, workers * _WIDTH * 4)).cast("I")

    def row(self, worker: int) -> WorkerCounters:
        """The row one worker writes."""
        others = [number * _WIDTH for number in range(self._workers) if number != worker]
        return WorkerCounters(self._counts, worker * _WIDTH, others)

    def clear(self, worker: int) -> None:
        """A worker has ended, and its connections with it. Wrong passwords are not forgotten so
        easily.
        """
        start = worker * _WIDTH
        self._counts[start : start + _FAILURES] = memoryview(bytes(4 * _FAILURES)).cast("I")


class WorkerCounters:
    """One worker's part: a `receive.limits.Elsewhere` and a `submit.failures.FailedElsewhere`."""

    def __init__(self, counts: memoryview, own: int, others: list[int]) -> None:
        self._counts, self._own, self._others = counts, own, others

    def total(self) -> int:
        """Connections that the other workers have."""
        return sum(self._counts[start + _TOTAL] for start in self._others)

    def of(self, client: str) -> int:
        """Connections that the other workers have from a client."""
        slot = _slot(client)
        return sum(self._counts[start + slot] for start in self._others)

    def changed(self, client: str, by: int) -> None:
        """This worker has one more from a client, or one less."""
        self._counts[self._own + _TOTAL] += by
        self._counts[self._own + _slot(client)] += by

    def failures_of(self, key: str, since: datetime) -> int:
        """Wrong passwords, of a client or of a name at it, given to other workers."""
        slot, oldest = _slot(key), _minute(since)
        return sum(
            self._counts[start + _FAILURES + slot]
            for start in self._others
            if self._counts[start + _MINUTES + slot] > oldest
        )

    def failed(self, key: str, count: int, now: datetime) -> None:
        """This worker was given so many."""
        slot = _slot(key)
        self._counts[self._own + _FAILURES + slot] = count
        self._counts[self._own + _MINUTES + slot] = _minute(now)


def _minute(time: datetime) -> int:
    return max(0, int(time.timestamp()) // 60)


def _slot(client: str) -> int:
    # Not `hash`: it differs from process to process.
    return zlib.crc32(client.encode()) % SLOTS
