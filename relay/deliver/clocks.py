"""The wall clock and the monotonic one of the scheduler, and what follows when the first is set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime

from relay.queue.retry import ClockWatch, watch

__all__ = ["Clocks"]

logger = logging.getLogger(__name__)


class Clocks:
    """Both clocks, looked at again and again. `on_set` is called after the wall clock was set.

    `was_set_back`: the queue does not know yet that the wall clock was set back. `last_look`: None
    before the first.
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
        """Look at both clocks: since when the wall clock has kept pace with the other one."""
        before = self.last_look
        self.last_look = now = watch(before, wall=self.now(), monotonic=self.monotonic())
        if before is not None and now.steady_since != before.steady_since:
            logger.warning("the clock was set from about %s to %s", before.wall, now.wall)
            self.was_set_back |= now.wall < before.wall
            self._on_set()
        return now.steady_since
