"""Measures how many messages a second pass through the store: `python benchmarks/store.py`.

Several clients accept small messages one after the other; a scheduler claims each due message and
records it as delivered at once. Commits are synced as in service. To count the syncs, run it under
`strace -f -c -e trace=fdatasync,fsync`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from relay.mail.event import Event
from relay.mail.outcome import Delivered
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import (
    Entry,
    LastAttempt,
    MessageSummary,
    QueuedMessage,
    QueuedRecipient,
    State,
)
from relay.queue.queue_id import new_queue_id
from relay.queue.settle import Change, Settlement
from relay.queue.sqlite import SqliteStore
from relay.queue.store import NewMessage

SETTINGS = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.DEFAULT))
LINE = json.dumps({"event": "delivered", "id": "x" * 20, "delivery-status": {"message": "y" * 700}})


def message(number: int, size_bytes: int) -> NewMessage:
    """A message for one of ten domains."""
    now = datetime.now(UTC)
    queue_id = new_queue_id(now)
    domain = f"example{number % 10}.net"
    summary = MessageSummary(
        "<1@example.com>", "a@example.com", f"b@{domain}", "A subject of some length"
    )
    queued = QueuedMessage(
        queue_id, "sender@example.com", now, size_bytes, summary, client="192.0.2.1"
    )
    recipient = QueuedRecipient(0, f"user{number % 5000}@{domain}", domain, SETTINGS)
    event = Event(f"{queue_id}.a", now, "accepted", queue_id, queued.reverse_path, "", LINE[:500])
    return NewMessage(queued, (recipient,), b"x" * size_bytes, events=(event,))


def delivered(entry: Entry) -> tuple[Settlement, Event]:
    """The settlement and event of an entry whose one recipient is delivered."""
    now = datetime.now(UTC)
    before, queue_id = entry.recipients[0], entry.message.queue_id
    outcome = Delivered("2.0.0", 250, "OK")
    last = LastAttempt(now, 250, "2.0.0", "OK", "mx.example.net")
    after = QueuedRecipient(
        0,
        before.address,
        before.domain,
        before.settings,
        state=State.DELIVERED,
        attempts=1,
        last=last,
    )
    event = Event(
        f"{queue_id}.d", now, "delivered", queue_id, "sender@example.com", before.address, LINE
    )
    return Settlement(entry, now, (Change(after, outcome, 250, "2.0.0"),)), event


async def run(directory: Path, messages: int, lanes: int, size_bytes: int) -> None:
    """Pass the messages through the store and print the result."""
    store = await SqliteStore.open(directory / "spool")
    per_lane, done, all_done = messages // lanes, 0, asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    async def lane(number: int) -> None:
        for step in range(per_lane):
            await store.accept(message(number * per_lane + step, size_bytes))

    async def deliver(entry: Entry) -> None:
        nonlocal done
        settlement, event = delivered(entry)
        await store.record(settlement, events=(event,))
        done += 1
        if done == per_lane * lanes:
            all_done.set()

    async def schedule() -> None:
        while True:
            entries = await store.claim_due(now=datetime.now(UTC), limit=200)
            for entry in entries:
                task = asyncio.create_task(deliver(entry))
                running.add(task)
                task.add_done_callback(running.discard)
            if not entries:
                await store.wait_for_work()

    began, cpu = time.perf_counter(), time.process_time()
    scheduler = asyncio.create_task(schedule())
    await asyncio.gather(*map(lane, range(lanes)))
    await all_done.wait()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    writer = time.clock_gettime(time.pthread_getcpuclockid(store.writer.thread.ident or 0))
    total = per_lane * lanes
    print(
        f"{lanes} lanes, {size_bytes} octets: {total / seconds:.0f} accepted and recorded/s, "
        f"{1e6 * cpu / total:.0f} us of CPU each, {1e6 * writer / total:.0f} us of it in the writer"
    )
    scheduler.cancel()
    await store.close()


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--lanes", type=int, default=20)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to be measured")
    wanted = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="store-", dir=wanted.directory))
    try:
        uvloop.run(run(directory, wanted.messages, wanted.lanes, wanted.size))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
