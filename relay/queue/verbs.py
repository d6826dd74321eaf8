"""What each of the operator's verbs does to a recipient. Pure.

    retry     tried at once, whatever was planned; held mail stays held
    hold      set aside until it is released
    release   as before the hold: never tried is QUEUED, else DEFERRED; due at once
    remove    final, without a report to the sender

A recipient that is being tried at this moment is left alone: what comes of the attempt stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from relay.queue.entry import State


class Verb(NamedTuple):
    """`takes`: the states it changes; `becomes`: the state then, and of a recipient that was never
    tried.

    None: the state stays. `is_due`: the recipient is due at once, else it is not due at all.
    """

    takes: tuple[State, ...]
    becomes: State | None
    untried_becomes: State | None
    is_due: bool


VERBS: Mapping[str, Verb] = {
    "retry": Verb((State.QUEUED, State.DEFERRED), None, None, is_due=True),
    "hold": Verb((State.QUEUED, State.DEFERRED), State.HELD, State.HELD, is_due=False),
    "release": Verb((State.HELD,), State.DEFERRED, State.QUEUED, is_due=True),
    "remove": Verb(
        (State.QUEUED, State.DEFERRED, State.HELD), State.REMOVED, State.REMOVED, is_due=False
    ),
}


@dataclass(slots=True)
class Changed:
    """What a verb did to some messages: the recipients it changed, and how many each state has
    more.
    """

    recipients: list[tuple[str, int]] = field(default_factory=list)
    states: Counter[State] = field(default_factory=Counter)
