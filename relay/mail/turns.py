"""Work on large content is done in a thread, where it keeps nobody else waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

__all__ = ["off_the_loop"]

_AT_ONCE_OCTETS = 64 * 1024
"""Up to this, work on a header section or on a new message is shorter than a change of threads."""

T = TypeVar("T")


async def off_the_loop(
    work: Callable[[], T], *, octets: int, at_once_octets: int = _AT_ONCE_OCTETS
) -> T:
    """The result of some work on so many octets: done here if they are few, else in a thread."""
    return work() if octets <= at_once_octets else await asyncio.to_thread(work)
