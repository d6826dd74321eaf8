"""The wall clock and the monotonic one of the scheduler, and what follows when the first is set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from relay.queue.retry import ClockWatch, watch

logger = logging.getLogger(__name__)


class Clocks:
    """Compares both clocks repeatedly. `on_set` is called after the wall clock was set.

    `was_set_back`: the wall clock was set back and the queue does not know it yet. `last_look`:
    when the clocks were last compared, None before the first time.
    """

    def __init__(
        self,
        wall: Callable[[], datetime],
        monotonic: Callable[[], float],
        on_set: Callable[[], None],
    ) -> None:
        self.now = wall
        self.monotonic = monotonic
        self.was_set_back = False
        self.last_look: ClockWatch | None = None
        self._on_set = on_set

    def steady_since(self) -> datetime:
        """Compare both clocks; returns since when they have run at the same pace."""
        before = self.last_look
        self.last_look = now = watch(before, wall=self.now(), monotonic=self.monotonic())
        if before is not None and now.steady_since != before.steady_since:
            logger.warning("the clock was set from about %s to %s", before.wall, now.wall)
            self.was_set_back |= now.wall < before.wall
            self._on_set()
        return now.steady_since
