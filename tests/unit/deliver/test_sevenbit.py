"""8-bit content made fit for a host without 8BITMIME, and what is left alone."""

from __future__ import annotations

import time
from email import message_from_bytes
from email.message import Message

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.deliver.mime import MOST_DEPTH, TooComplex, Walk
from relay.deliver.sevenbit import Conversion, ConversionPlan, NotConvertible, Survey
from tests.fakes.scribe import Scribe

MIME = "MIME-Version: 1.0\r\n"


def survey(content: bytes, step: int = 65536) -> ConversionPlan:
    looking = Survey()
    for start in range(0, len(content), step):
        looking.feed(content[start : start + step])
    return looking.finish()


def converted(content: str | bytes, step: int = 65536) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    conversion = Conversion(survey(content, step))
    pieces = [conversion.feed(content[at : at + step]) for at in range(0, len(content), step)]
    return b"".join(pieces) + conversion.finish()


def leaves(content: bytes) -> list[tuple[str, object]]:
    """Type and decoded octets of each part, as Python's own parser reads them."""
    message: Message = message_from_bytes(content)
    return [
        (part.get_content_type(), part.get_payload(decode=True))
        for part in message.walk()
        if not part.is_multipart()
    ]


# --- what comes of it ---------------------------------------------------------------------------


def test_text_becomes_quoted_printable_and_the_label_says_so():
    head = "Subject: x\r\n" + MIME + "Content-Type: text/plain; charset=utf-8\r\n"
    out = converted(head + "Content-Transfer-Encoding: 8bit\r\n\r\nGrüße = x \r\n").decode()
    assert (
        out
        == head + "Content-Transfer-Encoding: quoted-printable\r\n\r\nGr=C3=BC=C3=9Fe =3D x=20\r\n"
    )


def test_part_that_is_no_text_becomes_base64():
    head = MIME + "content-type: application/xml\r\n"
    assert (
        converted(f"{head}content-transfer-encoding: BINARY\r\n\r\n<ü>\r\n\r\n")
        == (f"{head}Content-Transfer-Encoding: base64\r\n\r\nPMO8Pg0KDQo=").encode()
    )


def test_converted_message_without_mime_fields_gets_them():
    assert converted("Subject: x\r\n\r\nGrüße\r\n".encode("latin-1")) == (
        b"Subject: x\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=unknown-8bit\r\n"
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\nGr=FC=DFe\r\n"
    )


def test_only_the_parts_that_need_it_are_converted_and_those_around_them_say_7bit():
    eight = "Content-Transfer-Encoding: 8bit\r\n"
    content = (
        f'{MIME}Content-Type: multipart/mixed; boundary="a b"\r\n{eight}\r\npreamble\r\n'
        "--a b\r\nContent-Type: text/plain\r\n\r\nplain  \r\n.\r\n"
        f"--a b\r\nContent-Type: multipart/alternative; boundary=a\r\n{eight}\r\n"
        f"--a\r\nContent-Type: text/html\r\n{eight}\r\n<b>ß</b>\r\n--a--\r\n"
        f"--a b  \r\nContent-Type: message/rfc822\r\n{eight}\r\n"
        f"Subject: within\r\n{MIME}Content-Type: text/plain\r\n{eight}\r\nå\r\n"
        "--a b--\r\nepilogue\r\n"
    )
    qp = "Content-Transfer-Encoding: quoted-printable\r\n"
    wanted = content.replace(f"text/html\r\n{eight}", f"text/html\r\n{qp}").replace("ß", "=C3=9F")
    wanted = wanted.replace(f"text/plain\r\n{eight}", f"text/plain\r\n{qp}").replace("å", "=C3=A5")
    assert converted(content).decode() == wanted.replace(": 8bit", ": 7bit")


def test_a_digest_holds_messages():
    content = (
        MIME
        + "Content-Type: multipart/digest; boundary=d\r\n\r\n--d\r\n\r\nSubject: one\r\n\r\nå\r\n"
        "--d--\r\n"
    )
    assert b"Subject: one\r\nMIME-Version: 1.0\r\n" in converted(content)


@pytest.mark.parametrize("tail", ["", "\r\n", " \t"])
def test_the_last_line_of_a_text_may_have_no_end(tail):
    assert leaves(converted(f"{MIME}\r\nå{tail}")) == [("text/plain", f"å{tail}".encode())]


