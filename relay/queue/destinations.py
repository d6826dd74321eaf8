"""The queue by destination: how much waits for each recipient domain, and its latest answer. Pure.

A queue may hold millions, so an engine counts it in steps (`QueueView.count_destinations`), and
`DestinationTally` adds the steps up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

LastResult = tuple[int, int, str, str, str]
"""Of an attempt: time in whole microseconds, code, status, message, host."""


class DestinationPart(NamedTuple):
    """The recipients of one domain within a step. `oldest`: a queue id; `due` in whole
    microseconds; `last`: of the latest attempt.
    """

    domain: str
    queued: int
    deferred: int
    held: int
    trying: int
    oldest: str
    due: int | None
    last: LastResult | None


@dataclass(slots=True)
class QueuedDestination:
    """All of a domain's recipients in the queue. `queued`, `deferred` and `held` are their states;
    `trying` of the first two are being tried.
    """

    domain: str
    queued: int = 0
    deferred: int = 0
    held: int = 0
    trying: int = 0
    oldest: str = ""
    due: int | None = None
    last: LastResult | None = None

    @property
    def total(self) -> int:
        """All that is not done."""
        return self.queued + self.deferred + self.held

    def add(self, part: DestinationPart) -> None:
        """Count a part of it."""
        self.queued += part.queued
        self.deferred += part.deferred
        self.held += part.held
        self.trying += part.trying
        self.oldest = min(filter(None, (self.oldest, part.oldest)), default="")
        self.due = min((at for at in (self.due, part.due) if at is not None), default=None)
        if part.last is not None and (self.last is None or part.last[0] > self.last[0]):
            self.last = part.last


class DestinationTally:
    """Adds up the steps."""

    def __init__(self) -> None:
        self._found: dict[str, QueuedDestination] = {}

    def add(self, parts: Iterable[DestinationPart]) -> None:
        """Count one step."""
        for part in parts:
            one = self._found.get(part.domain)
            if one is None:
                one = self._found[part.domain] = QueuedDestination(part.domain)
            one.add(part)

    @property
    def destinations(self) -> list[QueuedDestination]:
        """Those with deferred mail first, the most of it before."""
        return sorted(self._found.values(), key=lambda one: (-one.deferred, -one.total, one.domain))


def last_result(text: str | None) -> LastResult | None:
    """Of the last attempt, as JSON (`relay.queue.rows.recipient_data`); None if it is damaged."""
    if text is not None:
        with suppress(ValueError, TypeError):
            at, code, status, message, host, *_ = json.loads(text)
            return at, code, status, message, host
    return None
