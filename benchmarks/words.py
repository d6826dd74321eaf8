"""The words of `make bench ARGS="…"`: what is measured, and how much of it.

(nothing)        the relay beside a Postfix, all scenarios
against=COMMIT   the same, with that commit of the relay beside them
quick            of either of these, only the main scenarios
nodes            several nodes on one PostgreSQL
million          a queue of a million messages beside an empty one (some minutes, 2 GB of disk)
minutes=N        how long it may take, of all but `million`
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["Measurement", "Words", "read_words"]


class Measurement(StrEnum):
    """What is measured."""

    POSTFIX = "postfix"
    BEFORE = "against"
    PEERS = "peers"
    NODES = "nodes"
    MILLION = "million"
    SOAK = "soak"


_WITHOUT_VALUE = {
    "quick",
    Measurement.PEERS,
    Measurement.NODES,
    Measurement.MILLION,
    Measurement.SOAK,
}
_WITH_VALUE = {Measurement.BEFORE, "minutes"}
_QUICK = {Measurement.POSTFIX, Measurement.BEFORE}


@dataclass(frozen=True)
class Words:
    """`commit`: of the relay that is compared with this one. `minutes`: None for the usual time."""

    measurement: Measurement = Measurement.POSTFIX
    is_quick: bool = False
    commit: str = ""
    minutes: float | None = None


def read_words(words: Iterable[str]) -> Words:
    """What the words ask for; ValueError, in the user's words, where they cannot be kept."""
    read = Words()
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in (_WITH_VALUE if has_value else _WITHOUT_VALUE):
            values = ", ".join(f"{one}=…" for one in sorted(_WITH_VALUE))
            known = ", ".join(sorted(_WITHOUT_VALUE))
            raise ValueError(f"{word}: unknown; write one of {known}, {values}")
        if name == "quick":
            read = replace(read, is_quick=True)
        elif name == "minutes":
            read = replace(read, minutes=_minutes(word, value))
        else:
            if read.measurement is not Measurement.POSTFIX:
                raise ValueError(f"{word}: not together with {read.measurement}; run one at a time")
            read = replace(read, measurement=Measurement(name), commit=value)
    if read.measurement is Measurement.BEFORE and not read.commit:
        raise ValueError("against=: write the commit behind it, as in against=HEAD~10")
    if read.is_quick and read.measurement not in _QUICK:
        raise ValueError(f"quick: not together with {read.measurement}; leave one of them out")
    if read.minutes is not None and read.measurement is Measurement.MILLION:
        raise ValueError("minutes=: not together with million, which measures all of it")
    return read


def _minutes(word: str, value: str) -> float:
    try:
        minutes = float(value)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise ValueError(f"{word}: write a number of minutes, as in minutes=20")
    return minutes
