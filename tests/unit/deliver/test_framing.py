"""Replies out of any bytes, content that no host can misread."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.deliver.framing import (
    MAX_LINE_BYTES,
    MAX_REPLY_BYTES,
    BadReply,
    DotStuffing,
    ReplyReader,
)
from relay.mail.reply import Reply

STREAM = (
    b"220 mx ESMTP\r\n250-mx\r\n250-PIPELINING\r\n250 SIZE 10\r\n"
    b"250 2.1.0 OK\r\n550-5.1.1 no\r\n550 5.1.1 such\r\n354\r\n"
)
REPLIES = [
    Reply(220, "", "mx ESMTP"),
    Reply(250, "", "mx\nPIPELINING\nSIZE 10"),
    Reply(250, "2.1.0", "OK"),
    Reply(550, "5.1.1", "no\nsuch"),
    Reply(354, "", ""),
]


def read(reader: ReplyReader, *pieces: bytes) -> list[Reply]:
    replies = []
    for piece in pieces:
        reader.buffer += piece
        while (reply := reader.take()) is not None:
            replies.append(reply)
    return replies


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_replies_are_the_same_however_the_stream_is_cut(size):
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert read(ReplyReader(), *pieces) == REPLIES


def test_bytes_of_a_reply_that_is_not_all_there_are_remembered():
    reader = ReplyReader()
    assert read(reader, b"250-mx\r\n") == []
    assert not reader.is_empty
    assert read(reader, b"250 OK\r\n") == [Reply(250, "", "mx\nOK")]
    assert reader.is_empty


def test_reset_discards_all_earlier_octets():
    reader = ReplyReader()
    read(reader, b"250-injec")
    reader.reset()
    assert reader.is_empty
    assert read(reader, b"220 mx\r\n") == [Reply(220, "", "mx")]


def test_the_last_line_decides_where_codes_differ_within_a_class():
    assert read(ReplyReader(), b"250-a\r\n251 b\r\n") == [Reply(251, "", "a\nb")]


def test_bytes_that_are_no_text_are_kept_readable():
    (reply,) = read(ReplyReader(), b"550 caf\xe9 \xe2\x82\xac\r\n")
    assert reply.text == "caf\\xe9 €"


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n",
        b"\r\n",
        b"25 OK\r\n",
        b"2\r\n",
        b"25\r\n",
        b"2500 OK\r\n",
        b"650 OK\r\n",
        b"050 OK\r\n",
        b"250-a\r\n550 b\r\n",
        b"\xb2\xb5\xb0 OK\r\n",
        b"250 " + b"x" * MAX_LINE_BYTES,
        b"250-" + b"x" * 1000 + b"\r\n",
    ],
)
def test_text_that_is_no_reply_is_refused_before_it_takes_much_memory(garbage):
    reader = ReplyReader()
    with pytest.raises(BadReply):
        read(reader, *[garbage] * 100)
    assert len(reader.buffer) + sum(map(len, reader._lines)) <= MAX_REPLY_BYTES + len(garbage)


def test_no_line_after_garbage_is_taken_for_a_reply():
    reader = ReplyReader()
    with pytest.raises(BadReply):
        read(reader, b"hello\r\n250 2.0.0 OK\r\n")
    with pytest.raises(BadReply):
        read(reader, b"250 2.0.0 OK\r\n")


@given(st.lists(st.binary(max_size=20)))
def test_no_bytes_raise_another_error_than_bad_reply(pieces):
    with suppress(BadReply):
        for reply in read(ReplyReader(), *pieces):
            assert 100 <= reply.code <= 599


def stuffed(*pieces: bytes) -> bytes:
    stuffer = DotStuffing()
    return b"".join([*map(stuffer.stuff, pieces), stuffer.end()])


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        (b"", b".\r\n"),
        (b"a\r\n", b"a\r\n.\r\n"),
        (b"a", b"a\r\n.\r\n"),
        (b".\r\n", b"..\r\n.\r\n"),
        (b".a\r\n..b\r\n", b"..a\r\n...b\r\n.\r\n"),
        (b"a.b\r\n", b"a.b\r\n.\r\n"),
        (b"a\n.\nb\r\n", b"a\n..\nb\r\n.\r\n"),
        (b"a\r.\rb\r\n", b"a\r..\rb\r\n.\r\n"),
        (b"a\r", b"a\r\r\n.\r\n"),
        (b"a\n", b"a\n\r\n.\r\n"),
    ],
)
def test_a_line_that_begins_with_a_dot_gets_another(content, sent):
    assert stuffed(content) == sent
    assert stuffed(*(bytes([octet]) for octet in content)) == sent


ENDS_OF_DATA = re.compile(rb"(?:\r\n|\r|\n|^)\.(?:\r\n|\r|\n)")


@given(st.lists(st.text(alphabet="a.\r\n", max_size=8)))
def test_nothing_in_the_content_looks_like_its_end_to_any_reader(texts):
    pieces = [text.encode() for text in texts]
    sent = stuffed(*pieces)
    assert sent == stuffed(b"".join(pieces))
    assert sent.endswith(b".\r\n")
    assert [match.end() for match in ENDS_OF_DATA.finditer(sent)] == [len(sent)]


@given(st.lists(st.lists(st.text(alphabet="a.", max_size=4)), min_size=1))
def test_content_is_the_same_after_the_host_undoes_the_dots(pieces):
    content = b"".join(b"".join(line.encode() + b"\r\n" for line in piece) for piece in pieces)
    lines = stuffed(content).split(b"\r\n")[:-2]
    assert b"".join(line.removeprefix(b".") + b"\r\n" for line in lines) == content
