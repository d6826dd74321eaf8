"""Wakes the loop of the scheduler: when another part asks for it, or when something is due. †"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

__all__ = ["Alarm"]

_SHORTEST_SECONDS = 0.05
_LONGEST_SECONDS = 60.0
"""The longest sleep, because the wall clock may be set meanwhile."""


class Alarm:
    """Rings when `ring` is called, and at the earliest of the moments given to `expect`."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._rung = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: datetime | None = None
        self._is_stopped = False

    def ring(self) -> None:
        """Wake the loop, or keep it from going to sleep."""
        self._rung.set()

    def quiet(self) -> None:
        """The loop is awake: earlier calls of `ring` no longer count."""
        self._rung.clear()

    async def wait(self) -> None:
        """Return when it rings, or has rung since `quiet`."""
        await self._rung.wait()

    def stop(self) -> None:
        """Drop the moments given to `expect`."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def expect(self, due: datetime | None) -> None:
        """Ring when something is due, or earlier; None: nothing is, look again in a minute."""
        if self._is_stopped:
            return
        now = self._clock()
        wait = _LONGEST_SECONDS if due is None else (due - now).total_seconds()
        wait = min(max(wait, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        at = now + timedelta(seconds=wait)
        if self._timer is not None:
            if self._timer_at is not None and now < self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(wait, self._ring_in_time)
        self._timer_at = at

    def _ring_in_time(self) -> None:
        # Timers may ring a moment before the wall clock says so. Then nothing is due yet, and a
        # timer that has rung must not be taken for one that is still to ring.
        self._timer = None
        self._rung.set()
