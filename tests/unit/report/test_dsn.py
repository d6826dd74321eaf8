"""What a sender gets back, read with a mail program's eyes."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.policy import SMTP, default

import pytest
from flufl.bounce import all_failures
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.envelope import Notify, Ret
from relay.mail.outcome import Bounced, Deferred, Delivered, HopSession, VerifiedBy
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import Entry, MessageSummary, QueuedMessage, QueuedRecipient
from relay.queue.retry import RetrySchedule
from relay.queue.settle import settle
from relay.report.dsn import MAX_CONTENT_BYTES, compose, returns_content

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
PLAIN = TlsSettings(Setting(False, Source.DEFAULT), Setting(False, Source.DEFAULT))
TLS = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.DEFAULT))
SESSION = HopSession("mx.example.net", "192.0.2.7", tls=True, verified_by=VerifiedBy.PKIX)
UNKNOWN = Bounced("5.1.1", 550, "5.1.1 no such user\nreally", session=SESSION)
BUSY = Deferred("4.2.1", 450, "4.2.1 busy", session=SESSION)
HEADER = b"Message-ID: <1@example.com>\r\nFrom: a@example.com\r\nSubject: Hello\r\n"
CONTENT = HEADER + b"\r\nsecret body\r\n"


def report_of(
    outcome, *, age=HOUR, address="bob@example.net", settings=PLAIN, orcpt="", notify=(), **message
):
    facts = {"queue_id": "Q1", "reverse_path": "a@example.com", "arrived": NOON, "size_bytes": 586}
    facts["summary"] = MessageSummary("1@example.com", "a@example.com", "bob", "Hello")
    about = QueuedMessage(**{**facts, **message})
    recipient = QueuedRecipient(
        0, address, "example.net", settings, orcpt=orcpt, notify=frozenset(notify)
    )
    settlement = settle(
        Entry(about, (recipient,)), {0: outcome}, schedule=RetrySchedule(), now=NOON + age
    )
    return settlement.reports[0]


def write(report, *, header=HEADER, content=None, hostname="relay.example.net"):
    return compose(
        report, header=header, hostname=hostname, queue_id="D1", now=NOON + HOUR, content=content
    )


def read(raw):
    """The DSN, its text, the fields of the message, those of each recipient, and the last part."""
    dsn = message_from_bytes(raw, policy=default)
    text, status, returned = dsn.iter_parts()
    about, *recipients = list(status.get_payload())
    return dsn, text, about, recipients, returned


def test_dsn_describes_a_failure_for_people_and_for_programs():
    dsn, text, about, recipients, returned = read(
        write(report_of(UNKNOWN, orcpt="rfc822;Bob+2B1@example.org"))
    )

    assert dsn.get_content_type() == "multipart/report"
    assert dsn.get_param("report-type") == "delivery-status"
    assert dsn["From"] == "Mail Delivery System <MAILER-DAEMON@relay.example.net>"
    assert dsn["To"] == "<a@example.com>" or dsn["To"].addresses[0].addr_spec == "a@example.com"
    assert dsn["Auto-Submitted"] == "auto-replied"
    assert dsn["Message-ID"] == "<D1@relay.example.net>"
    assert dsn["In-Reply-To"] == dsn["References"] == "<1@example.com>"
    assert dsn["Date"].datetime == NOON + HOUR
    assert dsn["MIME-Version"] == "1.0"
    assert not dsn.defects

    words = text.get_content()
    for said in (
        "<bob@example.net>",
        "mx.example.net [192.0.2.7]",
        "550 5.1.1 no such user",
        "really",
    ):
        assert said in words
    assert "Check the address" in words

    assert about["Reporting-MTA"] == "dns; relay.example.net"
    assert about["Arrival-Date"] == "Sun, 01 Mar 2026 12:00:00 +0000"
    (bob,) = recipients
    assert bob["Original-Recipient"] == "rfc822; Bob+1@example.org"
    assert bob["Final-Recipient"] == "rfc822; bob@example.net"
    assert bob["Action"] == "failed"
    assert bob["Status"] == "5.1.1"
    assert bob["Remote-MTA"] == "dns; mx.example.net"
    assert bob["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user really"
    assert bob["Last-Attempt-Date"] == "Sun, 01 Mar 2026 13:00:00 +0000"
    assert "Will-Retry-Until" not in bob

    assert returned.get_content_type() == "text/rfc822-headers"
    assert returned.get_content().startswith("Message-ID: <1@example.com>")


def test_delay_notice_says_until_when_the_relay_tries():
    dsn, text, _, (bob,), _ = read(write(report_of(BUSY, age=4 * HOUR)))
    assert dsn["Subject"] == "Your message is delayed"
    assert bob["Action"] == "delayed"
    assert bob["Status"] == "4.2.1"
    assert bob["Will-Retry-Until"] == "Fri, 06 Mar 2026 12:00:00 +0000"
    assert "need not send it again" in " ".join(text.get_content().split())


@pytest.mark.parametrize(
    ("outcome", "facts", "found"),
    [
        (UNKNOWN, {}, ("failed", "bob@example.net")),
        (UNKNOWN, {"address": "Bob+tag@example.net"}, ("failed", "Bob+tag@example.net")),
        (UNKNOWN, {"orcpt": "rfc822;old@example.org"}, ("failed", "old@example.org")),
        (UNKNOWN, {"settings": TLS}, ("failed", "bob@example.net")),
        (BUSY, {"age": 4 * HOUR}, ("delayed", "bob@example.net")),
        (BUSY, {"age": 5 * DAY}, ("failed", "bob@example.net")),
        (Delivered("2.0.0", 250, "OK"), {"notify": [Notify.SUCCESS]}, ("relayed", "")),
    ],
)
def test_a_list_manager_finds_in_each_report_who_it_is_about(outcome, facts, found):
    """Mailman's reader of bounces: who failed is taken off a list, who is delayed is not."""
    kind, address = found
    for content in (None, CONTENT):
        report = message_from_bytes(write(report_of(outcome, **facts), content=content))
        temporary, permanent = all_failures(report)
        assert set(permanent) == ({address.encode()} if kind == "failed" else set())
        assert set(temporary) == ({address.encode()} if kind == "delayed" else set())


