"""What we write on top of a message, and what we read there."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from relay.mail.section import HeaderSection, Sections
from relay.receive.access import User
from relay.receive.session import Session, TlsFacts
from relay.receive.spec import ListenerSpec, TcpAddress, UnixAddress, parse_address
from relay.receive.trace import protocol_of, received_field
from relay.submit.trace import Arrival, missing_fields

ARRIVAL = Arrival("relay.example", "Q1", datetime(2026, 3, 5, 7, 8, 9, 123, tzinfo=UTC))
SPEC = ListenerSpec("127.0.0.1:0")
TLS = TlsFacts("TLSv1.3", "TLS_AES_256_GCM_SHA384")
USER = User("u", "hash")


def session(**facts) -> Session:
    return Session(
        SPEC, **{"client": "192.0.2.1", "helo": "client.example", "extended": True, **facts}
    )


@pytest.mark.parametrize(
    ("facts", "smtputf8", "name"),
    [
        ({"extended": False}, False, "SMTP"),
        ({}, False, "ESMTP"),
        ({"tls": TLS}, False, "ESMTPS"),
        ({"user": USER}, False, "ESMTPA"),
        ({"tls": TLS, "user": USER}, False, "ESMTPSA"),
        ({}, True, "UTF8SMTP"),
        ({"tls": TLS, "user": USER}, True, "UTF8SMTPSA"),
    ],
)
def test_the_protocol_has_the_name_that_is_registered(facts, smtputf8, name):
    assert protocol_of(session(**facts), smtputf8=smtputf8) == name


def received(*, only_for: str = "", **facts) -> str:
    return received_field(session(**facts), ARRIVAL, only_for=only_for).decode()


def test_the_received_field_says_who_how_and_when():
    assert received(tls=TLS, only_for="b@example.net") == (
        "Received: from client.example ([192.0.2.1])\r\n"
        "\t(using TLSv1.3 with cipher TLS_AES_256_GCM_SHA384)\r\n"
        "\tby relay.example with ESMTPS id Q1\r\n"
        "\tfor <b@example.net>;\r\n"
        "\tThu, 5 Mar 2026 07:08:09 +0000\r\n"
    )


@pytest.mark.parametrize(
    ("client", "shown"),
    [("2001:db8::1", "([IPv6:2001:db8::1])"), ("", "(local)"), (None, "(unknown)")],
)
def test_the_received_field_says_where_from_as_far_as_that_is_known(client, shown):
    assert shown in received(client=client)


@pytest.mark.parametrize("helo", ["(comment", "a)b", "a;b", 'a"b', "a\\b", "<a>", "x" * 300, "-a"])
def test_no_helo_ends_the_received_field_or_opens_a_comment(helo):
    assert received(helo=helo).startswith("Received: from unknown ([192.0.2.1])\r\n")


@pytest.mark.parametrize(
    "helo", ["localhost", "my_host.example", "[192.0.2.1]", "[IPv6:2001:db8::1]"]
)
def test_a_helo_that_is_a_name_or_a_literal_is_shown(helo):
    assert received(helo=helo).startswith(f"Received: from {helo} (")


def test_hops_are_received_fields_in_any_case():
    header = b"Received: a\r\nRECEIVED : b\r\n\treceived: folded\r\nX-Received: c\r\nreceived:d\r\n"
    assert HeaderSection(header).count(b"received") == 3
    assert HeaderSection(b"").count(b"received") == 0


@pytest.mark.parametrize(
    ("header", "added"),
    [
        (b"Date: x\r\nMessage-ID: <a@b>\r\nFROM: x\r\n", b""),
        (b"DATE : x\r\nFrom: x\r\n", b"Message-ID: <Q1@relay.example>\r\n"),
        (b"Message-Id: x\r\nFrom: x\r\n", b"Date: Thu, 5 Mar 2026 07:08:09 +0000\r\n"),
        (b"Message-Id: x\r\nDate: x\r\n", b"From: <a@example.com>\r\n"),
    ],
)
def test_only_missing_fields_are_added(header, added):
    found = missing_fields(HeaderSection(header), ARRIVAL, reverse_path="a@example.com")
    assert found == added


@pytest.mark.parametrize(
    ("content", "header", "rest", "displaced"),
    [
        (b"", b"", b"", b""),
        (b"A: b\r\n\r\nx\r\n", b"A: b\r\n", b"\r\nx\r\n", b""),
        (
            b"A: b\r\n c\r\n\td: e\r\n\r\nx: y\r\n",
            b"A: b\r\n c\r\n\td: e\r\n", b"\r\nx: y\r\n", b"",
        ),
        (b"A: b\r\n", b"A: b\r\n", b"", b""),
        (b"A: b", b"A: b", b"", b""),
        (b"\r\nx\r\n\r\ny", b"", b"\r\nx\r\n\r\ny", b"x\r\n"),
        (b"\r\n\r\n \r\nx\r\n\r\ny", b"", b"\r\n\r\n \r\nx\r\n\r\ny", b"x\r\n"),
        (b"text\r\n\r\nx\r\n\r\ny", b"", b"\r\ntext\r\n\r\nx\r\n\r\ny", b"text\r\nx\r\n"),
        (b"From a@b Fri\r\n\r\nx\r\n\r\ny", b"X-Mailbox-Line: From a@b Fri\r\n",
         b"\r\nx\r\n\r\ny", b"x\r\n"),
        (b"\xef\xbb\xbf\r\n\r\nx\r\n", b"", b"\r\n\xef\xbb\xbf\r\n\r\nx\r\n",
         b"\xef\xbb\xbf\r\nx\r\n"),
        (b"no field\r\nA: b\r\n", b"", b"\r\nno field\r\nA: b\r\n", b"no field\r\nA: b\r\n"),
        (b"see https://example.com\r\n", b"", b"\r\nsee https://example.com\r\n",
         b"see https://example.com\r\n"),
        (b" folded: x\r\n", b"", b"\r\n folded: x\r\n", b" folded: x\r\n"),
        (b"A : b\r\n", b"A : b\r\n", b"", b""),
        (b"A: b\r\nHello,\r\nC: d\r\n\r\nx\r\n", b"A: b\r\n", b"\r\nHello,\r\nC: d\r\n\r\nx\r\n",
         b"Hello,\r\nC: d\r\n"),
        (b"From a@b Fri Nov 27\r\nA: b\r\n\r\nx\r\n",
         b"X-Mailbox-Line: From a@b Fri Nov 27\r\nA: b\r\n", b"\r\nx\r\n", b""),
        (b">From a@b\r\nA: b\r\n", b"X-Mailbox-Line: >From a@b\r\nA: b\r\n", b"", b""),
        (b"\xef\xbb\xbfA: b\r\n", b"", b"\r\n\xef\xbb\xbfA: b\r\n", b"\xef\xbb\xbfA: b\r\n"),
        (b"A: b\rX: y\r\n\r\n", b"A: b\rX: y\r\n", b"\r\n", b""),
    ],
)  # fmt: skip
def test_the_header_section_ends_at_the_first_line_that_is_no_field(
    content, header, rest, displaced
):
    assert tuple(Sections.of(content)) == (header, rest, displaced)


def test_a_header_section_of_a_megabyte_is_split_in_one_pass():
    fields = b"a:\r\n" * 250_000
    began = time.process_time()
    assert Sections.of(fields + b"\r\nx").header == fields
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:25", TcpAddress("127.0.0.1", 25)),
        ("[::1]:2525", TcpAddress("::1", 2525)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("unix:/run/smtp.sock", UnixAddress("/run/smtp.sock")),
    ],
)
def test_an_address_to_listen_on_is_read_and_written_the_same_way(text, address):
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "25", ":25", "host", "host:", "host:x", "host:70000", "::1:25", "unix:"]
)
def test_invalid_address_to_listen_on_is_refused(text):
    with pytest.raises(ValueError, match=r"address|path"):
        parse_address(text)
