"""How many attempts a destination gets at once, and when it gets none.

A destination here is a recipient domain; `relay.deliver.destinations` counts the connections to
each address beside it. What a domain gets depends on how it answered:

    the domain is new               a few attempts at once, one more for each that is answered
    its hosts answer                up to `concurrency_per_destination`
    its hosts do not answer         none for a time, which doubles with each silence in a row
    that time is over               one attempt as a test; an answer ends the silence
    few slots are left in all       one attempt: the last slots are for destinations without one

A quarter of all slots is reserved for domains that answered recently and at once ("proven"). All
other domains, and every attempt that takes longer than `LONG`, share the rest. So any number of
silent or slow hosts and name servers does not delay mail to a healthy host. Messages to more than
`MANY` other domains may use half of that rest, so that such a message does not delay mail to a new
domain.

Every reply is an answer, a refusal too: it shows that the host is there, and the retry schedule of
the message decides what follows. Silence means that no host could be reached, or that no name
server named the hosts: no message can change that.

A message that is due while its destination is silent waits for the end of the silence, without an
attempt. It is settled only when its sender is to be notified (of a delay, or of the end), with the
outcome that other mail for its destination had within the hour: with thousands queued for a dead
host, one more attempt for each would take longer than their lifetime. (Postfix's dead-site back-off
defers all of them that way.)
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from relay.mail.outcome import Code, Deferred, Outcome
from relay.mail.record import record, replace
from relay.queue.retry import RetrySchedule
from relay.queue.settle import Settlement

INITIAL_WINDOW = 5
"""Attempts at once at a new destination."""

LONGEST_SILENCE = timedelta(hours=1)

_SILENCE_OF_HOPS = timedelta(seconds=15), timedelta(minutes=5)
"""How long a next hop gets no attempts after its first silence, and at most."""

MANY = 20

LONG = timedelta(seconds=5)
"""An attempt that takes longer proves nothing of its destination."""


@record(frozen=True, slots=True)
class Pace:
    """The facts about one destination.

    `window`: how many attempts it may get at once. `silences`: how often in a row it did not
    answer, last at `silent_since`; it gets no attempt until `suspended_until`. `silence`: the
    outcome of its last silence.
    """

    in_flight: int = 0
    window: int = INITIAL_WINDOW
    answered_at: datetime | None = None
    silences: int = 0
    silent_since: datetime | None = None
    suspended_until: datetime | None = None
    silence: Deferred | None = None


NEW = Pace()


def room(pace: Pace, *, most: int, now: datetime, is_crowded: bool = False) -> int:
    """How many more attempts may begin at once; `most` is `concurrency_per_destination`."""
    if pace.suspended_until is not None and now < pace.suspended_until:
        return 0
    window = 1 if pace.silences or is_crowded else min(pace.window, most)
    return max(window - pace.in_flight, 0)


def is_crowded(in_flight: int, *, concurrency: int, most: int) -> bool:
    """Whether the attempts under way leave only the slots kept for destinations that have none.

    A quarter is kept, so that a handful of destinations that hang cannot take every slot.
    """
    kept = max(min(concurrency // 4, concurrency - most), 0)
    return in_flight >= concurrency - kept


def unproven_slots(concurrency: int) -> int:
    """How many of all slots there are for domains that are not proven, once others are."""
    return concurrency - concurrency // 4


def bulk_slots(concurrency: int) -> int:
    """How many of those there are for messages to very many domains.

    No more than there are look-ups for names that are not well (`relay.route.dns`): one more name
    does not wait there behind all others.
    """
    return max(1, min(concurrency * 3 // 8, 75))


def is_suspended(pace: Pace, *, now: datetime) -> bool:
    """Whether the destination is not to be tried for now."""
    return pace.suspended_until is not None and now < pace.suspended_until


def began(pace: Pace) -> Pace:
    """An attempt begins."""
    return replace(pace, in_flight=pace.in_flight + 1)


def broken_off(pace: Pace) -> Pace:
    """An attempt ended without telling anything about the destination."""
    return replace(pace, in_flight=pace.in_flight - 1)


def answered(pace: Pace, *, most: int, now: datetime) -> Pace:
    """An attempt ended with an answer of the destination."""
    return Pace(in_flight=pace.in_flight - 1, window=min(pace.window + 1, most), answered_at=now)


def unanswered(
    pace: Pace, silence: Deferred, *, begun: datetime, now: datetime, schedule: RetrySchedule
) -> Pace:
    """An attempt, begun at `begun`, ended in silence.

    An attempt that began before the last silence was noted is part of that silence and does not
    count; neither does one that began before the last answer.
    """
    ended = broken_off(pace)
    if any(noted is not None and begun <= noted for noted in (pace.silent_since, pace.answered_at)):
        return ended
    silences = pace.silences + 1
    return Pace(
        in_flight=ended.in_flight,
        silences=silences,
        silent_since=now,
        suspended_until=now + back_off(silences, schedule),
        silence=silence,
    )


def learned(
    pace: Pace,
    outcomes: Collection[Outcome],
    *,
    begun: datetime,
    now: datetime,
    most: int,
    schedule: RetrySchedule,
) -> Pace:
    """The pace after an attempt with these outcomes; unchanged without outcomes."""
    if all(map(_is_our_trouble, outcomes)):
        return broken_off(pace)
    silence = silence_in(outcomes)
    if silence is None:
        return answered(pace, most=most, now=now)
    return unanswered(pace, silence, begun=begun, now=now, schedule=schedule)


def back_off(silences: int, schedule: RetrySchedule) -> timedelta:
    """How long a destination gets no attempts after so many silences in a row.

    It begins with the first wait of the retry schedule, and is never longer than its longest.
    """
    longest = min(LONGEST_SILENCE, max(schedule.waits))
    return min(schedule.waits[0] * (1 << min(silences - 1, 20)), longest)


def schedule_of_hops(schedule: RetrySchedule) -> RetrySchedule:
    """The schedule by which a silent next hop of the operator's is left alone: all mail may wait
    for it, and its operator watches it.
    """
    first, longest = (min(wait, max(schedule.waits)) for wait in _SILENCE_OF_HOPS)
    return replace(schedule, waits=(min(first, schedule.waits[0]), longest))


def silence_in(outcomes: Collection[Outcome]) -> Deferred | None:
    """The outcome that shows that a destination did not answer; None if it answered in any way."""
    silence: Deferred | None = None
    for outcome in outcomes:
        if not isinstance(outcome, Deferred) or outcome.tls_unmet or outcome.in_doubt:
            return None
        # RFC 3463 §3.5: X.4.3 is a directory server failure, the DNS here.
        if outcome.code != Code.NO_CONNECTION and not (
            outcome.session is None and outcome.status == "4.4.3"
        ):
            return None
        silence = silence or outcome
    return silence


def _is_our_trouble(outcome: Outcome) -> bool:
    """Whether an outcome is the relay's own trouble: X.3 without a session (RFC 3463 §3.4)."""
    return (
        isinstance(outcome, Deferred)
        and outcome.session is None
        and outcome.status.startswith("4.3.")
    )


def untried(pace: Pace, silence: Deferred) -> Deferred:
    """The outcome of a message that was not tried, in words that say so."""
    since = f"{pace.silent_since:%Y-%m-%d %H:%M:%S} UTC" if pace.silent_since else "a moment ago"
    return replace(
        silence, description=f"not tried: no answer since {since}: {silence.description}"
    )


def cannot_wait(settlement: Settlement) -> bool:
    """Whether a message for a silent destination is settled now: it ends, or its sender is to be
    notified.
    """
    is_reported = bool(settlement.reports or settlement.pending)
    return is_reported or any(change.recipient.state.is_final for change in settlement.changes)
