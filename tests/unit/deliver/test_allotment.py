"""How a limit is divided, and when the messages of a rate begin."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.deliver.allotment import divided, spacing
from relay.route.next_hop import Rate

NEVER = float("-inf")


def beginnings(
    rate: Rate, seconds: float, *, from_: float = 0.0, step: float = 0.01
) -> list[float]:
    """When messages begin, of which there are always more."""
    spaced, due, now, found = spacing(rate), NEVER, from_, []
    while now < from_ + seconds:
        while now >= spaced.begins_at(due):
            due = spaced.next_due(due, now)
            found.append(now)
        now += step
    return found


def most_in(times: list[float], seconds: float) -> int:
    """The most of them in any stretch of so many seconds, its end included."""
    return max(sum(begin <= one <= begin + seconds for one in times) for begin in times)


@pytest.mark.parametrize(
    ("limit", "wanted", "parts"),
    [
        (10, [20], [10]),
        (10, [20, 0], [10, 0]),
        (10, [20, 20], [5, 5]),
        (10, [20, 2], [8, 2]),
        (10, [1, 20, 3, 20], [1, 3, 3, 3]),
        (3, [9, 9], [2, 1]),
        (1, [9, 9], [1, 0]),
        (0, [9, 9], [0, 0]),
    ],
)
def test_part_that_a_worker_does_not_want_is_lent(limit, wanted, parts):
    assert divided(limit, wanted) == parts


def test_rest_of_a_division_goes_from_worker_to_worker():
    assert [divided(1, [5, 5, 5], turn).index(1) for turn in range(4)] == [0, 1, 2, 0]


@given(st.integers(0, 40), st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 99))
def test_parts_never_exceed_the_limit_and_leave_nothing_that_is_wanted(limit, wanted, turn):
    parts = divided(limit, wanted, turn)
    assert sum(parts) == min(limit, sum(wanted))
    assert all(part <= want for part, want in zip(parts, wanted, strict=True))
    least = min(
        (part for part, want in zip(parts, wanted, strict=True) if part < want), default=None
    )
    assert least is None or max(parts) <= least + 1


@pytest.mark.parametrize(
    "rate", [Rate(30, 60), Rate(1, 60), Rate(2, 60), Rate(100, 60), Rate(300, 60), Rate(900, 3600)]
)
def test_no_minute_has_more_messages_than_the_rate_and_hardly_one_fewer(rate):
    times = beginnings(rate, 4 * rate.seconds, step=0.01 if rate.seconds <= 60 else 0.25)
    assert most_in(times, rate.seconds) <= rate.messages
    later = [one for one in times if one >= 2 * rate.seconds]
    assert len(later) / 2 >= rate.messages * 0.93 - 1


def test_thirty_a_minute_come_one_after_the_other_and_no_minute_has_fewer_than_28():
    times = beginnings(Rate(30, 60), 300)
    assert min(after - before for before, after in pairwise(times)) >= 2.0
    assert all(sum(begin <= one < begin + 60 for one in times) >= 28 for begin in range(240))


def test_pause_saves_up_one_second_of_messages_and_no_more():
    times = beginnings(Rate(10, 1), 5, from_=1000.0)
    assert sum(one == 1000.0 for one in times) == 10
    assert len(times) == pytest.approx(60, abs=2)
    assert sum(one == 0 for one in beginnings(Rate(300, 60), 5)) == 5
    assert sum(one == 0 for one in beginnings(Rate(30, 60), 5)) == 1
