"""A duration in words, in the largest unit that fits: `5 days`, `1 hour`, `20 seconds`. Pure."""

from __future__ import annotations

from collections.abc import Callable

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"))


def duration_text(seconds: float, *, whole: Callable[[float], int] = round) -> str:
    """A duration in words. `whole` makes a whole number of units: `round`, or `math.floor`."""
    for length, name in _UNITS:
        if seconds >= length:
            count = whole(seconds / length)
            return f"{count} {name}{'s' if count != 1 else ''}"
    return f"{max(int(seconds), 0)} seconds"
