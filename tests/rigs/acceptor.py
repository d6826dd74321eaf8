"""A process that accepts messages and says of each what it may be told of: for tests that kill it.

`python -m tests.rigs.acceptor DIRECTORY [--count N] [--lanes N] [--large] [--deliver] [--unsynced]`
prints a line a message, unbuffered: `ok ID` after `accept` returned, `no ID REASON` where it raised,
`done ID` after a delivery was recorded, `end` at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

from relay.queue.sqlite import SqliteStore
from relay.queue.store import CHUNK_BYTES, QueueFull, SpoolError
from tests.fakes.queued import DELIVERED, event, new_message, settled


def say(*words: str) -> None:
    """One line, one write."""
    os.write(1, (" ".join(words) + "\n").encode())


async def accept(store: SqliteStore, wanted: argparse.Namespace, lane: int, number: int) -> None:
    """One message, with its id as its content."""
    queue_id = f"{os.getpid():08}{lane:03}{number:06}"
    content = queue_id.encode() * 200
    pieces = 2 if wanted.large else 0
    new = new_message(
        f"b@d{number % 5}.example",
        queue_id=queue_id,
        content=content,
        arrived=datetime.now(UTC),
        staged_bytes=pieces * CHUNK_BYTES,
        events=(event("accepted", queue_id),),
    )
    try:
        for number in range(pieces):
            await store.stage(queue_id, number * CHUNK_BYTES, queue_id.encode().ljust(CHUNK_BYTES, b"."))
        await store.accept(new)
    except SpoolError as exc:
        say("no", queue_id, type(exc).__name__, str(exc).replace("\n", " "))
        await asyncio.sleep(0.02 if isinstance(exc, QueueFull) else 0)
    else:
        say("ok", queue_id)


async def deliver(store: SqliteStore) -> None:
    """Record everything delivered that is due."""
    while True:
        try:
            entries = await store.claim_due(now=datetime.now(UTC), limit=10)
            for entry in entries:
                await store.record(
                    settled(entry, DELIVERED), events=[event("delivered", entry.message.queue_id, "b")]
                )
                say("done", entry.message.queue_id)
        except SpoolError:
            entries = []
        if not entries:
            await asyncio.sleep(0.01)


async def run(wanted: argparse.Namespace) -> None:
    """Accept in several lanes at once."""
    store = await SqliteStore.open(
        wanted.directory,
        reserve_bytes=wanted.reserve,
        synchronous="OFF" if wanted.unsynced else "FULL",
    )
    say("open")
    delivering = asyncio.create_task(deliver(store)) if wanted.deliver else None

    async def lane(which: int) -> None:
        for number in range(wanted.count // wanted.lanes):
            await accept(store, wanted, which, number)
            await asyncio.sleep(0)

    await asyncio.gather(*(lane(which) for which in range(wanted.lanes)))
    if delivering is not None:
        async with asyncio.timeout(30):
            while sum((await store.counts()).values()):
                await asyncio.sleep(0.02)
        delivering.cancel()
    await store.close()
    say("end")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--deliver", action="store_true")
    parser.add_argument("--unsynced", action="store_true")
    parser.add_argument("--reserve", type=int, default=None)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
