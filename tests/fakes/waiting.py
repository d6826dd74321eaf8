"""Waits in a test for something that other tasks do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["until"]


async def until(condition: Callable[[], object], *, within: float = 20) -> float:
    """Wait until the condition is true, at most so many seconds; returns the seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - began
