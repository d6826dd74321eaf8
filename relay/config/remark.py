"""What is worth saying about a key that is legal by itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to say about a key. `is_fatal`: the relay does not start like this."""

    key: str
    problem: str
    cure: str
    is_fatal: bool = True
