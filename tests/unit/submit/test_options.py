"""Mailgun's header fields: what a message may ask for in them, and what is refused by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.section import ASKING, HeaderSection, Sections
from relay.policy.fields import Wishes, refuse_fields_in_body
from relay.policy.rules import PolicyRules
from relay.queue.entry import Terms
from relay.submit.message import JudgedHeader, Refusal, judge_header
from relay.submit.options import Contradiction, Options, combined, read_options
from relay.submit.trace import Arrival

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
LATER = "Fri, 20 Nov 2026 14:00:00 +0100"


def opened(header: bytes, options: Options | None = None) -> JudgedHeader | Refusal:
    sections = Sections.of(header)
    return judge_header(
        HeaderSection(sections.header),
        Arrival("relay.example", "Q", NOW),
        reverse_path="a@example.com",
        domains={"example.net"},
        rules=PolicyRules(),
        received_hops=50,
        on_top=b"",
        options=options,
        displaced=sections.behind,
    )


@pytest.mark.parametrize(
    ("fields", "terms"),
    [
        (
            "X-Mailgun-Tag: a\r\nX-Mailgun-Tag: b\r\nx-mailgun-tag:\r\n a\r\n",
            Terms(tags=("a", "b")),
        ),
        ("X-Mailgun-Tag: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n", Terms(tags=("Grüße",))),
        ("X-Mailgun-Drop-Message: Yes\r\n", Terms(is_test=True)),
        ("X-Mailgun-Drop-Message: no\r\n", Terms()),
        ("X-Mailgun-Dkim: no\r\n", Terms(is_signed=False)),
        ("X-Mailgun-DKIM: yes\r\n", Terms()),
        ("X-Mailgun-Deliver-Within: 1h30m\r\n", Terms(lifetime=timedelta(minutes=90))),
        (f"X-Mailgun-Deliver-By: {LATER}\r\n", Terms(not_before=NOW + timedelta(hours=1))),
        ("X-Mailgun-Deliver-By: Fri, 20 Nov 2020 13:00:00 +0000\r\n", Terms()),
        ('X-Mailgun-Variables: {"a": "x",\r\n "b": {"c": [1, true]}}\r\n',
         Terms(variables=(("a", "x"), ("b", '{"c":[1,true]}')))),
        ('X-Mailgun-Variables: {"a": 1}\r\nX-Mailgun-Variables: {"a": 1, "ü": null}\r\n',
         Terms(variables=(("a", "1"), ("ü", "null")))),
    ],
)  # fmt: skip
def test_a_field_is_obeyed_and_taken_out(fields, terms):
    found = opened(b"From: a@b.example\r\n" + fields.encode() + b"Subject: x\r\n")
    assert isinstance(found, JudgedHeader)
    assert found.header == b"From: a@b.example\r\nSubject: x\r\n"
    if found.terms is not None:
        assert found.terms == terms
    else:
        assert terms == Terms()
    assert found.due == (terms.not_before or NOW)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("X-Mailgun-Drop-Message: perhaps", "is neither yes nor no"),
        ("X-Mailgun-Drop-Message:", "is neither yes nor no"),
        ("X-Mailgun-Dkim: 2048", "is neither yes nor no"),
        ("X-Mailgun-Deliver-By: tomorrow", "is not an RFC 5322 date"),
        ("X-Mailgun-Deliver-By: Fri, 20 Nov 2026 13:00:00 CET", "is not an RFC 5322 date"),
        ("X-Mailgun-Deliver-By: Sat, 20 Nov 2027 13:00:00 +0000", "is more than 7 days"),
        ("X-Mailgun-Deliver-Within: 1m", "is not a duration from 5m to 24h"),
        ("X-Mailgun-Variables: a=b", "is not a JSON object"),
        ("X-Mailgun-Variables: [1]", "is not a JSON object"),
        ('X-Mailgun-Variables: {"a": "\\ud800"}', "half of a surrogate pair"),
        ("X-Mailgun-Variables: " + '{"a":' * 3000, "is not a JSON object"),
        ('X-Mailgun-Variables: {"a": 1}\r\nX-Mailgun-Variables: {"a": 2}', "contradicts"),
        ("X-Mailgun-Variables: " + '{"a": "' + "x" * 17000 + '"}', "16 KB"),
        ("X-Mailgun-Tag: " + "x" * 129, "128 characters"),
        ("\r\n".join(f"X-Mailgun-Tag: {n}" for n in range(11)), "10 tags"),
        ("X-Mailgun-Drop-Message: yes\r\nX-Mailgun-Drop-Message: no", "contradicts"),
        ("X-Mailgun-Recipient-Variables: {}", "is not supported by this relay"),
        ("X-Mailgun-Template-Name: welcome", "is not supported by this relay"),
        ("X-Mailgun-Archive-To: https://x.example/", "is not supported by this relay"),
        ("X-Mailgun-Secondary-DKIM: x.example,s1", "is not supported by this relay"),
        ("X-Mailgun-Suppress-Headers: all", "is not supported by this relay"),
        ("X-Mailgun-Drop-Message : yes", "write its name X-Mailgun-Drop-Message"),
        ("X_Mailgun_Drop_Message: yes", "write its name X-Mailgun-Drop-Message"),
        ("X-Mailgun-Drор-Message: yes", "write X-Mailgun-Drop-Message in ASCII"),
        ("X-Mailgun-\r\n Drop-Message: yes", "write X-Mailgun-Drop-Message in ASCII"),
        ("text\r\nX-Mailgun-Tag: a", "write X-Mailgun-Tag in ASCII"),
        ("text\r\nX-Mailgun-Secondary-DKIM-Public: a", "write X-Mailgun-Secondary-DKIM-Public in"),
    ],
)  # fmt: skip
def test_value_that_cannot_be_obeyed_is_refused_with_its_field(field, said):
    found = opened(f"From: a@b.example\r\n{field}\r\nSubject: x\r\n".encode())
    assert isinstance(found, Refusal)
    assert (found.reply.code, found.reply.status) == (554, "5.6.0")
    assert said in found.reply.text
    assert field[:4] in found.reply.text or "write X-" in found.reply.text


def test_a_field_that_asks_for_nothing_here_is_taken_out():
    header = (
        b"X-Mailgun-Track: yes\r\nX-Mailgun-Track-Clicks: htmlonly\r\n"
        b"X-Mailgun-Track-Opens : no\r\n"
        b"X-Mailgun-Delivery-Time-Optimize-Period: 24h\r\nX-Mailgun-Template-Name:\r\n"
    )
    found = opened(b"From: a@b.example\r\n" + header)
    assert isinstance(found, JudgedHeader)
    assert found.header == b"From: a@b.example\r\n"
    assert found.terms is None


@pytest.mark.parametrize(
    "field",
    [b"X-Mailgun-Sid: WyJ", b"X-Mailgun-Sending-Ip: 192.0.2.1", b"X-Mailgun-Incoming: Yes",
     b"X-Mailgun-Tagged: x", b"X-Mailgun: Drop-Message: yes"],
)  # fmt: skip
def test_a_field_that_mailgun_writes_itself_goes_on(field):
    header = b"From: a@b.example\r\n" + field + b"\r\n"
    found = opened(header)
    assert isinstance(found, JudgedHeader)
    assert found.header == header
    refuse_fields_in_body(b"text\r\n" + field + b"\r\n")


def test_options_beside_a_message_add_to_its_fields_and_never_contradict_them():
    header = HeaderSection(
        b'X-Mailgun-Tag: a\r\nX-Mailgun-Variables: {"x": 1}\r\nX-Require-TLS: 1\r\n'
    )
    fields = read_options(header, NOW)
    beside = Options(
        Wishes(require_tls=True), tags=("b", "a"), variables=(("y", "2"),), is_test=True
    )
    assert combined(fields, beside) == Options(
        Wishes(require_tls=True), tags=("a", "b"), variables=(("x", "1"), ("y", "2")), is_test=True
    )
    for other in (Options(Wishes(require_tls=False)), Options(variables=(("x", "2"),))):
        with pytest.raises(Contradiction):
            combined(fields, other)


def test_a_message_whose_field_contradicts_an_option_beside_it_is_refused():
    header = b"X-Mailgun-Drop-Message: yes\r\nX-Mailgun-Tag: a\r\n"
    found = opened(header, Options(is_test=False))
    assert isinstance(found, Refusal)
    assert found.reply.text == "o:testmode contradicts a header field of the message"
    found = opened(header, Options(tags=("b",)))
    assert isinstance(found, JudgedHeader)
    assert found.terms == Terms(tags=("a", "b"), is_test=True)


@given(st.sampled_from(ASKING), st.text(max_size=60) | st.binary(max_size=60).map(ascii))
def test_any_value_is_obeyed_or_refused_in_one_line(name, value):
    field = f"{name}: {value}\r\n".replace("\r", "").replace("\n", "").encode() + b"\r\n"
    found = opened(field)
    if isinstance(found, Refusal):
        assert found.reply.encode().count(b"\r\n") == 1
    else:
        assert found.header == b""
