"""Content off the wire: where it ends, what it is, and what makes it unfit."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.receive.content import BdatReader, DataReader, Flaw
from relay.receive.spec import BareNewline

END = b"\r\n.\r\n"

# Text in which everything that matters is frequent.
WIRE = st.lists(
    st.sampled_from(
        [b"\r\n", b".", b"\r", b"\n", b"a", b"\r\n.", b"..", b"\0", b"\xff", b"Subject: x"]
    ),
    max_size=40,
).map(b"".join)
LINES = st.lists(
    st.binary(max_size=30).map(lambda line: line.translate(None, b"\r\n\0")), max_size=20
)

DOTTED = st.lists(st.sampled_from([b".", b"..", b".x", b"a.b", b"a", b""]), max_size=6)


def read(
    pieces: list[bytes],
    *,
    limit: int = 10_000,
    bare_newline: BareNewline = BareNewline.REFUSE,
    ends_with_lf: bool = False,
) -> tuple[DataReader, bytes, bytes]:
    """The reader after these pieces, the content, and what came behind it."""
    reader = DataReader(limit_bytes=limit, bare_newline=bare_newline, ends_with_lf=ends_with_lf)
    rest = b""
    for piece in pieces:
        if reader.complete:
            rest += piece
        else:
            rest += piece[reader.feed(piece) :]
    return reader, reader.held.take_all(), rest


def cut(octets: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({place % (len(octets) + 1) for place in places} | {0, len(octets)})
    return [octets[a:b] for a, b in itertools.pairwise(marks)]


def stuffed(lines: list[bytes]) -> bytes:
    """As a client sends it (RFC 5321 §4.5.2)."""
    return (
        b"".join((b"." + line if line.startswith(b".") else line) + b"\r\n" for line in lines)
        + b".\r\n"
    )


@given(
    WIRE,
    st.lists(st.integers(min_value=0, max_value=400), max_size=20),
    st.sampled_from(BareNewline),
    st.booleans(),
)
def test_result_is_the_same_however_the_network_cuts_the_octets(
    wire, places, bare_newline, ends_with_lf
):
    octets = wire + END + b"MAIL FROM:<x@y>\r\n" + END
    whole, content, rest = read([octets], bare_newline=bare_newline, ends_with_lf=ends_with_lf)
    pieces, same_content, same_rest = read(
        cut(octets, places), bare_newline=bare_newline, ends_with_lf=ends_with_lf
    )
    assert (pieces.flaw, same_content, same_rest) == (whole.flaw, content, rest)
    assert (pieces.size_bytes, pieces.eight_bit) == (
        whole.size_bytes,
        whole.eight_bit,
    ) or whole.flaw
    assert pieces.read_bytes == whole.read_bytes == len(octets) - len(rest)


@given(WIRE, st.lists(st.integers(min_value=0, max_value=400), max_size=20))
def test_content_octet_by_octet_is_the_content_at_once(wire, places):
    octets = wire + END
    whole, content, rest = read([octets])
    slow, same_content, same_rest = read([octets[i : i + 1] for i in range(len(octets))])
    assert (slow.flaw, same_content, same_rest) == (whole.flaw, content, rest)


@given(LINES, st.lists(st.integers(min_value=0, max_value=700), max_size=20))
def test_every_content_survives_the_wire_byte_for_byte(lines, places):
    reader, content, rest = read(cut(stuffed(lines) + b"QUIT\r\n", places))
    assert reader.complete
    assert reader.flaw is None
    assert content == b"".join(line + b"\r\n" for line in lines)
    assert rest == b"QUIT\r\n"
    assert reader.eight_bit == (not content.isascii())
    assert reader.size_bytes == len(content)


@given(DOTTED, st.lists(st.integers(min_value=0, max_value=40), max_size=20))
def test_reader_knows_whether_a_line_begins_with_a_dot_however_it_is_cut(lines, places):
    content = b"".join(line + b"\r\n" for line in lines)
    is_dotless = not any(line.startswith(b".") for line in lines)
    assert read(cut(stuffed(lines), places))[0].is_dotless == is_dotless
    chunked = BdatReader(limit_bytes=10_000)
    for chunk in cut(content, places):
        chunked.begin_chunk(len(chunk), last=False)
        chunked.feed(chunk)
    chunked.begin_chunk(0, last=True)
    assert chunked.is_dotless == is_dotless


@given(
    WIRE,
    st.lists(st.integers(min_value=0, max_value=400), max_size=9),
    st.sampled_from(BareNewline),
)
def test_content_that_a_reader_calls_dotless_has_no_dot_at_a_line_start(wire, places, bare_newline):
    reader, content, _ = read(cut(wire + END, places), bare_newline=bare_newline)
    assert not reader.is_dotless or b"\n." not in b"\n" + content


@given(WIRE)
def test_content_ends_at_the_first_crlf_dot_crlf_and_nowhere_else(wire):
    octets = b"\r\n" + wire + END
    first = octets.find(END)
    reader, _, rest = read([octets[2:] + b"behind"])
    assert reader.complete
    assert rest == octets[first + len(END) :] + b"behind"


@pytest.mark.parametrize(
    "ending",
    [
        b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\n.\r", b"\r.\n",
        b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\r\n.\r\r\n", b"\n\n.\r\n", b"\r\n.\r\r\n",
        b"\r\r\n.\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("bare_newline", BareNewline)
def test_no_other_ending_ends_a_message(ending, bare_newline):
    smuggled = (
        b"Subject: one\r\n\r\nfirst"
        + ending
        + b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<x@y.example>\r\n"
    )
    reader, content, _ = read([smuggled], bare_newline=bare_newline)
    assert not reader.complete
    reader, content, rest = read([smuggled + b"the end" + END], bare_newline=bare_newline)
    assert reader.complete
    assert rest == b""
    if bare_newline is not BareNewline.REFUSE and b"\0" not in ending:
        assert content.count(b"\r") == content.count(b"\n") == content.count(b"\r\n")
        assert END not in content
    else:
        assert reader.flaw in (Flaw.BARE_NEWLINE, Flaw.NUL)
        assert content == b""


@pytest.mark.parametrize(
    ("wire", "content"),
    [
        (b".\r\n", b""),
        (b"\r\n.\r\n", b"\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),
        (b"a\r\n..b\r\n.c\r\n...\r\n.\r\n", b"a\r\n.b\r\nc\r\n..\r\n"),
    ],
)
def test_the_dots_of_transparency_are_taken_off(wire, content):
    assert read([wire])[1] == content


def test_the_dots_of_transparency_do_not_count_for_the_size():
    lines = [b"."] * 10
    reader, content, _ = read([stuffed(lines)], limit=30)
    assert reader.flaw is None
    assert len(content) == 30


def test_content_over_the_limit_is_read_to_its_end_and_not_kept():
    reader = DataReader(limit_bytes=1000)
    for _ in range(1000):
        reader.feed(b"x" * 1000)
        assert len(reader.held) <= 1000
    assert reader.feed(b"\r\n.\r\nQUIT\r\n") == 5
    assert reader.complete
    assert reader.flaw is Flaw.TOO_LARGE


def test_a_bare_newline_becomes_a_space_where_that_is_asked_for():
    wire = b"Subject: hi\rX-Skip-Verification: yes\nX: y\r\n\r\n.\r.\n\r\n.\r\n"
    _, content, _ = read([wire], bare_newline=BareNewline.NORMALISE)
    assert content == b"Subject: hi X-Skip-Verification: yes X: y\r\n\r\n . \r\n"


def test_a_line_feed_is_a_line_end_where_that_is_asked_for():
    wire = b"Subject: hi\nFrom: a\n\n..dot\n\rend\n.\n.\r\n.\r\n"
    reader, content, rest = read([wire], bare_newline=BareNewline.LINE_END)
    assert (content, rest) == (b"Subject: hi\r\nFrom: a\r\n\r\n.dot\r\n end\r\n\r\n\r\n", b"")
    assert (reader.complete, reader.size_bytes) == (True, len(content))


@pytest.mark.parametrize("end", [b"\n.\n", b"\r\n.\r\n", b"\n.\r\n", b"\r\n.\n"])
def test_a_client_that_knows_line_feeds_only_ends_its_message_with_them(end):
    wire = b"Subject: hi\n\n..dot\nthe end" + end
    reader, content, rest = read(
        [wire + b"QUIT\n"], bare_newline=BareNewline.LINE_END, ends_with_lf=True
    )
    assert reader.complete
    assert (content, rest) == (b"Subject: hi\r\n\r\n.dot\r\nthe end\r\n", b"QUIT\n")


@given(LINES, st.lists(st.integers(min_value=0, max_value=700), max_size=20))
def test_content_in_line_feeds_survives_the_wire(lines, places):
    wire = stuffed(lines).replace(b"\r\n", b"\n") + b"QUIT\n"
    reader, content, rest = read(
        cut(wire, places), bare_newline=BareNewline.LINE_END, ends_with_lf=True
    )
    assert content == b"".join(line + b"\r\n" for line in lines)
    assert (reader.complete, rest) == (True, b"QUIT\n")


def test_reader_recognises_a_final_dot_between_bare_line_feeds():
    reader, _, _ = read([b"Subject: hi\n\nhello\n.\n"])
    assert reader.ends_with_bare_dot
    reader, _, _ = read([b"Subject: hi\n\nhello\n.\n", b"and on"])
    assert not reader.ends_with_bare_dot


@given(
    LINES,
    st.lists(st.integers(min_value=0, max_value=700), max_size=5),
    st.lists(st.integers(0, 700)),
)
def test_the_chunks_of_bdat_give_the_same_content_however_they_are_cut(lines, chunks, places):
    content = b"".join(line + b"\r\n" for line in lines)
    reader = BdatReader(limit_bytes=100_000)
    for chunk in cut(content, chunks):
        reader.begin_chunk(len(chunk), last=False)
        for piece in cut(chunk, places):
            assert reader.feed(piece) == len(piece)
        assert not reader.in_chunk
        assert not reader.complete
    reader.begin_chunk(0, last=True)
    assert reader.complete
    assert reader.flaw is None
    assert reader.held.take_all() == content


def test_bdat_leaves_the_octets_behind_a_chunk():
    reader = BdatReader(limit_bytes=100)
    reader.begin_chunk(3, last=True)
    assert reader.feed(b"..QUIT", 1) == 4
    assert reader.complete
    assert reader.held.take_all() == b".QU\r\n"


@pytest.mark.parametrize("chunks", [[b"a\r", b"b"], [b"a\n"], [b"a\r"], [b"\n"], [b"a\r", b"\r\n"]])
def test_bdat_has_no_bare_newlines_either(chunks):
    reader = BdatReader(limit_bytes=100)
    for index, chunk in enumerate(chunks):
        reader.begin_chunk(len(chunk), last=index == len(chunks) - 1)
        reader.feed(chunk)
    assert reader.complete
    assert reader.flaw is Flaw.BARE_NEWLINE


def test_a_crlf_may_be_cut_by_the_end_of_a_chunk():
    reader = BdatReader(limit_bytes=100)
    reader.begin_chunk(2, last=False)
    reader.feed(b"a\r")
    reader.begin_chunk(2, last=True)
    reader.feed(b"\nb")
    assert reader.held.take_all() == b"a\r\nb\r\n"
    assert reader.flaw is None


def test_lines_of_any_length_are_content():
    _, content, _ = read([b"x" * 5000, b"\r\n.\r\n"])
    assert content == b"x" * 5000 + b"\r\n"
