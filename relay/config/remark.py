"""What is worth saying about a key that is legal by itself, and the files that keys name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Remark", "unreadable"]


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to say about a key. `is_fatal`: the relay does not start like this."""

    key: str
    problem: str
    cure: str
    is_fatal: bool = True


def unreadable(path: str) -> str | None:
    """Why a file cannot be read; None where it can."""
    try:
        with open(path, "rb"):
            return None
    except OSError as error:
        return error.strerror or str(error)
