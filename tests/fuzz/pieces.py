"""What several targets need."""

from __future__ import annotations

from collections.abc import Coroutine
from itertools import pairwise
from typing import Any, TypeVar

Result = TypeVar("Result")


def cut(octets: bytes, how: int) -> list[bytes]:
    """In pieces, as a network may; `how` 0: whole."""
    if not how:
        return [octets]
    marks = [0, *range(1 + how % 3, len(octets), 1 + how % 13), len(octets)]
    return [octets[a:b] for a, b in pairwise(marks)]


def run_at_once(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    raise AssertionError("it waits")
