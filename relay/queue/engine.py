"""Opens a queue: the only place that knows which engine keeps it.

    open_store    the queue of this process, to work with
    open_beside   the queue of another worker, which is running or starting, to look at
    open_to_read  the queue of a relay that does not run, to look at
    open_to_move  a queue that messages leave or come to (`relay.queue.move`)
    open_policies the MTA-STS policies, which all workers share; `open_policies_beside` to look at
    open_memory   what hosts have shown of TLS, for all workers; `open_memory_beside` to look at
    holder        the process that uses a queue
    orphans       queues of workers that do not exist any more, which `open_store` takes over
    describe_server
                  what a server says of itself, for `relay check --connect`

A queue is in a directory (SQLite), or on a server that several nodes share (PostgreSQL);
`QueueLocation` says which. Engines are imported when one is opened: `relay --help` needs none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from relay.queue.location import QueueLocation
from relay.queue.store import SpoolError

if TYPE_CHECKING:
    from relay.queue.memory import MemoryStore
    from relay.queue.move import MovingQueue
    from relay.queue.policies import PolicyCache
    from relay.queue.postgres import Server
    from relay.queue.store import ReadOnlyQueue, Store

log = logging.getLogger(__name__)

WORKER_SPOOL = "worker-"
"""How the directory of a further worker's queue begins, below that of the first."""

_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 1.0


async def open_store(
    location: QueueLocation,
    *,
    now: datetime,
    max_wait: timedelta,
    adopting: Collection[Path] = (),
    policy_digest: str = "",
    concurrency: int = 0,
) -> Store:
    """The queue, made where there is none. `SpoolError` or OSError where it cannot be.

    `max_wait`: the longest a recipient is ever deferred. `adopting`: what `orphans` found.
    `policy_digest`: what a node of several decides by, to be compared with that of others.
    `concurrency`: how many attempts it makes at once; of what others could deliver, too, it keeps
    no more than twice as many. A server that cannot be reached is tried for a minute.
    """
    if location.is_shared:
        return await _open_shared(location, max_wait, policy_digest, concurrency)
    from relay.queue.sqlite.store import SqliteStore

    store = await SqliteStore.open(
        Path(location.path), now=now, max_wait=max_wait, adopting=adopting
    )
    _tell_of_leaving(*await store.leaving())
    return store


def _tell_of_leaving(count: int, target: str | None) -> None:
    from relay.queue.move_file import said_of_leaving

    if count and target is not None:
        log.warning("%s", said_of_leaving(count, target))


async def _open_shared(
    location: QueueLocation, max_wait: timedelta, policy_digest: str, concurrency: int
) -> Store:
    server = _server(location)
    from relay.queue.postgres import NodeOptions, PostgresStore, StartRefused

    options = NodeOptions(location.node, location.lease, policy_digest)
    from relay.queue.handoff import HandOffLimits

    limits = HandOffLimits(entries=2 * concurrency, entries_per_domain=2 * concurrency)
    until = time.monotonic() + _PATIENCE_SECONDS
    told = False
    while True:
        try:
            store = await PostgresStore.open(server, options, max_wait=max_wait, limits=limits)
        except StartRefused:
            raise
        except SpoolError as error:
            if time.monotonic() >= until:
                raise
            if not told:
                log.warning("waiting for the queue's server: %s", error)
                told = True
        else:
            _tell_of_leaving(*await store.leaving())
            return store
        await asyncio.sleep(_PAUSE_SECONDS)


def _server(location: QueueLocation) -> Server:
    """The server at `location.url`."""
    try:
        from relay.queue.postgres import Server
    except ImportError as error:
        if error.name != "asyncpg":
            raise
        text = "the library asyncpg is not installed: pip install 'relay-smarthost[postgres]'"
        raise SpoolError(text) from None
    from relay.queue.server_address import parse_url

    assert location.url is not None
    return Server(
        parse_url(location.url), name=f"relay {location.node}", password=location.password
    )


