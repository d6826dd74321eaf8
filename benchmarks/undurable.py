"""The relay without a sync at its commits: `python -m benchmarks.undurable serve …`.

The difference to the relay shows what durability costs. The relay itself has no such option.
"""

from __future__ import annotations

import functools

from relay.cli import main
from relay.queue.sqlite.store import SqliteStore

if __name__ == "__main__":
    SqliteStore.open = functools.partial(SqliteStore.open, synchronous="OFF")  # type: ignore[method-assign]
    main()
