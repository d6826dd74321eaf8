"""Values that are made for every message, and compared and hashed by their fields."""

from __future__ import annotations

from dataclasses import replace

from relay.mail.record import record


@record(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


@record(frozen=True, slots=True)
class OwnHash:
    x: int

    def __hash__(self) -> int:
        return 7


def test_records_are_equal_and_hashed_by_their_fields() -> None:
    assert Point(1) == Point(1, 0) != Point(2)
    assert len({Point(1), Point(1, 0), Point(2)}) == 2


def test_record_keeps_a_hash_of_its_own() -> None:
    assert hash(OwnHash(1)) == 7


def test_replaced_record_leaves_the_first_as_it_was() -> None:
    first = Point(1)
    assert replace(first, y=2) == Point(1, 2)
    assert first == Point(1)


def test_init_of_a_record_does_not_call_setattr_of_object() -> None:
    """This call for each field is what a frozen dataclass costs."""
    assert "__setattr__" not in Point.__init__.__code__.co_names
