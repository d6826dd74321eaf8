"""How a limit of a next hop is divided among those that share it, and when a message may begin.
Pure.

A limit (`max_connections`, `rate`) holds for all nodes and for all workers of a node together. A
node has its part of it (`relay.queue.division`). The workers of a node divide that part by what
each of them needs now (`divided`): a worker without mail lends its part to the others.

A `rate` is kept as the generic cell rate algorithm keeps it (ITU-T I.371): a message is due one
`interval` after the message before it, and may begin so much earlier that a pause saves up one
second's worth of messages. Where the unit is a minute or an hour, the interval is a little longer
than the rate says. So no minute (no hour) ever has more messages than were written, at the host
too, which some messages reach later than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from relay.route.next_hop import Rate

LATE_SECONDS = 2.0
"""How much later than another a message may reach the host: it may need a new connection first."""

_FORGIVEN_SECONDS = 0.5
"""How late a message may begin without delaying those after it: `LATE_SECONDS` has room for it."""

_ROUNDING = 1e-6


def divided(limit: int, wanted: Sequence[int], turn: int = 0) -> list[int]:
    """How many of `limit` each gets, by what each wants: no one more than it wants, and none less
    than an equal part as long as it wants it.

    What cannot be divided goes to others from turn to turn. The parts add up to the limit, or to
    less where less is wanted.
    """
    parts = [0] * len(wanted)
    left = limit
    while left > 0 and (hungry := [n for n, want in enumerate(wanted) if parts[n] < want]):
        each = left // len(hungry)
        if not each:
            first = turn % len(hungry)
            for n in (hungry[first:] + hungry[:first])[:left]:
                parts[n] += 1
            break
        for n in hungry:
            more = min(each, wanted[n] - parts[n])
            parts[n] += more
            left -= more
    return parts


@dataclass(frozen=True, slots=True)
class Spacing:
    """A rate as it is kept: `burst` messages at once after a pause, then one each `interval`
    seconds. Times are seconds of the monotonic clock, -inf for "never".
    """

    burst: int
    interval: float

    def begins_at(self, due: float) -> float:
        """When a message that is due at `due` may begin."""
        return due - (self.burst - 1) * self.interval - _ROUNDING

    def next_due(self, due: float, now: float) -> float:
        """When the message after it is due, if it begins now. One that begins a little late does
        not delay those after it.
        """
        is_late = now - due <= min(_FORGIVEN_SECONDS, self.interval / 2)
        return (due if is_late else now) + self.interval


def spacing(rate: Rate) -> Spacing:
    """How a rate is kept."""
    burst = max(1, int(rate.messages / rate.seconds))
    if rate.seconds <= 1:
        return Spacing(burst, rate.seconds / rate.messages)
    # In any stretch of `seconds` begin a burst and what is due in it: `messages` at most.
    return Spacing(burst, (rate.seconds + LATE_SECONDS) / (rate.messages - burst + 1))