def open_beside(directory: Path) -> ReadOnlyQueue:
    """The queue of another worker. It is opened with the first question."""
    from relay.queue.sqlite.reader import Reader

    return Reader.of(directory)


async def open_to_read(location: QueueLocation, stack: AsyncExitStack) -> list[ReadOnlyQueue]:
    """The queues of all workers of a relay that does not run; `stack` closes them. `SpoolError`
    where one is in use or is not there. A queue on a server may be in use by other nodes.
    """
    queues: list[ReadOnlyQueue] = []
    if location.is_shared:
        server = _server(location)
        from relay.queue.postgres import Reader

        queues.append(Reader(server))
        stack.push_async_callback(queues[-1].close)
        return queues
    from relay.queue.sqlite.reader import StoppedQueue

    directory = Path(location.path)
    for path in (directory, *orphans(directory, WORKER_SPOOL, present=())):
        queues.append(await StoppedQueue.open(path))
        stack.push_async_callback(queues[-1].close)
    return queues


async def open_to_move(location: QueueLocation, *, make: bool) -> MovingQueue:
    """The queue, for messages that leave it or come to it. `make`: where there is none, too.
    `SpoolError` or OSError where it cannot be opened, or a relay uses its directory.
    """
    if location.is_shared:
        server = _server(location)
        from relay.queue.postgres import PostgresMove

        return await PostgresMove.open(server)
    from relay.queue.sqlite.move import SqliteMove

    return await SqliteMove.open(Path(location.path), workers=WORKER_SPOOL, make=make)


async def open_policies(location: QueueLocation) -> PolicyCache:
    """The policies of the relay whose first worker has its queue in `location`."""
    if location.is_shared:
        server = _server(location)
        from relay.queue.postgres import PostgresPolicyCache

        return PostgresPolicyCache(server)
    from relay.queue.sqlite.policies import SqlitePolicyCache

    return await SqlitePolicyCache.open(Path(location.path))


async def open_memory(location: QueueLocation) -> MemoryStore:
    """The downgrade memory of the relay whose first worker has its queue in `location`."""
    if location.is_shared:
        server = _server(location)
        from relay.queue.postgres import PostgresMemory

        return PostgresMemory(server)
    from relay.queue.sqlite.memory import SqliteMemory

    return await SqliteMemory.open(Path(location.path))


def open_policies_beside(location: QueueLocation) -> PolicyCache:
    """The policies, to be looked at: what is fetched is kept nowhere."""
    if location.is_shared:
        server = _server(location)
        from relay.queue.postgres import PoliciesToRead as SharedPoliciesToRead

        return SharedPoliciesToRead(server)
    from relay.queue.sqlite.policies import POLICIES, PoliciesToRead

    return PoliciesToRead(Path(location.path) / POLICIES)


def open_memory_beside(location: QueueLocation) -> MemoryStore:
    """The downgrade memory, to be looked at."""
    if location.is_shared:
        server = _server(location)
        from relay.queue.postgres import PostgresMemory

        return PostgresMemory(server)
    from relay.queue.sqlite.memory import MemoryToRead
    from relay.queue.sqlite.policies import POLICIES

    return MemoryToRead(Path(location.path) / POLICIES)


async def describe_server(location: QueueLocation) -> Mapping[str, str]:
    """What the server says of itself and of the tables. `SpoolError` where it cannot be used."""
    server = _server(location)
    from relay.queue.postgres import describe

    return await describe(server)


def holder(directory: Path) -> str:
    """Which process uses the queue in a directory; empty where none does."""
    from relay.queue.sqlite.disk import holder

    return holder(directory)


def orphans(directory: Path, prefix: str, *, present: Collection[str]) -> list[Path]:
    """The queues below a directory that begin with a prefix and have no worker; and those half
    adopted.
    """
    from relay.queue.sqlite.adopt import orphans

    return orphans(directory, prefix, present=present)
