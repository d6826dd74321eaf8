"""How the cost of work grows with its input, on a machine that is busy with other things."""

from __future__ import annotations

import time
from collections.abc import Callable

_TURNS = 5


def grows_linearly(work: Callable[[int], object], size: int) -> bool:
    """Whether ten times the size costs less than 40 times the processor time, in one turn at least.

    What grows with the square costs a hundred times as much, in each turn.
    """

    def seconds(size: int) -> float:
        began = time.process_time()
        work(size)
        return time.process_time() - began

    seconds(size // 100)
    return any(seconds(10 * size) < 40 * max(seconds(size), 0.0005) for _ in range(_TURNS))
