"""What is told of the nodes that share a queue, and of its database."""

from __future__ import annotations

from relay.queue.nodes import Holder, LongHolders


def test_transaction_that_is_open_for_more_than_ten_minutes_is_told_once() -> None:
    told = LongHolders()
    short, long = Holder("short", 5, 599.0, "7"), Holder("long", 900, 660.0, "1")
    assert told.new_ones([short, long], now=0.0) == [("long", 660.0)]
    assert told.new_ones([short, long], now=0.5) == []
    assert told.new_ones([long._replace(mark="2")], now=1.0) == [("long", 660.0)]


def test_slot_that_has_not_moved_for_ten_minutes_is_told_and_one_that_moves_is_not() -> None:
    told = LongHolders()
    for minute in range(11):
        moving = Holder("moving", 10, None, str(minute))
        assert told.new_ones([Holder("slot", 10, None, "1"), moving], now=60.0 * minute) == []
    moving = Holder("moving", 10, None, "11")
    found = told.new_ones([Holder("slot", 10, None, "1"), moving], now=601.0)
    assert found == [("slot", 601.0)]
