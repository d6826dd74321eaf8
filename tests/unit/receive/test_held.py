"""The octets of a message in memory: their order, and what they take."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from relay.receive.held import Held

SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 300, 16_383, 16_384, 20_000, 70_000]), max_size=12)


def blocks_of(sizes: list[int]) -> list[bytes]:
    """Blocks of these sizes, no two alike."""
    return [bytes([65 + number]) * size for number, size in enumerate(sizes)]


@given(SIZES, st.integers(min_value=1, max_value=50_000), st.booleans())
def test_octets_leave_in_the_order_in_which_they_came(sizes, most, is_searched):
    held, taken, blocks = Held(), [], blocks_of(sizes)
    for block in blocks:
        held.add(block)
        if is_searched:
            held.find(b"\r\n\r\n")
    assert len(held) == len(b"".join(blocks))
    while len(held) > most:
        taken.append(held.take(most))
        assert 0 < len(taken[-1]) <= most
    rest = held.take_all()
    assert b"".join([*taken, rest]) == b"".join(blocks)
    assert len(held) == 0


@given(SIZES, st.integers(min_value=0, max_value=200_000))
def test_search_finds_octets_that_lie_in_two_blocks(sizes, start):
    held, blocks = Held(), blocks_of(sizes)
    for block in blocks:
        held.add(block)
    whole = b"".join(blocks)
    wanted = whole[start : start + 3] or b"x"
    assert held.find(wanted) == whole.find(wanted)


def test_octets_that_are_put_back_come_first():
    held = Held()
    held.add(b"body")
    held.put_back(b"header")
    assert (len(held), held.take_all()) == (10, b"headerbody")


def test_large_block_is_neither_copied_nor_divided():
    block, small = b"x" * 30_000, b"y" * 100
    held = Held()
    held.add(block)
    held.add(small)
    assert held.take(30_050) is block
    assert held.take(30_050) == small


def test_octets_that_come_one_by_one_take_no_more_memory_than_a_block():
    held = Held()
    tracemalloc.start()
    for _ in range(100_000):
        held.add(b"x")
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held_bytes < 200_000