def test_a_line_of_any_length_comes_out_in_lines_of_76():
    text = ("xyz å=" * 30_000 + " \r\n" + "y" * 100_000 + "\r\n").encode()
    out = converted(MIME.encode() + b"\r\n" + text, step=1000)
    assert max(map(len, out.split(b"\r\n"))) <= 76
    assert leaves(out) == [("text/plain", text)]


# --- what is not converted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("DKIM-Signature: v=1\r\n\r\nå\r\n", "signed"),
        ("Subject: å\r\n\r\nx\r\n", "header section"),
        (
            f"{MIME}Content-Type: multipart/signed; boundary=s\r\n\r\n--s\r\n\r\nå\r\n--s--\r\n",
            "multipart/signed",
        ),
        (
            f"{MIME}Content-Type: multipart/encrypted; boundary=s\r\n\r\n--s\r\n\r\nå\r\n",
            "multipart/encrypted",
        ),
        (f"{MIME}Content-Type: multipart/mixed\r\n\r\nå\r\n", "no boundary"),
        (
            f"{MIME}Content-Type: multipart/mixed; boundary=b\r\n\r\nå\r\n--b\r\n\r\n\r\n--b--\r\n",
            "outside",
        ),
        (
            f"{MIME}Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nX: å\r\n\r\n--b--\r\n",
            "header section",
        ),
        (f"{MIME}Content-Type: message/delivery-status\r\n\r\nå\r\n", "message/"),
        (f"{MIME}Content-Transfer-Encoding: base64\r\n\r\nå\r\n", "'base64'"),
        (f"{MIME}Content-Transfer-Encoding: x-uu\r\n\r\nå\r\n", "'x-uu'"),
        (f"{MIME}Content-Type: text\r\n\r\nå\r\n", "cannot be read"),
        ("Content-Type: text/plain\r\nContent-Type: text/html\r\n\r\nå\r\n", "twice"),
        (f"{MIME}Content-Type: message/rfc822\r\n\r\nDKIM-Signature: v=1\r\n\r\nå\r\n", "signed"),
    ],
)
def test_message_that_conversion_would_damage_bounces(content, why):
    with pytest.raises(NotConvertible, match=why):
        survey(content.encode())


def test_signed_part_stays_when_only_another_part_needs_a_conversion():
    signed = "Content-Type: multipart/signed; boundary=s\r\n\r\n--s\r\n\r\na = b \r\n--s--\r\n"
    content = (
        f"{MIME}Content-Type: multipart/mixed; boundary=m\r\n\r\n--m\r\n{signed}--m\r\n\r\n"
        "å\r\n--m--\r\n"
    )
    out = converted(content)
    assert signed.encode() in out
    assert b"=C3=A5" in out


def test_parts_nested_too_deeply_are_not_walked():
    content = "".join(
        f"Content-Type: multipart/mixed; boundary=b{n}x\r\n\r\n--b{n}x\r\n"
        for n in range(MOST_DEPTH + 1)
    )
    with pytest.raises(NotConvertible, match="nested"):
        survey(content.encode())


def test_messages_nested_too_deeply_are_not_walked():
    inner = b"Content-Type: message/rfc822\r\n\r\n"
    assert converted(inner * MOST_DEPTH + "\r\nå\r\n".encode()).isascii()
    with pytest.raises(NotConvertible, match="nested"):
        survey(inner * (MOST_DEPTH + 1) + "\r\nå\r\n".encode())


def test_parts_beside_each_other_are_not_nested():
    inner = "Content-Type: message/rfc822\r\n\r\n\r\nå\r\n"
    many = f"{MIME}Content-Type: multipart/mixed; boundary=b\r\n\r\n" + f"--b\r\n{inner}" * 1000
    assert converted(many + "--b--\r\n").isascii()


def test_a_delimiter_of_two_multiparts_is_that_of_the_inner_one_while_it_is_open():
    kind = MIME + "Content-Type: multipart/mixed; boundary={}\r\n\r\n"
    same = kind.format("a") + "--a\r\n" + kind.format("a") + "--a\r\n\r\nå\r\n--a--\r\n"
    same += "--a\r\n\r\nü\r\n--a--\r\nepilogue\r\n"
    longer = kind.format("x") + "--x\r\n" + kind.format("x--") + "--x--\r\n\r\nå\r\n--x----\r\n"
    longer += "--x\r\n\r\nü\r\n--x--\r\n"
    for content in (same, longer):
        out = converted(content)
        assert out.count(b"=C3=A5\r\n") == out.count(b"=C3=BC\r\n") == 1


