"""The line between a worker and its supervisor."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from relay.workers.worker import Worker
from tests.fakes.waiting import patient


async def _is_told(*, has_unread: bool) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    over = asyncio.Event()
    with ours, theirs:
        Worker(line=ours).watch_line(over.set)
        if has_unread:  # the kernel tells of that as a reset
            ours.send(b"well")
        theirs.close()
        async with asyncio.timeout(patient(5)):
            await over.wait()


@pytest.mark.parametrize("has_unread", [False, True])
def test_worker_drains_when_its_supervisor_is_gone(has_unread: bool) -> None:
    """On the loop that the relay has: asyncio's own asks again after the reset."""
    uvloop.run(_is_told(has_unread=has_unread))
