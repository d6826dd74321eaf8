"""When a recipient is due, where it stands until then, and what is known of that without a look.
Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from enum import IntEnum

from relay.queue.entry import QueuedMessage, QueuedRecipient, State

_LONGEST_POSTPONED = timedelta(days=8)
"""A sender may ask for a delivery some days ahead, and no further: see `latest_wish`."""


class Place(IntEnum):
    """Where a recipient stands. An engine keeps the number, and finds what is WAITING or READY
    fast.
    """

    WAITING = 0
    """Not due yet."""
    READY = 1
    """Due."""
    CLAIMED = 2
    """Given to an attempt, or to the hand-off; after a crash it is READY."""
    ASIDE = 3
    """Final, held, or damaged."""
    LEAVING = 4
    """On its way to another queue: nothing but the export touches it (`relay.queue.move`)."""


def is_due_at_once(message: QueuedMessage, one: QueuedRecipient) -> bool:
    """Whether a recipient of a new message is due when the message is accepted."""
    return one.state is State.QUEUED and (
        one.next_attempt is None or one.next_attempt <= message.arrived
    )


def first_place(message: QueuedMessage, one: QueuedRecipient) -> tuple[Place, datetime | None]:
    """The place of a recipient of a new message, and when it is due."""
    if is_due_at_once(message, one):
        return Place.READY, message.arrived
    return settled_place(one, message.arrived)


def settled_place(one: QueuedRecipient, at: datetime) -> tuple[Place, datetime | None]:
    """The place of a recipient that an attempt has left, and when it is due; `at` if nothing says
    when.
    """
    if one.state.is_final or one.state is State.HELD:
        return Place.ASIDE, None
    return Place.WAITING, one.next_attempt or at


def latest_wish(now: datetime, latest: datetime) -> datetime:
    """The latest delivery that a sender can ask for; a later one comes of a clock ahead."""
    return max(latest, now + _LONGEST_POSTPONED)


class DueHint:
    """What is known about when something in the store is due, so that the store is not asked in
    vain.

    `due` is no later than the truth for all domains outside `skip`; for a caller that skips fewer
    domains it says nothing.
    """

    __slots__ = ("_changes", "due", "is_known", "skip")

    def __init__(self) -> None:
        self.due: datetime | None = None
        self.skip: frozenset[str] = frozenset()
        self.is_known = False
        self._changes = 0

    def is_about(self, skip: Collection[str]) -> bool:
        """Whether this is the answer for a caller that skips just these domains."""
        return self.is_known and self.skip == frozenset(skip)

    def may_be_due(self, now: datetime, skip: Collection[str]) -> bool:
        """Whether the store has to be asked."""
        if not (self.is_known and self.skip.issubset(skip)):
            return True
        return self.due is not None and self.due <= now

    def now(self) -> None:
        """Something may be due at any moment."""
        self.is_known = False
        self._changes += 1

    def sooner(self, due: datetime, domain: str) -> None:
        """A recipient of `domain` is due at `due`."""
        self._changes += 1
        if domain not in self.skip and (self.due is None or due < self.due):
            self.due = due

    def begin(self) -> int:
        """Returns a mark for `learn`: a change between the two calls makes the answer old."""
        return self._changes

    def learn(self, begun: int, due: datetime | None, skip: Collection[str]) -> None:
        """The store has said when the next recipient outside `skip` is due."""
        if begun == self._changes:
            self.due, self.skip, self.is_known = due, frozenset(skip), True