def _nested(within: bytes, depth: int) -> bytes:
    fields = b"".join(
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(depth)
    )
    return MIME.encode() + fields + b"\r\n" + within + "å\r\n".encode()


def seconds(content: bytes) -> float:
    began = time.process_time()
    converted(content)
    return time.process_time() - began


@pytest.mark.parametrize("line", [b"--\r\n", b"--b0 x\r\n", b"--b0\r\n\r\nx\r\n"])
def test_a_line_costs_no_more_however_deep_parts_are_nested(line):
    lines = line * (200_000 if b"\r\n\r\n" not in line else 9000)
    flat, deep = (
        min(seconds(_nested(lines, depth)) for _ in range(3)) for depth in (1, MOST_DEPTH - 2)
    )
    assert deep < 1.4 * flat


def test_a_conversion_is_linear_in_parts():
    def parts(count: int) -> bytes:
        inner = b"--b0\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n"
        return _nested(b"", 1) + inner * count

    assert seconds(parts(4900)) < 20 * max(seconds(parts(490)), 0.002)


def test_a_header_section_of_two_megabytes_costs_one_search():
    assert seconds(b"a:\r\n" * 480_000 + "\r\nå\r\n".encode()) < 0.5


def test_many_small_parts_are_not_walked_for_ever():
    with pytest.raises(NotConvertible, match="too many"):
        survey(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 20_000)


# --- any octets ---------------------------------------------------------------------------------

LINES = (
    "--a",
    "--a--",
    "--b",
    "--b--",
    "--ab",
    "--a b",
    "-",
    "--",
    "",
    "text å ",
    "=",
    ".",
    " folded",
)
FIELDS = (
    "MIME-Version: 1.0",
    "Content-Transfer-Encoding: 8bit",
    "Content-Type: image/x",
    "Content-Type: text/html; charset=utf-8",
    "Content-Type: message/rfc822",
    "Content-Type: multipart/mixed; boundary=a",
    'Content-Type: multipart/digest; boundary="b"',
    "Content-Type: multipart/signed; boundary=b",
)
CONTENT = st.lists(st.sampled_from(LINES + FIELDS), max_size=40).map(
    lambda lines: "\r\n".join(lines).encode()
)


@given(CONTENT | st.binary(max_size=200), st.integers(1, 30))
def test_a_walk_tells_all_of_any_content_however_it_is_cut(content, step):
    scribe = Scribe()
    walk = Walk(scribe)
    try:
        for start in range(0, len(content), step):
            walk.feed(content[start : start + step])
        walk.finish()
    except TooComplex:
        return
    assert b"".join(scribe.told) == content


@example(b"Content-Transfer-Encoding: 8bit\r\nContent-Type: message/rfc822", 30)
@example(
    b"Content-Transfer-Encoding: 8bit\r\nContent-Type: message/rfc822\r\n\r\nSubject: x\r\n", 30
)
@example(b"Content-Type: message/rfc822\r\nContent-Transfer-Encoding: 8bit", 30)
@given(CONTENT, st.integers(1, 30))
def test_converted_content_is_ascii_and_does_not_depend_on_the_cut(content, step):
    try:
        whole = converted(content)
    except NotConvertible:
        with pytest.raises(NotConvertible):
            converted(content, step)
        return
    assert whole.isascii()
    assert converted(content, step) == whole
    if content.isascii():
        assert whole.replace(b"7bit", b"8bit") == content


TEXT = st.lists(
    st.sampled_from(["å", "=", "x" * 70, " ", "\t", "\r\n", "y", ".", "日本"]), max_size=60
).map("".join)


@given(
    st.lists(
        st.tuples(st.sampled_from(["text/plain", "text/html", "application/x"]), TEXT), min_size=1
    )
)
def test_each_part_says_after_the_conversion_what_it_said_before(parts):
    sections = [f"--limit\r\nContent-Type: {kind}\r\n\r\n{text}\r\n" for kind, text in parts]
    content = (
        MIME
        + 'Content-Type: multipart/mixed; boundary="limit"\r\n\r\n'
        + "".join(sections)
        + "--limit--\r\n"
    )
    assert leaves(converted(content)) == [(kind, text.encode()) for kind, text in parts]
