"""JSON as the delivery log has it: whatever text it tells of, a line is ASCII and any parser reads
it.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.jsontext import of_json, to_json

TEXT = st.text(st.characters(codec=None), max_size=20)
NUMBERS = st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@given(VALUES)
def test_value_is_written_as_one_ascii_line_and_reads_back_the_same(value: object) -> None:
    line = to_json(value)
    assert line.isascii()
    assert line.isprintable() or "\x7f" in line
    assert json.loads(line) == value


@given(st.dictionaries(TEXT, TEXT | st.integers(-(1 << 63), 1 << 63) | st.none()))
def test_rows_are_read_back_whatever_text_is_in_them(value: object) -> None:
    assert of_json(to_json(value)) == value


@pytest.mark.parametrize("text", ["", "{", "[1,]", "\udce9", "[" * 100_000])
def test_invalid_json_is_not_read(text: str) -> None:
    with pytest.raises((ValueError, RecursionError)):
        of_json(text)


@pytest.mark.parametrize("text", ["jörg", "\udce9", "\u2028", "a\r\nb", "\x1b[2J", "\0"])
def test_line_equals_that_of_the_standard_encoder(text: str) -> None:
    fields = {"recipient": text, "code": 250, "tls": None, "timestamp": 1790000000.123}
    assert to_json(fields) == json.dumps(fields, separators=(",", ":"))
