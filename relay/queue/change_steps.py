"""The steps of an operator's verb: which messages each is about, and their events.

A step is found by the reader and written by the writer. `ChangeSteps` has the reader find the next
step while the writer has the one before it, so that a verb on many messages takes as long as the
slower of the two and not as both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from relay.mail.event import Event
from relay.queue.store import EventOfChange, QueueFilter
from relay.queue.verbs import Changed

_STEP = 500


class WantedStep(NamedTuple):
    """A step is looked for: what the verb is about, and behind which message the step begins."""

    wanted: QueueFilter
    now: datetime
    event_of: EventOfChange | None
    after: str


class FoundStep(NamedTuple):
    """The messages of a step, and the events of their recipients by queue id and index. `until`:
    where the next step begins, None at the end.
    """

    ids: Sequence[str]
    until: str | None
    events: Mapping[tuple[str, int], Event]


class NamedChange(NamedTuple):
    """A verb on the messages that a filter names, and the events of their recipients."""

    wanted: QueueFilter
    verb: str
    now: datetime
    events: Mapping[tuple[str, int], Event]

    def events_of(self, changed: Changed) -> list[Event]:
        """The events of the recipients that were changed."""
        return [self.events[key] for key in changed.recipients if key in self.events]


class MessageFinder(Protocol):
    """The part of an engine's reader that finds them."""

    async def find_change(self, step: WantedStep, limit: int) -> FoundStep:
        """A step of at most `limit` messages; it has none only at the end of the queue."""


class ChangeSteps:
    """Finds steps, and at most one of them before it is asked for."""

    def __init__(self, reader: MessageFinder) -> None:
        self._reader = reader
        self._ahead: tuple[WantedStep, asyncio.Task[FoundStep]] | None = None

    async def find(self, step: WantedStep) -> FoundStep:
        """The step that is asked for. The one behind it is looked for from now on.

        The writer looks at each recipient again, so that what became of one meanwhile stands.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            found = await ahead[1]
        else:
            if ahead is not None:
                ahead[1].cancel()
            found = await self._find(step)
        if found.until is not None:
            self._look_for(step._replace(after=found.until))
        return found

    def forget(self) -> None:
        """Nobody asks any more."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._ahead = None

    def _look_for(self, step: WantedStep) -> None:
        self.forget()
        task = asyncio.create_task(self._find(step), name="next step of a verb")
        # If nobody asks for it, nobody has to hear of its failure.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._ahead = step, task

    async def _find(self, step: WantedStep) -> FoundStep:
        return await self._reader.find_change(step, _STEP)
