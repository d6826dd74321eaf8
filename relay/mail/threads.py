"""Runs work on large content in a thread, so that other sessions do not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

AT_ONCE_OCTETS = 64 * 1024
"""Up to this size the work takes less time than a change of threads."""

T = TypeVar("T")


async def in_thread_if_large(
    work: Callable[[], T], *, octets: int, at_once_octets: int = AT_ONCE_OCTETS
) -> T:
    """The result of `work` on so many octets: done at once if they are few, else in a thread."""
    return work() if octets <= at_once_octets else await asyncio.to_thread(work)
