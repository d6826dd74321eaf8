"""How many attempts a destination gets, after what it answered."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.deliver import pacing
from relay.deliver.pacing import NEW, Pace
from relay.mail.outcome import Bounced, Code, Deferred, Delivered, HopSession
from relay.queue.retry import RetrySchedule

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SCHEDULE = RetrySchedule(waits=(5 * MINUTE, 10 * MINUTE, 240 * MINUTE))
SILENCE = Deferred("4.4.1", Code.NO_CONNECTION, "", "mx.b.example [192.0.2.1]: timed out")
SESSION = HopSession("mx.b.example", "192.0.2.1", tls=False)


def silent(pace: Pace, *, at: datetime = NOW, begun: datetime | None = None) -> Pace:
    begun = at - MINUTE / 2 if begun is None else begun
    return pacing.unanswered(pacing.began(pace), SILENCE, begun=begun, now=at, schedule=SCHEDULE)


def test_a_new_destination_gets_a_few_attempts_and_one_more_for_each_answer():
    pace = NEW
    assert pacing.room(pace, most=20, now=NOW) == 5
    assert pacing.room(pace, most=3, now=NOW) == 3
    pace = pacing.began(pacing.began(pace))
    assert pacing.room(pace, most=20, now=NOW) == 3
    pace = pacing.answered(pace, most=20, now=NOW)
    assert pacing.room(pace, most=20, now=NOW) == 5
    for _ in range(40):
        pace = pacing.answered(pacing.began(pace), most=20, now=NOW)
    assert pacing.room(pace, most=20, now=NOW) == 19


def test_a_silent_destination_gets_nothing_until_the_silence_ends_and_then_one_attempt():
    pace = silent(NEW)
    assert pacing.room(pace, most=20, now=NOW) == 0
    assert pacing.room(pace, most=20, now=NOW + 5 * MINUTE - MINUTE / 60) == 0
    assert pacing.room(pace, most=20, now=NOW + 5 * MINUTE) == 1
    assert pacing.room(pacing.began(pace), most=20, now=NOW + 5 * MINUTE) == 0


def test_a_silence_doubles_from_the_first_wait_and_is_at_most_an_hour():
    pace, at, waits = NEW, NOW, []
    for _ in range(7):
        pace = silent(pace, at=at)
        assert pace.suspended_until is not None
        waits.append((pace.suspended_until - at) / MINUTE)
        at = pace.suspended_until + MINUTE
    assert waits == [5, 10, 20, 40, 60, 60, 60]
    short = RetrySchedule(waits=(timedelta(seconds=2), timedelta(seconds=3)))
    assert pacing.back_off(1, short) == timedelta(seconds=2)
    assert pacing.back_off(10**9, short) == timedelta(seconds=3)


def test_attempts_that_began_together_are_one_silence():
    pace = Pace(in_flight=20, window=20)
    for second in range(20):
        at = NOW + timedelta(seconds=second)
        pace = pacing.unanswered(pace, SILENCE, begun=NOW - MINUTE, now=at, schedule=SCHEDULE)
    assert (pace.in_flight, pace.silences) == (0, 1)
    assert pace.suspended_until == NOW + 5 * MINUTE


def test_silence_does_not_count_where_the_destination_has_answered_since():
    pace = pacing.answered(Pace(in_flight=2), most=20, now=NOW)
    pace = pacing.unanswered(pace, SILENCE, begun=NOW - MINUTE, now=NOW + MINUTE, schedule=SCHEDULE)
    assert not pacing.is_suspended(pace, now=NOW + MINUTE)
    assert pace.in_flight == 0


def test_the_last_slots_are_for_destinations_that_have_none():
    busy = Pace(in_flight=3, window=20)
    assert not pacing.is_crowded(149, concurrency=200, most=20)
    assert pacing.is_crowded(150, concurrency=200, most=20)
    assert not pacing.is_crowded(
        19, concurrency=20, most=20
    )  # one destination may take all there is
    assert pacing.room(busy, most=20, now=NOW) == 17
    assert pacing.room(busy, most=20, now=NOW, is_crowded=True) == 0
    assert pacing.room(NEW, most=20, now=NOW, is_crowded=True) == 1


def test_an_answer_ends_the_silence():
    pace = silent(silent(NEW), at=NOW + 6 * MINUTE)
    assert pace.silences == 2
    pace = pacing.answered(pacing.began(pace), most=20, now=NOW + 30 * MINUTE)
    assert pacing.room(pace, most=20, now=NOW + 30 * MINUTE) > 1
    assert silent(pace, at=NOW + 40 * MINUTE).suspended_until == NOW + 45 * MINUTE


OURS = Deferred("4.3.0", Code.NONE, "", "internal trouble")
BUSY = Deferred("4.3.2", 421, "shutting down", session=SESSION)


@pytest.mark.parametrize(
    ("outcomes", "silences"),
    [
        ([SILENCE], 2),
        ([SILENCE, SILENCE], 2),
        ([OURS], 1),
        ([], 1),
        ([OURS, BUSY], 0),
        ([BUSY], 0),
        ([SILENCE, BUSY], 0),
    ],
)
def test_result_of_an_attempt_shows_whether_a_destination_is_silent(outcomes, silences):
    pace = pacing.began(silent(NEW))
    begun, now = NOW + 6 * MINUTE, NOW + 7 * MINUTE
    after = pacing.learned(pace, outcomes, begun=begun, now=now, most=20, schedule=SCHEDULE)
    assert (after.in_flight, after.silences) == (0, silences)


@pytest.mark.parametrize(
    ("outcomes", "is_silent"),
    [
        ([SILENCE], True),
        ([SILENCE, SILENCE], True),
        ([Deferred("4.4.2", Code.NO_CONNECTION, "", "no greeting")], True),
        ([Deferred("4.4.3", Code.NO_USABLE_MX, "", "MX lookup: SERVFAIL")], True),
        ([], False),
        ([Deferred("4.2.1", 450, "busy", session=SESSION)], False),
        ([Deferred("4.7.0", 421, "too many connections")], False),
        ([Deferred("4.4.2", Code.NONE, "", "lost in DATA", SESSION)], False),
        ([Deferred("4.4.2", Code.NONE, "", "after the dot", SESSION, in_doubt=True)], False),
        ([Deferred("4.7.4", Code.NONE, "", "no TLS", tls_unmet=True)], False),
        ([Deferred("4.7.5", Code.NO_CONNECTION, "", "no TLS", tls_unmet=True)], False),
        ([Deferred("4.3.0", Code.NONE, "", "internal trouble")], False),
        ([Deferred("4.3.5", Code.NONE, "", "password file")], False),
        ([Delivered("2.0.0", 250, "OK", session=SESSION)], False),
        ([Bounced("5.1.1", 550, "no such user", session=SESSION)], False),
        ([Bounced("5.1.2", Code.NO_USABLE_MX, "", "no such domain")], False),
        ([SILENCE, Deferred("4.2.1", 450, "busy", session=SESSION)], False),
    ],
)
def test_only_a_failure_that_no_message_causes_is_silence(outcomes, is_silent):
    assert (pacing.silence_in(outcomes) is not None) is is_silent


def test_a_message_that_was_not_tried_says_so():
    outcome = pacing.untried(silent(NEW), SILENCE)
    assert outcome.description == (
        "not tried: no answer since 2026-03-01 12:00:00 UTC: mx.b.example [192.0.2.1]: timed out"
    )
    assert replace(outcome, description=SILENCE.description) == SILENCE


ENDS = st.lists(
    st.tuples(st.sampled_from(["answered", "silent", "broken off"]), st.integers(0, 4000)),
    max_size=30,
)


@given(ENDS)
def test_destination_always_gets_a_turn_again_and_never_more_than_its_share(ends):
    pace, at = NEW, NOW
    for end, seconds in ends:
        begun = at
        at += timedelta(seconds=seconds)
        free = pacing.room(pace, most=8, now=begun)
        assert 0 <= pace.in_flight + free <= 8
        if not free:
            continue
        pace = pacing.began(pace)
        if end == "answered":
            pace = pacing.answered(pace, most=8, now=at)
        elif end == "silent":
            pace = pacing.unanswered(pace, SILENCE, begun=begun, now=at, schedule=SCHEDULE)
        else:
            pace = pacing.broken_off(pace)
        assert pace.in_flight == 0
    assert pacing.room(pace, most=8, now=at + pacing.LONGEST_SILENCE) >= 1
