"""Waits in a test for something that others do, and how long it is worth waiting."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path


def patient(seconds: float) -> float:
    """The wait that so many seconds are on a machine that does nothing else: longer by as many
    processes as share a processor now. For waits that a test that passes does not use up.
    """
    average, _, _, running, _ = Path("/proc/loadavg").read_text(encoding="ascii").split()
    busy = max(float(average), float(running.partition("/")[0]))
    return seconds * max(1.0, busy / (os.cpu_count() or 1))


async def until(condition: Callable[[], object], *, within: float = 20) -> float:
    """Wait until the condition is true, at most so many seconds; returns the seconds it took."""
    began = time.monotonic()
    async with asyncio.timeout(patient(within)):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - began


def idle_seconds() -> float:
    """A clock that goes on only while this thread has nothing to do.

    It stands while the thread runs, and while it waits for a processor that others use.
    """
    ran, waited, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
    return time.monotonic() - (ran + waited) / 1e9
