"""What the delivery log shows of a message's header."""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.mail.section import HeaderSection
from relay.queue.entry import MessageSummary
from relay.queue.summary import MAX_CHARS, readable
from relay.queue.summary import summarise as summarise_section


def summarise(header: bytes) -> MessageSummary:
    return summarise_section(HeaderSection(header))


def subject(value):
    return summarise(
        b"From: a@example.com\r\nSubject: " + value + b"\r\nTo: b@example.net\r\n"
    ).subject


def test_the_four_fields_people_look_for_are_shown():
    header = (
        b"Received: from x\r\n\tby y\r\nMessage-ID: <1@example.com>\r\n"
        b"FROM: Alice <a@example.com>\r\n"
        b"to : b@example.net\r\nsubject:Hello\r\n\r\n"
    )
    assert summarise(header) == MessageSummary(
        "1@example.com", "Alice <a@example.com>", "b@example.net", "Hello"
    )


def test_a_message_without_them_shows_nothing():
    assert summarise(b"") == summarise(b"X-Subject: a\r\n") == MessageSummary()


def test_the_first_of_two_fields_counts():
    assert summarise(b"Subject: one\r\nSubject: two\r\n").subject == "one"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"two\r\n lines", "two lines"),
        (b"a\ttab", "a tab"),
        (b"=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        (b"=?UTF-8?B?R3LDvMOfZQ==?=", "Grüße"),
        (b"=?iso-8859-1?Q?caf=E9_noir?=", "café noir"),
        (b"=?utf-8*de?q?=C3=BC?=", "ü"),
        (b"Re: =?utf-8?q?a?= b", "Re: a b"),
        (b"=?utf-8?q?a?= =?utf-8?q?b?=", "ab"),
        (b"=?utf-8?q?a?=\r\n =?iso-8859-1?q?=E9?=", "aé"),
        (
            b"=?utf-8?b?4oI=?= =?utf-8?b?rA==?=",
            "€",
        ),  # one character in two words, against RFC 2047 §5
        (b"=?nonsense?q?=41=E9?=", "A\ufffd"),
        (b"=?utf-8?b?a?=", "=?utf-8?b?a?="),
        (b"=?utf-8?q?unfinished", "=?utf-8?q?unfinished"),
        ("Grüße".encode(), "Grüße"),
        (b"caf\xe9", "caf\ufffd"),
        (b"\x1b[31mred\x07", "\ufffd[31mred\ufffd"),
        (b"=?utf-8?q?a=0D=0ABcc=3A?=", "a\ufffd\ufffdBcc:"),
        ("a\u202eb\u2028c".encode(), "a\ufffdb\ufffdc"),
        ("👩\u200d🚀".encode(), "👩\u200d🚀"),
        (b"=?utf-7?q?+2AA-?=", "\ufffd"),  # a lone surrogate
        (b"x" * 1000, "x" * MAX_CHARS),
    ],
)
def test_a_field_is_shown_as_a_person_reads_it(raw, shown):
    assert subject(raw) == shown


def test_bare_line_end_begins_no_field():
    summary = summarise(b"X: a\nSubject: forged\rSubject: forged\r\n")
    assert summary.subject == ""


@pytest.mark.parametrize(
    ("fields", "by_program"),
    [
        (b"Auto-Submitted: auto-generated\r\n", True),
        (b"Auto-Submitted: auto-replied; owner-email=x\r\n", True),
        (b"Auto-Submitted: no\r\n", False),
        (b"Auto-Submitted: No (really)\r\n", False),
        (b"Precedence: bulk\r\n", True),
        (b"Precedence: LIST\r\n", True),
        (b"Precedence: first-class\r\n", False),
        (b"", False),
    ],
)
def test_a_message_says_that_a_program_made_it(fields, by_program):
    assert summarise(fields).auto_submitted is by_program


@pytest.mark.parametrize(
    "evil",
    [
        b"Subject: " + b"\r\n a" * 1_000_000,
        b"Subject: " + b"\r" * 1_000_000,
        b"Subject: " + b"=?utf-8?q?" * 100_000,
        b"Subject: " + b"?= =?" * 100_000,
        b"\r\nsubject" * 100_000,
        b"Subject: =?utf-8?q?a?=" + b" " * 100_000 + b"x",
    ],
)
def test_a_header_made_to_be_slow_is_not(evil):
    began = time.process_time()
    assert len(summarise(evil).subject) <= MAX_CHARS
    assert time.process_time() - began < 2


@given(st.binary(max_size=300))
@example(b"=?utf-8?q?=")
@example(b"=?punycode?q?\xff?=")
@example(b"=?unicode_escape?q?=5Cud800?=")
@example(b"=?idna?q?=2E=2E?=")
def test_summary_of_any_header_is_one_harmless_line(value):
    text = subject(value)
    assert len(text) <= MAX_CHARS
    assert not any(ord(char) < 32 or char in "\x7f\u2028\u2029" for char in text)
    assert json.loads(json.dumps(text).encode("utf-8")) == text
    text.encode("utf-8")


@given(
    st.sampled_from(
        [
            "utf-8",
            "iso-8859-1",
            "utf-7",
            "utf-16",
            "unicode_escape",
            "punycode",
            "hz",
            "rot13",
            "hex",
        ]
    ),
    st.sampled_from("qQbB"),
    st.text(alphabet="abcXYZ019=+/_", max_size=60),
)
def test_subject_in_any_charset_and_encoding_can_be_written_in_utf8(charset, encoding, text):
    shown = subject(f"=?{charset}?{encoding}?{text}?=".encode())
    assert shown.encode("utf-8").decode("utf-8") == shown


def test_a_charset_that_a_stranger_made_up_is_never_looked_up():
    """Python keeps every name of a codec it was asked for, for the life of the process."""
    from encodings import _cache

    before = len(_cache)
    for number in range(100):
        readable(b"=?made-up-%d?q?hello?=" % number)
        readable(b"=?x-iso-8859-%d?b?aGVsbG8=?=" % (number + 20))
    assert len(_cache) == before
    assert readable(b"=?made-up?q?hello?=") == "hello"
    assert readable(b"=?iso-8859-15?q?=A4?=") == "\N{EURO SIGN}"
