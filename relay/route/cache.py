"""A cache with two limits: how long a value is valid, and how much is kept.

Each value has a weight (how many records it holds), so that a few domains with a thousand hosts
each cannot use more memory than intended. When the sum exceeds the limit, the value that was
not used for the longest time is removed. The caller passes the time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class ExpiringCache(Generic[V]):
    """Values by key, each until it expires, all together not heavier than `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weight = 0
        self._values: OrderedDict[str, tuple[float, int, V]] = OrderedDict()

    def get(self, key: str, *, now: float) -> V | None:
        """The value, if it is still valid."""
        kept = self._values.get(key)
        if kept is None:
            return None
        if kept[0] <= now:
            self._drop(key)
            return None
        self._values.move_to_end(key)
        return kept[2]

    def put(self, key: str, value: V, *, expires: float, weight: int = 1) -> None:
        """Keep a value until `expires`; remove others if there is no room."""
        self._drop(key)
        if weight > self._limit:
            return
        self._values[key] = (expires, weight, value)
        self._weight += weight
        while self._weight > self._limit:
            self._drop(next(iter(self._values)))

    def remove(self, key: str) -> None:
        """Forget one value, if it is there."""
        self._drop(key)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self._weight = 0

    def __len__(self) -> int:
        return len(self._values)

    def _drop(self, key: str) -> None:
        kept = self._values.pop(key, None)
        if kept is not None:
            self._weight -= kept[1]
