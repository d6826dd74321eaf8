"""Opens a queue: the only place that knows which engine keeps it.

    open_store    the queue of this process, to work with
    open_beside   the queue of another worker, which is running or starting, to look at
    open_stopped  the queue of a relay that does not run, to look at
    open_policies the MTA-STS policies, which all workers share; `open_policies_beside` to look at
    open_memory   what hosts have shown of TLS, for all workers; `open_memory_beside` to look at
    holder        the process that uses a queue
    orphans       queues of workers that do not exist any more, which `open_store` takes over

Engines are imported when one is opened: `relay --help` needs none.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

from relay.queue.memory import MemoryStore
from relay.queue.policies import PolicyCache
from relay.queue.store import ReadOnlyQueue, Store

__all__ = [
    "WORKER_SPOOL",
    "holder",
    "open_beside",
    "open_memory",
    "open_memory_beside",
    "open_policies",
    "open_policies_beside",
    "open_stopped",
    "open_store",
    "orphans",
]

WORKER_SPOOL = "worker-"
"""How the directory of a further worker's queue begins, below that of the first."""


async def open_store(
    directory: Path, *, now: datetime, max_wait: timedelta, adopting: Collection[Path] = ()
) -> Store:
    """The queue in a directory, made where there is none. `SpoolError` or OSError where it cannot
    be.

    `max_wait`: the longest a recipient is ever deferred. `adopting`: what `orphans` found.
    """
    from relay.queue.sqlite import SqliteStore

    return await SqliteStore.open(directory, now=now, max_wait=max_wait, adopting=adopting)


def open_beside(directory: Path) -> ReadOnlyQueue:
    """The queue of another worker. It is opened with the first question."""
    from relay.queue.sqlite.reader import Reader

    return Reader.of(directory)


async def open_stopped(directory: Path) -> ReadOnlyQueue:
    """The queue of a relay that does not run. `SpoolError` where it is in use or is not there."""
    from relay.queue.sqlite import StoppedQueue

    return await StoppedQueue.open(directory)


async def open_policies(directory: Path) -> PolicyCache:
    """The policies of the relay whose first worker has its queue in `directory`."""
    from relay.queue.sqlite import SqlitePolicyCache

    return await SqlitePolicyCache.open(directory)


async def open_memory(directory: Path) -> MemoryStore:
    """The downgrade memory of the relay whose first worker has its queue in `directory`."""
    from relay.queue.sqlite import SqliteMemory

    return await SqliteMemory.open(directory)


def open_memory_beside(directory: Path) -> MemoryStore:
    """The downgrade memory, to be looked at."""
    from relay.queue.sqlite import POLICIES, MemoryToRead

    return MemoryToRead(directory / POLICIES)


def holder(directory: Path) -> str:
    """Which process uses the queue in a directory; empty where none does."""
    from relay.queue.sqlite.disk import holder

    return holder(directory)


def open_policies_beside(directory: Path) -> PolicyCache:
    """The policies, to be looked at: what is fetched is kept nowhere."""
    from relay.queue.sqlite import POLICIES, PoliciesToRead

    return PoliciesToRead(directory / POLICIES)


def orphans(directory: Path, prefix: str, *, present: Collection[str]) -> list[Path]:
    """The queues below a directory that begin with a prefix and have no worker; and those half
    adopted.
    """
    from relay.queue.sqlite import orphans

    return orphans(directory, prefix, present=present)
