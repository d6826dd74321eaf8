"""Queue ids sort by arrival, are unique, and are safe to say over the telephone."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest

from relay.queue.queue_id import new_queue_id

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_a_later_message_sorts_after_an_earlier_one():
    steps = [NOW + timedelta(microseconds=step**3) for step in range(300)]
    ids = [new_queue_id(at) for at in steps]
    assert ids == sorted(ids)


def test_messages_of_the_same_instant_get_different_ids():
    assert len({new_queue_id(NOW) for _ in range(300)}) == 300


@pytest.mark.parametrize(
    "at",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1960, 1, 1, tzinfo=UTC),  # a clock that is badly wrong
        NOW,
        datetime(2999, 12, 31, tzinfo=UTC),
    ],
)
def test_an_id_has_one_length_and_only_digits_and_capital_letters(at):
    assert re.fullmatch(r"[0-9A-Z]{17}", new_queue_id(at))