def test_a_message_handed_to_a_host_without_dsn_is_relayed():
    report = report_of(
        Delivered("2.0.0", 250, "2.0.0 OK", session=SESSION), notify=[Notify.SUCCESS]
    )
    _, _, _, (bob,), _ = read(write(report))
    assert bob["Action"] == "relayed"
    assert bob["Status"] == "2.0.0"


def test_dsn_of_an_expired_recipient_has_the_last_answer():
    _, text, _, (bob,), _ = read(write(report_of(BUSY, age=5 * DAY)))
    assert bob["Status"] == "4.4.7"
    assert bob["Diagnostic-Code"] == "smtp; 450 4.2.1 busy"
    assert "Given up after 5 days" in text.get_content()


def test_tls_that_stayed_unmet_names_every_host_and_its_reason():
    hosts = ("mx1.example.net: STARTTLS not offered", "mx2.example.net: certificate has expired")
    unmet = Deferred(
        "4.7.5", 0, "", description="no host proved itself", tls_unmet=True, hosts=hosts
    )
    _, text, _, (bob,), _ = read(write(report_of(unmet, age=5 * DAY, settings=TLS)))
    assert bob["Status"] == "5.7.5"
    assert bob["Diagnostic-Code"] == "x-relay; no host proved itself"
    for host in hosts:
        assert host in text.get_content()
    assert "protected connection" in text.get_content()


def test_a_code_of_our_own_is_no_reply_of_a_host():
    dead = Deferred("4.4.1", 680, "", description="no connection to any host")
    _, text, _, (bob,), _ = read(write(report_of(dead, age=5 * DAY)))
    assert bob["Diagnostic-Code"] == "x-relay; no connection to any host"
    assert "answered" not in text.get_content()


def test_dsn_says_that_a_host_may_have_the_message():
    silent = Deferred("4.4.2", 0, "", description="silence after the final dot", in_doubt=True)
    text = read(write(report_of(silent, age=5 * DAY)))[1]
    assert "so it may have arrived" in text.get_content()


def test_the_envelope_id_comes_back_without_xtext():
    about = read(write(report_of(UNKNOWN, envid="id+3D1")))[2]
    assert about["Original-Envelope-Id"] == "id=1"


@pytest.mark.parametrize("orcpt", ["", "nonsense", ";x", "rfc822;", "a b;c"])
def test_an_original_recipient_that_is_none_is_left_out(orcpt):
    assert "Original-Recipient" not in read(write(report_of(UNKNOWN, orcpt=orcpt)))[3][0]


