"""Each fuzz target for a moment, always on the same inputs; `make fuzz` is the long form."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from random import Random

import pytest

from tests.fuzz import operator_targets
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import SEEDS, TARGETS

COUNTS = {"sessions": 300, "proxies": 300, "tlsa": 300, "requests": 300}


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    operator_targets.close()


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_promise(name: str) -> None:
    random = Random(zlib.crc32(name.encode()))
    for seed in SEEDS[name]:
        TARGETS[name](seed)
    for _ in range(COUNTS.get(name, 3000)):
        octets = mutated(random, SEEDS[name])
        try:
            TARGETS[name](octets)
        except Exception as error:
            error.add_note(f"{name}: {octets!r}")
            raise


FOUND: list[tuple[str, bytes]] = [
    ("beginnings", b"0X-MAi|gun-Drop-Message: yes\r\n"),  # was 451: no field has 0 before its X
    ("replies", b"12\r\n"),  # was a reply with the code 2
    ("requests", b'{"verb": "show", "id": "\\\\ud800"}'),  # no store takes half of a surrogate pair
    ("requests", b'{"verb": "show", "id": "M1"}\r\n'),  # whoever sent more got no answer
    ("origins", b"\0\nrelay.example\nhttp://relay.example\nhttp://evil.example\\\\@relay.example/"),
]
"""What was found once."""


@pytest.mark.parametrize(("name", "octets"), FOUND)
def test_input_that_once_broke_a_promise_breaks_it_no_more(name: str, octets: bytes) -> None:
    # Each target asserts its promise.
    TARGETS[name](octets)
