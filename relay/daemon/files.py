"""How many files may be open, and what that leaves for clients and deliveries.

Each connection is an open file, and so is a large message while it comes in or is delivered, a
query, the queue and the logs. Where the system allows fewer than the configuration needs,
connections give way: without a descriptor left, queue and log could not be opened either, and that
is worse than a 421.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

RESERVED = 90
"""Queue, logs, control socket, listeners, policies being fetched, the loop itself, and room for
what opens a file briefly.
"""


@dataclass(frozen=True, slots=True)
class FileBudget:
    """How many descriptors each may use; `http`: its connections. `is_short`: less than was asked
    for.
    """

    clients: int
    deliveries: int
    queries: int
    is_short: bool
    http: int = 0


def files_needed(*, clients: int, deliveries: int, queries: int, http: int = 0) -> int:
    """How many files are open at most; each client may be sending a large message, and each
    delivery may be about one.
    """
    return 2 * clients + 2 * deliveries + queries + http + RESERVED


def budget(limit: int, *, clients: int, deliveries: int, queries: int, http: int = 0) -> FileBudget:
    """Divide a limit in the proportions that were asked for."""
    wanted = (
        files_needed(clients=clients, deliveries=deliveries, queries=queries, http=http) - RESERVED
    )
    free = max(limit - RESERVED, 5)
    if wanted <= free:
        return FileBudget(clients, deliveries, queries, is_short=False, http=http)

    def share(count: int) -> int:
        return max(count * free // wanted, min(count, 1))

    return FileBudget(
        share(clients), share(deliveries), share(queries), is_short=True, http=share(http)
    )


def raise_limit(wanted: int) -> int:
    """Raise this process's soft limit to what is wanted, as far as the hard one lets us; the limit
    now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (ValueError, OSError):
        return soft
    return target