# What comes back of the message.


@pytest.mark.parametrize(
    ("ret", "settings", "outcome", "whole"),
    [
        (Ret.FULL, PLAIN, UNKNOWN, True),
        (Ret.HDRS, PLAIN, UNKNOWN, False),
        (None, PLAIN, UNKNOWN, False),
        (Ret.FULL, TLS, UNKNOWN, False),
        (Ret.FULL, PLAIN, BUSY, False),
    ],
)
def test_the_whole_message_comes_back_only_if_asked_and_if_it_may_travel_in_clear(
    ret, settings, outcome, whole
):
    report = report_of(outcome, age=HOUR if outcome is UNKNOWN else DAY, settings=settings, ret=ret)
    assert returns_content(report) is whole
    raw = write(report, content=CONTENT)
    assert (b"secret body" in raw) is whole
    returned = read(raw)[4]
    assert returned.get_content_type() == ("message/rfc822" if whole else "text/rfc822-headers")


@pytest.mark.parametrize(
    "content",
    [
        HEADER + b"\r\n" + b"x" * MAX_CONTENT_BYTES,
        HEADER + b"\r\n" + b"x" * 999 + b"\r\n",
        HEADER + b"\r\na\x00b\r\n",
        HEADER + b"\r\na\nb\r\n",
        b"Subject: \xc3\xbc\r\n" + HEADER + b"\r\nbody\r\n",
    ],
)
def test_a_message_that_cannot_be_returned_whole_comes_back_as_its_header(content):
    raw = write(report_of(UNKNOWN, ret=Ret.FULL), content=content)
    assert read(raw)[4].get_content_type() == "text/rfc822-headers"


def test_a_body_of_eight_bits_comes_back_as_it_was():
    raw = write(report_of(UNKNOWN, ret=Ret.FULL), content=HEADER + "\r\nGrüße\r\n".encode())
    assert "Grüße".encode() in raw
    assert b"Content-Transfer-Encoding: 8bit" in raw


def test_a_header_that_no_host_would_take_is_encoded():
    header = HEADER + b"X-Long: " + b"y" * 2000 + b"\r\nX-Odd: \xfc\x00\rz\r\n"
    raw = write(report_of(UNKNOWN), header=header)
    _hold_lines(raw)
    assert raw.isascii()
    returned = list(message_from_bytes(raw).walk())[-1].get_payload(decode=True)
    assert isinstance(returned, bytes)
    assert returned.startswith(header.rstrip(b"\r\n"))


def test_report_returns_some_lines_of_an_endless_header():
    raw = write(report_of(UNKNOWN), header=b"X-Filler: 0123456789\r\n" * 20_000)
    assert 32_000 < len(raw) < 80_000


def test_dsn_with_the_header_section_returns_no_line_of_the_body():
    assert b"secret" not in write(report_of(UNKNOWN), header=CONTENT)


def test_longest_address_is_complete_in_its_event():
    address = f"{'l' * 886}@example.net"
    raw = write(report_of(UNKNOWN, address=address, reverse_path=f"..{address[2:]}"))
    assert read(raw)[3][0]["Final-Recipient"] == f"rfc822; {address}"
    assert f'\r\nTo: <"..{"l" * 884}"@example.net>\r\n'.encode() in raw
    assert max(map(len, raw.split(b"\r\n"))) <= 998


# Addresses beyond ASCII (RFC 6533).


def test_an_address_beyond_ascii_is_encoded_for_an_ascii_sender():
    raw = write(report_of(UNKNOWN, address="bücher@example.net"))
    assert raw.isascii()
    assert read(raw)[3][0]["Final-Recipient"] == r"utf-8; b\x{FC}cher@example.net"


def test_a_sender_beyond_ascii_gets_the_international_form():
    raw = write(report_of(UNKNOWN, address="bücher@example.net", reverse_path="jürgen@example.com"))
    assert "To: <jürgen@example.com>\r\n".encode() in raw
    assert b"Content-Type: message/global-delivery-status\r\n" in raw
    assert b"Content-Type: message/global-headers\r\n" in raw
    assert "Final-Recipient: utf-8; bücher@example.net\r\n".encode() in raw


