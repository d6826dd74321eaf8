"""When a deferred recipient is tried again, and when its message is too old.

RFC 5321 §4.5.4.1: a client that could not deliver waits and tries again, and gives
up after four to five days. The waits grow along `RetrySchedule.waits`, the last one
repeats, and the final attempt falls on the end of the lifetime. One falls on `warn_after`,
too: a sender is told then and not at the next attempt, which may be hours later, and the
domains of a message, which drift apart with each attempt, come to both moments together.

Age is told by the wall clock, since it has to survive a restart; but a wall clock
steps. What follows from that is decided here:

    the clock was set back             age is never negative; a message "from the future"
                                       is as old as its attempts say
    the clock was set forward,         a message that had few attempts is not given up: its
    or we were down for days           age counts only once the clock has run evenly for
                                       `SETTLING`, or the attempts made account for it
    an attempt is due too far ahead    `latest_due` says what no honest clock has written

So a jump of thirty days bounces nothing: each message is tried at once, and then along
its waits for a day more. `watch` tells since when the clock has run evenly. The price:
after a restart or a step, a message that is too old may stay a day longer.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import datetime, timedelta

from relay.mail.record import record

SETTLING = timedelta(days=1)
"""How long a clock has to run evenly before an age is believed that only this clock tells."""

_SLACK = 1.25
"""Waits stretch, by jitter and by queueing for a connection: attempts may account for this much
more.
"""

_STEP = timedelta(minutes=2)
"""How far wall clock and monotonic clock may part between two looks without it being a step."""

_NOTHING = timedelta(0)

_JITTER = 0.1
"""A wait is stretched by up to this part, so that what was deferred together does not come back
together.
"""

_LONGEST_REPORT_WINDOW = timedelta(minutes=4)
"""How far apart attempts may begin whose results are in one report. A report waits five minutes at
the most, so these attempts have a minute to end.
"""


@dataclass(frozen=True, slots=True)
class RetrySchedule:
    """`queue.retry`, `queue.lifetime` and `queue.warn_after` of the configuration.

    `waits[n]` follows attempt n+1, and the last one every attempt after. `warn_after`:
    the age at which the sender is told that delivery takes longer, None for never.
    """

    waits: tuple[timedelta, ...] = (
        timedelta(minutes=5),
        timedelta(minutes=10),
        timedelta(minutes=30),
        timedelta(hours=1),
        timedelta(hours=2),
        timedelta(hours=4),
    )
    lifetime: timedelta = timedelta(days=5)
    warn_after: timedelta | None = timedelta(hours=4)

    def __post_init__(self) -> None:
        if not self.waits:
            raise ValueError("a retry schedule needs at least one wait")
        if min(self.waits) <= _NOTHING:
            raise ValueError("a wait between two attempts has to be longer than nothing")
        if self.lifetime <= _NOTHING:
            raise ValueError("the lifetime of a message has to be longer than nothing")

    @property
    def report_window(self) -> timedelta:
        """How long after a result other attempts for its message may be due and still be reported
        with it.

        It is shorter than any wait: a report does not wait for a recipient that was just tried.
        """
        return min(_LONGEST_REPORT_WINDOW, min(self.waits) * 0.8)


def next_attempt(
    schedule: RetrySchedule,
    *,
    arrived: datetime,
    attempts: int,
    now: datetime,
    jitter: float = 0.0,
    steady_since: datetime | None = None,
) -> datetime | None:
    """When the next attempt is due, or None once the lifetime has passed.

    `attempts` have been made, the one just ended included: without one nothing expires.
    `jitter` stretches the wait by that part of it (-0.1 to 0.1 is 10 % either way), so that
    what was deferred together does not come back together. The final attempt falls on
    the end of the lifetime exactly, so that no message expires without a last try; and one
    falls on `warn_after`.
    """
    age = age_of(schedule, arrived=arrived, attempts=attempts, now=now, steady_since=steady_since)
    if age >= schedule.lifetime and attempts > 0:
        return None
    wait = schedule.waits[min(max(attempts, 1), len(schedule.waits)) - 1]
    wait *= 1 + min(max(jitter, -0.5), 0.5)
    if schedule.warn_after is not None and age < schedule.warn_after:
        wait = min(wait, schedule.warn_after - age)
    return now + min(wait, max(schedule.lifetime - age, _NOTHING))


def jitter_of(queue_id: str, attempts: int) -> float:
    """By what part the wait after an attempt is stretched: by chance, and the same for all its
    domains.

    So messages that were deferred together part, and the recipients of one message do not.
    """
    return _JITTER * zlib.crc32(f"{attempts} {queue_id}".encode()) / 2**32


def next_notification(
    schedule: RetrySchedule, *, arrived: datetime, now: datetime
) -> datetime | None:
    """When the sender of a message that waits untried may next have to be notified."""
    ages = (schedule.warn_after, schedule.lifetime)
    moments = (arrived + age for age in ages if age is not None)
    return min((moment for moment in moments if moment > now), default=None)


def age_of(
    schedule: RetrySchedule,
    *,
    arrived: datetime,
    attempts: int,
    now: datetime,
    steady_since: datetime | None = None,
) -> timedelta:
    """How old a message is, as far as clock and attempts together can be believed.

    `steady_since`: since when the clock has run evenly and under our eyes (`watch`); None
    believes the clock.
    """
    told = now - arrived
    if told < _NOTHING:
        return _waited(schedule, attempts)
    if steady_since is None or arrived >= steady_since or now - steady_since >= SETTLING:
        return told
    accounted = _waited(schedule, attempts) * _SLACK
    return min(told, max(accounted, now - steady_since))


def _waited(schedule: RetrySchedule, attempts: int) -> timedelta:
    """The time that so many attempts take when each is made as soon as it is due."""
    ended = max(attempts - 1, 0)
    beyond = max(ended - len(schedule.waits), 0)
    return sum(schedule.waits[:ended], _NOTHING) + schedule.waits[-1] * beyond


def latest_due(schedule: RetrySchedule, *, now: datetime) -> datetime:
    """The latest due time that a settlement at `now` can set.

    A deferred recipient due later was settled by a clock that was ahead, and is due at
    once: otherwise the queue would stand still until the clock gets there again. (One that
    was never tried may be due later: its sender may have asked for that.)
    """
    return now + max(schedule.waits) * _SLACK


@record(frozen=True, slots=True)
class ClockWatch:
    """One look at both clocks, and since when the wall clock has kept pace with the other."""

    steady_since: datetime
    wall: datetime
    monotonic: float


def watch(before: ClockWatch | None, *, wall: datetime, monotonic: float) -> ClockWatch:
    """Look at both clocks again. The first look, at the start, is where even time begins.

    Small differences are the clock being slewed. After a step, even time begins anew.
    """
    if before is None:
        return ClockWatch(wall, wall, monotonic)
    apart = (wall - before.wall) - timedelta(seconds=monotonic - before.monotonic)
    since = before.steady_since if abs(apart) <= _STEP else wall
    return ClockWatch(since, wall, monotonic)
