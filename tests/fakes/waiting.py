"""Waits in a test for something that other tasks do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["idle_seconds", "until"]


async def until(condition: Callable[[], object], *, within: float = 20) -> float:
    """Wait until the condition is true, at most so many seconds; returns the seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - began


def idle_seconds() -> float:
    """A clock that goes on only while this thread has nothing to do.

    It stands while the thread runs, and while it waits for a processor that others use.
    """
    ran, waited, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
    return time.monotonic() - (ran + waited) / 1e9
