"""What is wrong in a configuration, said so that it can be put right: where, which key, what, the
cure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Location:
    """Where something was said: a line of the file, or a variable of the environment (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong: where, under which key, what, and what to do about it."""

    location: Location
    key: str
    problem: str
    cure: str

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        return f"{self.location}: {key}{self.problem}; {self.cure}"


class ConfigError(Exception):
    """The configuration cannot be used. `mistakes` has all of them, in the order of the file."""

    def __init__(self, mistakes: Collection[Mistake]) -> None:
        self.mistakes = tuple(
            sorted(
                mistakes, key=lambda mistake: (mistake.location.line == 0, mistake.location.line)
            )
        )
        super().__init__("\n".join(map(str, self.mistakes)))


def shown(text: str) -> str:
    """A value as a mistake quotes it: escaped, and no longer than a person wants to read."""
    quoted = ascii(text) if not text.isprintable() else f'"{text}"'
    return quoted if len(quoted) <= 80 else f'{quoted[:76]}…"'


def split(error: ValueError) -> tuple[str, str]:
    """A ValueError's "what is wrong; the cure" in its two parts."""
    problem, _, cure = str(error).partition("; ")
    return problem, cure or "correct it"
