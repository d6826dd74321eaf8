"""How many files may be open, and what that leaves for clients and deliveries.

Each connection is an open file, and so are queries, the queue and the logs. Where the
system allows fewer than the configuration needs, connections give way: without a
descriptor left, queue and log could not be opened either, and that is worse than a 421.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

__all__ = ["FileBudget", "budget", "raise_limit"]

RESERVED = 64
"""Queue, logs, control socket, listeners, the loop itself, and room for what opens a file briefly."""


@dataclass(frozen=True, slots=True)
class FileBudget:
    """How many descriptors each may use; `http`: its connections. `is_short`: less than was asked for."""

    clients: int
    deliveries: int
    queries: int
    is_short: bool
    http: int = 0


def budget(limit: int, *, clients: int, deliveries: int, queries: int, http: int = 0) -> FileBudget:
    """Divide a limit in the proportions that were asked for."""
    wanted = clients + deliveries + queries + http
    free = max(limit - RESERVED, 4)
    if wanted <= free:
        return FileBudget(clients, deliveries, queries, is_short=False, http=http)

    def share(count: int) -> int:
        return max(count * free // wanted, min(count, 1))

    return FileBudget(share(clients), share(deliveries), share(queries), is_short=True, http=share(http))


def raise_limit(wanted: int) -> int:
    """Raise this process's soft limit to what is wanted, as far as the hard one lets us; the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (ValueError, OSError):
        return soft
    return target
