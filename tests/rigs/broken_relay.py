"""The relay with one fault of our own making: what the tests of durability must be able to see.

    python -m tests.rigs.broken_relay FAULT serve -c FILE

A test that cannot tell such a relay from a good one is blind. The product itself has no switch for
any of this.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import Any

from relay.cli import main
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage

_under_way: set[asyncio.Task[None]] = set()


def _reply_first() -> None:
    """250 goes out, and then the message is committed."""
    accept = SqliteStore.accept

    async def hasty(self: SqliteStore, new: NewMessage) -> None:
        task = asyncio.create_task(_later(accept(self, new)))
        _under_way.add(task)
        task.add_done_callback(_under_way.discard)

    SqliteStore.accept = hasty  # type: ignore[method-assign,assignment]


async def _later(work: Any) -> None:
    await asyncio.sleep(0.01)
    await work


def _never_sync() -> None:
    """Commits are handed to the operating system and not to the disk."""
    SqliteStore.open = functools.partial(SqliteStore.open, synchronous="OFF")  # type: ignore[method-assign]


_FAULTS = {"reply-first": _reply_first, "never-sync": _never_sync}

if __name__ == "__main__":
    _FAULTS[sys.argv.pop(1)]()
    main()
