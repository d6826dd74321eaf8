"""The nodes that share a queue, as the operator sees them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

__all__ = ["Node", "NodeState", "differing_policies"]


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


def differing_policies(nodes: Iterable[Node]) -> list[str]:
    """The names of the live nodes, where they do not all decide by the same configuration."""
    live = [node for node in nodes if node.state is NodeState.LIVE]
    if len({node.policy_digest for node in live}) <= 1:
        return []
    return [node.name for node in live]
