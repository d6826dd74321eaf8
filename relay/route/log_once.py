"""Limits the log lines about a mistake that each attempt meets again. Pure.

A next hop that cannot be used is one mistake, and thousands of messages may wait for it. The relay
logs one line for each cause and minute.
"""

from __future__ import annotations

from relay.mail.newest import keep_newest

_SECONDS = 60.0
_REMEMBERED = 1000


class LogOnce:
    """When each cause was logged. It remembers 1,000 causes and forgets the oldest first."""

    def __init__(self) -> None:
        self._logged_at: dict[str, float] = {}

    def is_due(self, cause: str, now: float) -> bool:
        """Whether a line about a cause is to be logged now; if so, it counts as logged. `now`: on
        the monotonic clock.
        """
        logged_at = self._logged_at.get(cause)
        if logged_at is not None and now - logged_at < _SECONDS:
            return False
        keep_newest(self._logged_at, cause, now, most=_REMEMBERED)
        return True

    def forget(self) -> None:
        """Log each cause again the next time."""
        self._logged_at.clear()
