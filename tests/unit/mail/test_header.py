"""The header section as bytes: nothing is read into it, nothing is lost from it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.header import named, split_content, unfold
from relay.mail.section import HeaderSection
from tests.fakes.fields import iter_fields


@pytest.mark.parametrize(
    ("content", "header", "rest"),
    [
        (b"A: 1\r\n\r\nbody\r\n", b"A: 1\r\n", b"\r\nbody\r\n"),
        (b"A: 1\r\nB: 2\r\n\r\n", b"A: 1\r\nB: 2\r\n", b"\r\n"),
        (b"\r\nA: 1\r\n\r\n", b"", b"\r\nA: 1\r\n\r\n"),
        (b"A: 1\r\n", b"A: 1\r\n", b""),
        (b"", b"", b""),
        (b"A: 1\n\nB: 2\r\n\r\nbody", b"A: 1\n\nB: 2\r\n", b"\r\nbody"),
        (b"A: 1\r\n \r\nB: 2\r\n\r\n", b"A: 1\r\n \r\nB: 2\r\n", b"\r\n"),
    ],
)
def test_the_header_section_ends_at_the_first_empty_line(content, header, rest):
    assert split_content(content) == (header, rest)


def values(header: bytes, *names: bytes) -> list[tuple[bytes, bytes]]:
    return [(field.name, field.value(header)) for field in named(names)(header)]


def without_bcc(header: bytes) -> bytes:
    return HeaderSection(header).without(b"bcc")


def test_a_field_keeps_its_folding():
    header = b"From: a@b.example\r\nSubject:\r\n a\r\n\tb\r\nX-Other: c\r\nTO :\r\n"
    assert values(header, b"from", b"subject", b"to") == [
        (b"from", b" a@b.example"),
        (b"subject", b"\r\n a\r\n\tb"),
        (b"to", b""),
    ]
    assert HeaderSection(header).first(b"subject") == b"\r\n a\r\n\tb"
    assert unfold(b"\r\n a\r\n\tb") == b" a\tb"


@pytest.mark.parametrize(
    "stray", [b"\r", b"\n", b"\n\r", b"\0", b"\x0b", b"\x0c", b"\x85", "\u2028".encode()]
)
def test_only_crlf_begins_a_field(stray):
    header = b"Subject: hi" + stray + b"Bcc: yes\r\n"
    assert [name for name, _ in values(header, b"subject", b"bcc")] == [b"subject"]
    assert without_bcc(header) == header


@pytest.mark.parametrize(
    "line",
    [
        b"no colon here\r\n",
        b" folded first\r\n",
        b" bcc: first\r\n",
        b": no name\r\n",
        b">From me\r\n bcc: y\r\n",
    ],
)
def test_a_line_that_is_no_field_has_no_name_and_is_kept(line):
    header = line + b"Bcc: y\r\n"
    assert [field.name for field in iter_fields(header)] == [b"", b"Bcc"]
    assert without_bcc(header) == line


def test_a_space_before_the_colon_is_no_part_of_a_name():
    assert values(b"Subject \t: yes\r\nFrom\r\n : x\r\n", b"subject", b"from") == [
        (b"subject", b" yes")
    ]


def test_fields_are_removed_with_their_folds_and_nothing_else_is_touched():
    header = b"A: 1\r\nBcc: 1\r\n 2\r\nB:  2 \r\nbCC :3\r\nC: 3\r\n"
    assert without_bcc(header) == b"A: 1\r\nB:  2 \r\nC: 3\r\n"
    assert without_bcc(b"Bcc: 1\r\n") == b""
    assert without_bcc(b"A: 1\r\nBcc: 1") == b"A: 1\r\n"


def test_a_million_header_lines_are_read_in_bounded_time():
    header = b"A:\r\n" * 250_000 + b"B: " + b"\r\n x" * 250_000 + b"\r\nBcc: x\r\n"
    begun = time.process_time()
    assert without_bcc(header) == header[:-8]
    assert values(header, b"b")[0][1] == b" " + b"\r\n x" * 250_000
    assert time.process_time() - begun < 1


_PIECES = st.lists(
    st.sampled_from(
        [b"A", b"Bcc", b":", b" ", b"\t", b"\r\n", b"\r", b"\n", b"v", b"\0", b"\xff", b"bcc:"]
    ),
    max_size=24,
).map(b"".join)


@given(_PIECES)
def test_fields_found_in_one_search_are_those_found_one_by_one(header):
    fields = list(iter_fields(header))
    assert b"".join(field.raw for field in fields) == header
    bcc = [field for field in fields if field.name.rstrip(b" \t").lower() == b"bcc"]
    assert [value for _, value in values(header, b"bcc")] == [field.value for field in bcc]
    assert without_bcc(header) == b"".join(field.raw for field in fields if field not in bcc)


@given(_PIECES)
def test_the_two_parts_joined_are_the_content(content):
    header, rest = split_content(content)
    assert header + rest == content
    assert not rest or rest.startswith(b"\r\n")
