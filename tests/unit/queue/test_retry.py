"""When a deferred message is tried again, and when it is given up."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.queue.retry import (
    SETTLING,
    RetrySchedule,
    age_of,
    jitter_of,
    latest_due,
    next_attempt,
    next_notification,
    watch,
)

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SCHEDULE = RetrySchedule()


def due(attempts, *, age, jitter=0.0, steady_for=None, schedule=SCHEDULE):
    """How long after `age` the next attempt is due."""
    now = NOON + age
    at = next_attempt(
        schedule,
        arrived=NOON,
        attempts=attempts,
        now=now,
        jitter=jitter,
        steady_since=now - steady_for if steady_for is not None else None,
    )
    return None if at is None else at - now


@pytest.mark.parametrize(
    ("attempts", "wait"),
    [
        (1, 5 * MINUTE),
        (2, 10 * MINUTE),
        (3, 30 * MINUTE),
        (4, HOUR),
        (5, 2 * HOUR),
        (6, 4 * HOUR),
        (40, 4 * HOUR),
    ],
)
def test_the_waits_grow_along_the_schedule_and_the_last_one_repeats(attempts, wait):
    assert due(attempts, age=5 * HOUR) == wait


def test_jitter_stretches_a_wait_by_its_part_either_way():
    assert due(1, age=HOUR, jitter=0.1) == 5.5 * MINUTE
    assert due(1, age=HOUR, jitter=-0.1) == 4.5 * MINUTE


def test_the_last_try_falls_on_the_end_of_the_lifetime_exactly():
    assert due(30, age=5 * DAY - HOUR) == HOUR


@pytest.mark.parametrize("beyond", [timedelta(0), timedelta(microseconds=1), 3 * DAY])
def test_after_the_lifetime_there_is_no_next_attempt(beyond):
    assert due(30, age=5 * DAY + beyond) is None


def test_a_message_never_tried_does_not_expire_however_old_it_is():
    assert due(0, age=30 * DAY) == timedelta(0)


def test_every_message_has_its_last_try_on_the_last_instant_of_its_life():
    now, attempts, tries = NOON, 0, []
    while True:
        attempts += 1
        tries.append(now)
        at = next_attempt(SCHEDULE, arrived=NOON, attempts=attempts, now=now)
        if at is None:
            break
        now = at
    assert tries[-1] == NOON + SCHEDULE.lifetime
    assert SCHEDULE.warn_after is not None
    assert NOON + SCHEDULE.warn_after in tries
    assert len(tries) == 36


def test_a_sender_is_not_told_hours_late_that_it_takes_longer():
    assert due(6, age=3.75 * HOUR) == 15 * MINUTE
    assert due(6, age=3.75 * HOUR, schedule=replace(SCHEDULE, warn_after=None)) == 4 * HOUR
    assert due(6, age=4 * HOUR) == 4 * HOUR


def test_recipients_of_a_message_keep_together_and_messages_part():
    ids = [f"1K0PF0NN1EJKPV{number:03}" for number in range(200)]
    jitters = [jitter_of(queue_id, 3) for queue_id in ids]
    assert jitters == [jitter_of(queue_id, 3) for queue_id in ids]
    assert len({round(jitter, 4) for jitter in jitters}) > 150
    assert 0 <= min(jitters) < 0.01
    assert 0.09 < max(jitters) < 0.1
    assert jitter_of(ids[0], 3) != jitter_of(ids[0], 4)


@pytest.mark.parametrize(
    ("age", "after"),
    [
        (timedelta(0), 4 * HOUR),
        (4 * HOUR - MINUTE, 4 * HOUR),
        (4 * HOUR, 5 * DAY),
        (5 * DAY - MINUTE, 5 * DAY),
        (5 * DAY, None),
        (-30 * DAY, 4 * HOUR),
    ],
)
def test_untried_message_is_due_when_its_sender_is_to_be_told(age, after):
    word = next_notification(SCHEDULE, arrived=NOON, now=NOON + age)
    assert word == (None if after is None else NOON + after)


@given(st.lists(st.timedeltas(min_value=timedelta(microseconds=1), max_value=DAY), min_size=1))
def test_report_does_not_wait_for_a_recipient_already_tried(waits):
    schedule = RetrySchedule(waits=tuple(waits))
    assert schedule.report_window <= 4 * MINUTE
    assert all(schedule.report_window <= wait for wait in waits)


# The clock steps.


def test_a_clock_thirty_days_ahead_gives_up_no_message():
    """The daemon has just seen the step, and the message had three attempts."""
    assert due(3, age=30 * DAY, steady_for=timedelta(0)) == 30 * MINUTE
    assert due(9, age=30 * DAY + 20 * HOUR, steady_for=20 * HOUR) == 4 * HOUR


def test_a_message_that_is_too_old_is_given_up_once_the_clock_has_run_evenly_for_a_day():
    assert due(12, age=30 * DAY + SETTLING, steady_for=SETTLING) is None


def test_a_restart_keeps_no_message_alive_that_had_all_its_attempts():
    assert due(37, age=5 * DAY, steady_for=MINUTE) is None


def test_days_of_our_own_absence_do_not_count_against_a_message():
    assert due(2, age=6 * DAY, steady_for=MINUTE) == 10 * MINUTE


def test_message_that_arrived_on_an_even_clock_is_as_old_as_the_clock_says():
    assert due(1, age=5 * DAY, steady_for=5 * DAY) is None


def test_a_message_from_the_future_is_tried_along_its_waits():
    """The clock was set back thirty days: age is never negative, the queue does not stand still."""
    assert due(1, age=-30 * DAY) == 5 * MINUTE
    assert due(7, age=-30 * DAY) == 4 * HOUR


def test_a_message_from_the_future_does_not_live_until_the_clock_gets_there():
    assert due(37, age=-30 * DAY) is None


def test_a_due_time_that_no_honest_clock_wrote_is_known():
    assert NOON + 4.4 * HOUR < latest_due(SCHEDULE, now=NOON) < NOON + 6 * HOUR


@given(
    age=st.timedeltas(min_value=-60 * DAY, max_value=60 * DAY),
    attempts=st.integers(0, 200),
    jitter=st.floats(-0.1, 0.1),
    steady_for=st.none() | st.timedeltas(min_value=timedelta(0), max_value=60 * DAY),
)
def test_an_attempt_is_never_due_in_the_past_nor_later_than_the_longest_wait(
    age, attempts, jitter, steady_for
):
    wait = due(attempts, age=age, jitter=jitter, steady_for=steady_for)
    if wait is None:
        assert attempts > 0
    else:
        assert timedelta(0) <= wait <= 4.4 * HOUR
        assert NOON + age + wait <= latest_due(SCHEDULE, now=NOON + age)


@given(
    age=st.timedeltas(min_value=-60 * DAY, max_value=60 * DAY),
    attempts=st.integers(0, 200),
    steady_for=st.none() | st.timedeltas(min_value=timedelta(0), max_value=60 * DAY),
)
def test_age_is_never_negative_and_never_more_than_the_clock_says(age, attempts, steady_for):
    now = NOON + age
    believed = age_of(
        SCHEDULE,
        arrived=NOON,
        attempts=attempts,
        now=now,
        steady_since=None if steady_for is None else now - steady_for,
    )
    assert believed >= timedelta(0)
    assert believed <= age or age < timedelta(0)


@given(st.lists(st.floats(-0.1, 0.1), min_size=200, max_size=200))
def test_with_any_jitter_a_restart_at_the_end_does_not_stretch_a_life(jitters):
    """Every attempt made when due: at the end of the lifetime the attempts themselves account for
    it.
    """
    now = NOON
    for attempts, jitter in enumerate(jitters, 1):
        at = next_attempt(
            SCHEDULE, arrived=NOON, attempts=attempts, now=now, jitter=jitter, steady_since=now
        )
        if at is None:
            break
        now = at
    assert now == NOON + SCHEDULE.lifetime


# The watch on the clock.


def looks(*pairs):
    seen = None
    for wall, monotonic in pairs:
        seen = watch(seen, wall=wall, monotonic=monotonic)
    return seen


def test_even_time_begins_at_the_first_look():
    assert looks((NOON, 7.0)).steady_since == NOON
    assert looks((NOON, 7.0), (NOON + HOUR, 3607.0)).steady_since == NOON


def test_a_clock_that_is_slewed_stays_even():
    pairs = [(NOON + n * (HOUR + MINUTE), 3600.0 * n) for n in range(100)]
    assert looks(*pairs).steady_since == NOON


@pytest.mark.parametrize("step", [30 * DAY, -30 * DAY, 10 * MINUTE])
def test_even_time_begins_anew_after_a_step_of_the_clock(step):
    assert looks((NOON, 0.0), (NOON + HOUR + step, 3600.0)).steady_since == NOON + HOUR + step


@pytest.mark.parametrize(
    "wrong", [{"waits": ()}, {"waits": (timedelta(0),)}, {"lifetime": timedelta(0)}]
)
def test_schedule_without_a_wait_is_refused(wrong):
    with pytest.raises(ValueError, match=r"has to|needs"):
        RetrySchedule(**wrong)