@pytest.mark.parametrize("reverse_path", ["a@example.com", "jürgen@example.com"])
def test_a_header_in_no_known_charset_is_encoded_whoever_it_goes_to(reverse_path):
    raw = write(report_of(UNKNOWN, reverse_path=reverse_path), header=b"Subject: caf\xe9\r\n")
    raw.decode("utf-8")
    assert b"Content-Type: text/rfc822-headers; charset=iso-8859-1\r\n" in raw
    assert b"Subject: caf=E9\r\n" in raw


# Nothing hostile gets through, and nothing is refused.


def _hold_lines(raw):
    assert b"\x00" not in raw
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", raw)
    assert max(map(len, raw.split(b"\r\n"))) <= 998


@pytest.mark.parametrize(
    "text",
    [
        "x\r\nBcc: victim@example.com",
        "x\r\n\r\n--D1/1--\r\n",
        "x\n\nFinal-Recipient: rfc822; other@example.com",
        "\x1b[2J\u202e\u2028",
        "\udcff",
        "z" * 50_000,
        "ü" * 5_000,
        " " * 3000,
    ],
)
def test_no_text_of_a_peer_begins_a_field_or_ends_a_part(text):
    hostile = replace(UNKNOWN, message=text, description=text, hosts=(text,) * 3)
    raw = write(
        report_of(
            hostile,
            orcpt=f"rfc822;{text}",
            envid=text,
            summary=MessageSummary(text, text, text, text),
        )
    )
    _hold_lines(raw)
    assert raw.isascii()
    dsn, _, about, recipients, _ = read(raw)
    assert "Bcc" not in dsn
    assert len(recipients) == 1
    assert recipients[0].keys().count("Final-Recipient") == 1
    assert set(about.keys()) <= {
        "Reporting-MTA",
        "Original-Envelope-Id",
        "Arrival-Date",
        "X-Queue-ID",
    }


def test_xtext_cannot_smuggle_a_line_end():
    _, _, about, (bob,), _ = read(
        write(report_of(UNKNOWN, orcpt="rfc822;a+0D+0AAction: delivered", envid="a+0D+0AX: y"))
    )
    assert bob.keys().count("Action") == 1
    assert "X" not in about


def test_a_message_id_that_is_none_starts_no_thread():
    dsn = read(write(report_of(UNKNOWN), header=b"Message-ID: <a\r\n b@c> x\r\n"))[0]
    assert "In-Reply-To" not in dsn


def test_a_boundary_is_never_found_inside_a_part():
    raw = write(report_of(UNKNOWN), header=b"X: --D1/1\r\nY: --D1/2\r\n")
    assert message_from_bytes(raw, policy=SMTP).get_boundary() == "D1/3"


anything = st.text(alphabet=st.characters(exclude_categories=()), max_size=60)


@given(
    address=anything,
    reverse_path=st.text(alphabet=st.characters(exclude_categories=()), min_size=1, max_size=60),
    message=anything,
    hostname=anything,
    header=st.binary(max_size=200),
    content=st.none() | st.binary(max_size=200),
    orcpt=anything,
    kind=st.sampled_from([UNKNOWN, BUSY, Deferred("4.4.1", 680, "")]),
)
def test_a_report_is_made_whatever_the_texts_are(
    address, reverse_path, message, hostname, header, content, orcpt, kind
):
    outcome = replace(
        kind, message=message, description=message, session=replace(SESSION, mx_host=message)
    )
    report = report_of(
        outcome,
        age=HOUR if kind is UNKNOWN else 5 * DAY,
        address=address,
        orcpt=orcpt,
        ret=Ret.FULL,
        envid=orcpt,
        reverse_path=reverse_path,
        summary=MessageSummary(message, message, message, message),
    )
    raw = compose(
        report, header=header, hostname=hostname, queue_id=hostname, now=NOON, content=content
    )
    _hold_lines(raw)
    raw.decode("utf-8" if content is None else "latin-1")
    dsn = message_from_bytes(raw)
    assert dsn.get_content_type() == "multipart/report"
    assert len(dsn.get_payload()) == 3


def test_dsn_lists_a_thousand_recipients_and_its_text_stays_readable():
    about = report_of(UNKNOWN)
    crowd = replace(about, changes=about.changes * 1000)
    _, text, _, recipients, _ = read(write(crowd))
    assert len(recipients) == 1000
    assert "And 900 more recipients" in text.get_content()
