"""Measures how many messages a second pass through the store: `python -m benchmarks.store`.

Several clients accept small messages one after the other; a scheduler claims each due message and
records it as delivered at once. Commits are synced as in service. To count the syncs, run it under
`strace -f -c -e trace=fdatasync,fsync`. `--postgres`: on a server of its own, whose CPU is told,
too; `--nodes`: so many stores, in this process, share its queue.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from benchmarks.meter import cpu_seconds
from benchmarks.nodes import postgres_on_disk
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
from relay.queue.postgres import NodeOptions, PostgresStore, Server, parse_url
from relay.queue.queue_id import new_queue_id
from relay.queue.settle import Change, Settlement
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage, Store
from tests.rigs.postgres import Postgres

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


async def run(store: Store, first: int, messages: int, lanes: int, size_bytes: int) -> None:
    """Pass the messages through the store; they are numbered from `first`."""
    per_lane, done, all_done = messages // lanes, 0, asyncio.Event()
    running: set[asyncio.Task[None]] = set()

    async def lane(number: int) -> None:
        for step in range(per_lane):
            await store.accept(message(first + number * per_lane + step, size_bytes))

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

    scheduler = asyncio.create_task(schedule())
    await asyncio.gather(*map(lane, range(lanes)))
    await all_done.wait()
    scheduler.cancel()


async def on_files(wanted: argparse.Namespace, directory: Path) -> None:
    """The queue in a directory."""
    store = await SqliteStore.open(directory / "spool")
    began, cpu = time.perf_counter(), time.process_time()
    await run(store, 0, wanted.messages, wanted.lanes, wanted.size)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    writer = time.clock_gettime(time.pthread_getcpuclockid(store.writer.thread.ident or 0))
    total = wanted.messages
    print(
        f"{wanted.lanes} lanes, {wanted.size} octets: {total / seconds:.0f} accepted and"
        f" recorded/s, {1e6 * cpu / total:.0f} us of CPU each,"
        f" {1e6 * writer / total:.0f} us of it in the writer"
    )
    await store.close()


async def on_server(wanted: argparse.Namespace, server: Postgres) -> None:
    """The queue on a server: in one store, or in several that share it."""
    stores = [
        await PostgresStore.open(
            Server(parse_url(server.url()), name="relay", password=lambda: None),
            NodeOptions(f"n{number}"),
        )
        for number in range(wanted.nodes)
    ]
    assert server.process is not None
    each = wanted.messages // len(stores)
    began, cpu, theirs = time.perf_counter(), time.process_time(), cpu_seconds(server.process.pid)
    await asyncio.gather(
        *(
            run(store, number * each, each, wanted.lanes, wanted.size)
            for number, store in enumerate(stores)
        )
    )
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    theirs = cpu_seconds(server.process.pid) - theirs
    batches = int(
        server.sql("SELECT sum(n) FROM (SELECT max(n) AS n FROM relay.batch GROUP BY lease) AS a")
    )
    total = wanted.messages
    print(
        f"{wanted.nodes} nodes, {wanted.lanes} lanes, {wanted.size} octets:"
        f" {total / seconds:.0f} accepted and recorded/s, {1e6 * cpu / total:.0f} us of CPU each,"
        f" {1e6 * theirs / total:.0f} us of the server, {1000 * batches / total:.0f} commits/1000"
    )
    for store in stores:
        await store.close()


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--lanes", type=int, default=20)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--nodes", type=int, default=1)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="store-", dir=wanted.directory) as path:
        directory = Path(path)
        directory.chmod(0o755)
        if wanted.postgres:
            with postgres_on_disk(directory) as server:
                uvloop.run(on_server(wanted, server))
        else:
            uvloop.run(on_files(wanted, directory))


if __name__ == "__main__":
    main()
