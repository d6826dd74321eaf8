"""The nodes that share a queue and its database, as the operator sees them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

_LONG_SECONDS = 600.0


class NodeState(StrEnum):
    """Whether a node takes part."""

    LIVE = "live"
    """It has a lease. One that has just ended may still be renewed."""
    LOST = "lost"
    """Another node has taken its mail over."""
    LEFT = "left"
    """It ended, and gave everything back."""


class Node(NamedTuple):
    """`expires_seconds`: until the end of its lease, below 0 after it; None without one. `claims`:
    recipients that are being tried, or are on their way to it. `policy_digest`: of what it decides
    by.
    """

    name: str
    state: NodeState
    host: str = ""
    version: str = ""
    expires_seconds: float | None = None
    claims: int = 0
    policy_digest: str = ""


class DatabaseState(NamedTuple):
    """The database of a queue that several nodes share.

    `dead_rows`: rows that were removed and take room still. `oldest_xmin_age`: so many transactions
    have begun since the oldest one of which something is kept. `standby_lag_bytes`: of the one that
    is furthest behind. `unknown_commits`: since this node started.
    """

    live: int = 0
    lost: int = 0
    dead_rows: int = 0
    oldest_xmin_age: float = 0
    oldest_transaction_seconds: float = 0.0
    synchronous_standbys: int = 0
    asynchronous_standbys: int = 0
    standby_lag_bytes: int = 0
    unknown_commits: int = 0


class Holder(NamedTuple):
    """What keeps dead rows from being removed. `seconds`: for how long, where the database knows;
    `mark`: what it holds, so that it is the same as long as nothing moved.
    """

    name: str
    age: int
    seconds: float | None
    mark: str


class LongHolders:
    """Tells of what keeps dead rows for more than ten minutes; once of each."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], float] = {}
        self._told: set[tuple[str, str]] = set()

    def new_ones(self, holders: Iterable[Holder], now: float) -> list[tuple[str, float]]:
        """The names of those that are told now, and for how many seconds each has held on. `now`:
        seconds on any clock.
        """
        present = {(one.name, one.mark): one for one in holders}
        self._since = {key: self._since.get(key, now) for key in present}
        self._told &= present.keys()
        found = []
        for key, one in present.items():
            seconds = max(one.seconds or 0.0, now - self._since[key])
            if seconds > _LONG_SECONDS and key not in self._told:
                self._told.add(key)
                found.append((one.name, seconds))
        return found


def differing_policies(nodes: Iterable[Node]) -> list[str]:
    """The names of the live nodes, where they do not all decide by the same configuration."""
    live = [node for node in nodes if node.state is NodeState.LIVE]
    if len({node.policy_digest for node in live}) <= 1:
        return []
    return [node.name for node in live]
