"""Whether the disk has room for new mail, and what is done when it has none.

New mail is refused while less than the reserve is free, and for a moment after the disk was full.
Mail that is queued can leave all the same: the ballast is given up for it (`disk`), and laid again
when there is room. Trouble is logged once when it begins and once when it ends, since a full disk
is not to fill the log, too.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable

from relay.queue.sqlite.disk import PAGE_BYTES, Spool, is_busy, is_full
from relay.queue.store import SpoolError

log = logging.getLogger(__name__)

_FULL_PAUSE_SECONDS = 1.0
_AMPLE_BYTES = 256 * 1024 * 1024
_AMPLE_SECONDS = 0.1
_HARDLY_ANY_BYTES = 64 * 1024
_BALLAST_SECONDS = 1.0


class DiskSpace:
    """The disk space for one queue. `connection` gives the database, which may have free pages."""

    def __init__(self, spool: Spool, connection: Callable[[], sqlite3.Connection]) -> None:
        self._spool = spool
        self._connection = connection
        self.full_until = 0.0
        self.ample_until = 0.0
        self._next_ballast = 0.0

    def is_enough(self) -> bool:
        """Whether new mail may be taken."""
        now = time.monotonic()
        return now >= self.full_until and (now < self.ample_until or self._is_enough())

    def _is_enough(self) -> bool:
        room, reserve = self._spool.free_bytes(), self._spool.reserve_bytes
        if room >= reserve:
            if room >= reserve + _AMPLE_BYTES:
                self.ample_until = time.monotonic() + _AMPLE_SECONDS
            return True
        # The file does not shrink when mail leaves: what is free inside it is room too.
        try:
            free_pages: int = self._connection().execute("PRAGMA freelist_count").fetchone()[0]
        except (sqlite3.Error, OSError, SpoolError):
            return False
        return room + free_pages * PAGE_BYTES >= reserve

    def is_wanted(self, exc: BaseException) -> bool:
        """Whether something failed for want of space, which SQLite says in more than one way."""
        return is_full(exc) or (not is_busy(exc) and self._spool.free_bytes() < _HARDLY_ANY_BYTES)

    def was_full(self) -> None:
        """Give up the ballast, and take no new mail for a moment."""
        self.full_until = time.monotonic() + _FULL_PAUSE_SECONDS
        self._spool.drop_ballast()
        self._next_ballast = self.full_until

    def give_up_ballast(self) -> bool:
        """The same at a start; whether there was any ballast."""
        self._next_ballast = time.monotonic() + _BALLAST_SECONDS
        return self._spool.drop_ballast()

    def lay_ballast(self) -> None:
        """Lay the ballast again, now and then, where it was given up."""
        if not self._spool.has_ballast and time.monotonic() >= self._next_ballast:
            self._next_ballast = time.monotonic() + _BALLAST_SECONDS
            self._spool.lay_ballast()


class Trouble:
    """What fails at the moment."""

    def __init__(self) -> None:
        self._logged = ""

    def began(self, exc: BaseException) -> None:
        """Log a failure, unless it is the last one again."""
        if str(exc) != self._logged:
            self._logged = str(exc)
            log.error("the queue's database failed, nothing was changed: %s", exc)

    def ended(self) -> bool:
        """A commit has succeeded; whether there was trouble before."""
        before, self._logged = self._logged, ""
        if before:
            log.warning("the queue's database works again, after: %s", before)
        return bool(before)
