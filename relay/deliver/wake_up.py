"""Wakes the loop of the scheduler: when another part asks for it, or when something is due. †"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

_SHORTEST_SECONDS = 0.05
_LONGEST_SECONDS = 60.0
"""The longest sleep, because the wall clock may be set meanwhile."""


class WakeUp:
    """Wakes the loop when `wake` is called, and at the earliest moment given to `wake_at`."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._woken = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: datetime | None = None
        self._is_stopped = False

    def wake(self) -> None:
        """Wake the loop, or keep it from going to sleep."""
        self._woken.set()

    def reset(self) -> None:
        """The loop is awake: earlier calls of `wake` no longer count."""
        self._woken.clear()

    async def wait(self) -> None:
        """Return when the loop is woken, or was since `reset`."""
        await self._woken.wait()

    def stop(self) -> None:
        """Drop the moments given to `wake_at`."""
        self._is_stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def wake_at(self, due: datetime | None) -> None:
        """Wake the loop at `due`, or earlier; in a minute, if nothing is due (None)."""
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
        self._timer = asyncio.get_running_loop().call_later(wait, self._wake_in_time)
        self._timer_at = at

    def _wake_in_time(self) -> None:
        # A timer may end a moment before the wall clock says so. Then nothing is due yet, and a
        # timer that has ended must not be taken for one that still runs.
        self._timer = None
        self._woken.set()
