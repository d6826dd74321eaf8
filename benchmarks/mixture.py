"""Recipients as a busy relay has them: some domains again and again, new ones all the time, hosts
that are slow, and hosts that are dead.

Each tenth message has its place, so that any stretch of numbers has the same shares.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["DEAD_ZONES", "KNOWN", "ZONES", "arriving", "recipient"]

KNOWN = 20
"""How many domains get mail again and again."""
ZONES = 20
"""The new domains are spread over so many zones; each zone has an address of its own."""
DEAD_ZONES = ("silent", "refused")


def recipient(number: int) -> str:
    """Of ten messages four go to known domains, four to new ones, one to a slow host, one to a dead
    host. Two messages in succession go to each new domain.
    """
    tenth, place = divmod(number, 10)
    if place < 4:
        return f"b@d{number % KNOWN}.known.example"
    if place < 8:
        new = 2 * tenth + (place - 4) // 2
        return f"b@n{new}.new{new % ZONES}.example"
    if place == 8:
        return f"b@s{tenth % KNOWN}.slow.example"
    return f"b@n{tenth}.{DEAD_ZONES[tenth % 2]}.example"


def arriving(numbers: Iterable[int]) -> int:
    """How many of these messages reach a host."""
    return sum(1 for one in map(_zone, numbers) if one not in DEAD_ZONES)


def _zone(number: int) -> str:
    return recipient(number).rpartition(".example")[0].rpartition(".")[2]
