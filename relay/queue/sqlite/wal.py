"""The write-ahead log: folded back into the database when it has grown, shortened when nothing
waits.
"""

from __future__ import annotations

import logging
import sqlite3

from relay.queue.sqlite.disk import PAGE_BYTES, Spool

log = logging.getLogger(__name__)

_WORTH_TRUNCATING_BYTES = 1024 * 1024


class WriteAheadLog:
    """How long the log is SQLite tells only at a checkpoint: its file keeps its size.

    So the octets written are counted, and each checkpoint says how much a written octet swells
    there.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self.limit_bytes = spool.ballast_bytes
        self._written_bytes = 0
        self._swell = 2.0

    def written(self, size_bytes: int, requests: int) -> None:
        """So many octets of content were committed, in so many requests."""
        self._written_bytes += size_bytes + 2048 * requests + 8 * PAGE_BYTES

    def forget(self) -> None:
        """Count anew, after trouble."""
        self._written_bytes = 0

    @property
    def is_long(self) -> bool:
        """Whether it has grown so much that it is to be folded back."""
        # On a full disk the log has the ballast's room and no more: its length is an estimate.
        limit = self.limit_bytes if self._spool.has_ballast else self.limit_bytes // 2
        return self._written_bytes * self._swell >= limit

    def checkpoint(self, db: sqlite3.Connection, *, idle: bool) -> None:
        """Fold the log back into the database where it has grown, or where nothing waits."""
        if self.is_long or (idle and self._written_bytes):
            self._checkpoint(db)

    def truncate(self, db: sqlite3.Connection) -> None:
        """Give room back to the file system. On a full disk the log keeps it: it may not get it
        again.
        """
        if self._spool.has_ballast and self._spool.wal_bytes() > _WORTH_TRUNCATING_BYTES:
            _truncate(db)

    def _checkpoint(self, db: sqlite3.Connection) -> None:
        _, frames, folded = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        wal_bytes = frames * PAGE_BYTES
        swell = wal_bytes / max(self._written_bytes, PAGE_BYTES)
        self._swell = min(max(swell, 0.9 * self._swell, 0.5), 50.0)
        self._written_bytes = 0 if folded == frames else self._written_bytes // 2
        if folded < frames and wal_bytes > 8 * self.limit_bytes:
            log.warning(
                "the queue's write-ahead log has %d MiB: a reader holds it", wal_bytes >> 20
            )


def _truncate(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA busy_timeout = 0")
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        db.execute("PRAGMA busy_timeout = 5000")
