"""A process that accepts messages and says of each what it may be told of: for tests that kill it.

`python -m tests.rigs.acceptor DIRECTORY [--count N] [--lanes N] [--large] [--deliver] [--adopt]
[--unsynced]` prints a line a message, unbuffered: `ok ID` after `accept` returned, `no ID REASON`
where it raised, `done ID` after a delivery was recorded, `end` at the end. With `--adopt` it takes
over the queues `worker-*` first.

`Told` reads those lines, and `expect_kept` looks whether the queue has kept what they promise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from relay.queue.sqlite.adopt import orphans
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    EventPage,
    QueueFilter,
    QueueFull,
    SpoolError,
)
from tests.fakes.queued import DELIVERED, content_of, event, new_message, settled
from tests.fakes.waiting import patient


def command(spool: Path, *options: str) -> list[str]:
    """What to run."""
    return [sys.executable, "-m", "tests.rigs.acceptor", str(spool), *options]


@dataclass
class Told:
    """What the process said."""

    accepted: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    opened: bool = False
    ended: bool = False

    def hear(self, output: str) -> Told:
        """Some whole lines more."""
        for line in output.split("\n")[:-1]:
            word, *rest = line.split(" ", 2)
            match word:
                case "ok":
                    self.accepted.append(rest[0])
                case "no":
                    self.refused.append(rest[0])
                    self.reasons.append(rest[1].split()[0])
                case "done":
                    self.delivered.append(rest[0])
                case "open":
                    self.opened = True
                case "end":
                    self.ended = True
        return self


def pieces_of(queue_id: str, *, large: bool) -> list[bytes]:
    """A message's content, all of its own id: what is staged, and the rest."""
    staged = [queue_id.encode().ljust(CHUNK_BYTES, b".")] * 2 if large else []
    return [*staged, queue_id.encode() * 200]


async def expect_kept(
    spool: Path, told: Told, *, refused_stay_out: bool = True, synchronous: str = "FULL"
) -> None:
    """Nothing lost, nothing half there, nothing invented; and the queue goes on working."""
    store = await SqliteStore.open(
        spool, synchronous=synchronous, adopting=orphans(spool, "worker-", present=())
    )
    try:
        assert await store.ask(lambda db: db.execute("PRAGMA integrity_check").fetchall()) == [
            ("ok",)
        ]
        listed = await store.list_messages(QueueFilter(), now=datetime.now(UTC), limit=9999)
        here = {message.queue_id for message in listed}
        lost = set(told.accepted) - here - set(told.delivered)
        gone = {
            one.event.queue_id
            for one in await store.find_events(
                EventFilter(names=frozenset({"delivered"})), EventPage(limit=9999)
            )
        }
        assert not lost - gone, "accepted and lost"
        assert gone >= set(told.delivered), "a result that was recorded is forgotten"
        assert not here & set(told.delivered), "delivered and still queued"
        if refused_stay_out:
            assert not here & set(told.refused), "refused and queued all the same"
        for message in listed:
            pieces = pieces_of(message.queue_id, large=message.size_bytes > CHUNK_BYTES)
            assert await content_of(store, message.queue_id) == b"".join(pieces), "not whole"
        files = {path.name for path in (spool / "content").iterdir()}
        assert files == {message.queue_id for message in listed if message.size_bytes > CHUNK_BYTES}
        due = await store.claim_due(now=datetime.now(UTC), limit=9999)
        while more := await store.claim_due(now=datetime.now(UTC), limit=9999):
            due += more
        assert {entry.message.queue_id for entry in due} == here, "not due at once after a crash"
    finally:
        await store.close()


def say(*words: str) -> None:
    """One line, one write."""
    os.write(1, (" ".join(words) + "\n").encode())


async def accept(store: SqliteStore, wanted: argparse.Namespace, lane: int, number: int) -> None:
    """One message, with its id as its content."""
    queue_id = f"{os.getpid():08}{lane:03}{number:06}"
    *staged, rest = pieces_of(queue_id, large=wanted.large)
    new = new_message(
        f"b@d{number % 5}.example",
        queue_id=queue_id,
        content=rest,
        arrived=datetime.now(UTC),
        staged_bytes=sum(map(len, staged)),
        events=(event("accepted", queue_id),),
    )
    try:
        for piece, octets in enumerate(staged):
            await store.stage(queue_id, piece * CHUNK_BYTES, octets)
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
                    settled(entry, DELIVERED),
                    events=[event("delivered", entry.message.queue_id, "b")],
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
        adopting=orphans(wanted.directory, "worker-", present=()) if wanted.adopt else (),
    )
    say("open")
    delivering = asyncio.create_task(deliver(store)) if wanted.deliver else None

    async def lane(which: int) -> None:
        for number in range(wanted.count // wanted.lanes):
            await accept(store, wanted, which, number)
            await asyncio.sleep(0)

    await asyncio.gather(*(lane(which) for which in range(wanted.lanes)))
    if delivering is not None:
        async with asyncio.timeout(patient(30)):
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
    parser.add_argument("--adopt", action="store_true")
    parser.add_argument("--unsynced", action="store_true")
    parser.add_argument("--reserve", type=int, default=None)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
