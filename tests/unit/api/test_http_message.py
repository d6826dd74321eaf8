"""A form becomes a message: what Mailgun's clients send, and what a mail host gets to see."""

from __future__ import annotations

import email
import email.policy
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from email.header import decode_header, make_header

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from relay.api.mailgun import read_send_request, sending_domain
from relay.api.mailgun_addresses import mailboxes
from relay.api.mailgun_form import ApiError, File, Form
from relay.api.mailgun_header import author_of, own_message_id
from relay.api.mailgun_mime import compose, normalise_mime
from relay.api.mailgun_parameters import checked_message
from relay.mail.section import HeaderSection
from relay.policy.fields import Wishes, read_wishes

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
ID = "<1@example.com>"
NO_ADDRESS = "parameter is not a valid address. please check documentation"
NEXT_MONTH = "Sun, 20 Dec 2026 12:00:00 +0000"
MANY = ["x@y.example", *(f"a{n}@b.example" for n in range(1000))]
BASE = {"from": "Ann <ann@example.com>", "to": "bob@dest.example", "text": "hello"}


def form(*files: File, **fields) -> Form:
    """The usual form; a list repeats a field, None removes one. `o_x` means `o:x`."""
    pairs = []
    for name, value in (BASE | fields).items():
        name = name.replace("_", ":", 1) if name[:2] in ("o_", "h_", "v_", "t_") else name
        name = name.replace("_", "-") if name.startswith(("o:", "h:")) else name
        values = value if isinstance(value, list) else [value]
        pairs += [(name, one) for one in values if one is not None]
    return Form(tuple(pairs), files)


def order(**fields):
    return read_send_request(form(**fields), domain="example.com", now=NOW, max_recipients=1000)


def parsed(*files: File, **fields):
    content = compose(form(*files, **fields), message_id=ID, now=NOW)
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert content.isascii()
    return email.message_from_bytes(content, policy=email.policy.default)


def refused(**fields) -> str:
    try:
        checked_message(form(**fields))
        order(**fields)
        compose(form(**fields), message_id=ID, now=NOW)
    except ApiError as error:
        return f"{error.status} {error.message}"
    return "accepted"


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"from": None}, "400 from parameter is missing"),
        ({"to": None}, "400 to parameter is missing"),
        ({"to": " "}, "400 to parameter is missing"),
        ({"to": " , "}, "400 to parameter is missing"),
        ({"text": None}, "400 Need at least one of 'text' or 'html' parameters specified"),
        ({"text": ""}, "400 Need at least one of 'text' or 'html' parameters specified"),
        ({"to": MANY}, "400 Too many recipients, max is 1000"),
        ({"to": "nobody"}, f"400 'to' {NO_ADDRESS}"),
        ({"cc": "a@b.example, <>"}, f"400 'cc' {NO_ADDRESS}"),
        ({"from": "a@b.example, c"}, f"400 'from' {NO_ADDRESS}"),
        ({"o_require_tls": "perhaps"}, "400 o:require-tls is neither yes nor no: perhaps"),
        ({"o_require_tls": ["yes", "no"]}, "400 o:require-tls contradicts itself"),
        ({"o_deliverytime": "tomorrow"}, "400 o:deliverytime is not an RFC 5322 date: tomorrow"),
        (
            {"o_deliverytime": NEXT_MONTH},
            f"400 o:deliverytime is more than 7 days in the future: {NEXT_MONTH}",
        ),
        ({"o_deliver_within": "3m"}, "400 o:deliver-within is not a duration from 5m to 24h: 3m"),
        ({"o_deliver_within": "25h"}, "400 o:deliver-within is not a duration from 5m to 24h: 25h"),
        ({"o_tag": [f"t{n}" for n in range(11)]}, "400 o:tag: at most 10 tags of 128 characters"),
        ({"v_x": "y" * 17000}, "400 o:, h: and v: parameters are larger than 16 KB together"),
        (
            {"subject": "s" * (1 << 20)},
            "413 from and to and cc and subject: more than 1 MiB together",
        ),
        ({"bcc": "b@x.example," * 90_000}, "413 bcc: more than 1 MiB together"),
        ({"template": "welcome"}, "400 template parameter is not supported by this relay"),
        ({"h_From": "x@y.example"}, "400 h:From is not what the from parameter says"),
        ({"h_X A": "x"}, "400 h:X A is not a header field that can be set"),
        (
            {"h_Date": ["Thu, 01 Jan 2026 00:00:00 +0000", "x"]},
            "400 h:Date is there more than once",
        ),
        ({"h_Reply_To": "nobody"}, f"400 'h:Reply-To' {NO_ADDRESS}"),
        ({"h_X": "x" * 1000}, "400 h:X has a word that is longer than a line may be"),
        ({"text": ["a", "b"]}, "400 text parameter is there more than once"),
        ({"o_delivery_time": "x"}, "400 o:delivery-time parameter is not supported by this relay"),
        (
            {"o_archive_to": "https://x.example"},
            "400 o:archive-to parameter is not supported by this relay",
        ),
        ({"t_version": "2"}, "400 t:version parameter is not supported by this relay"),
        (
            {"recipient-variables": "{}"},
            "400 recipient-variables parameter is not supported by this relay",
        ),
        (
            {"X-Mailgun-Variables": "{}"},
            "400 x-mailgun-variables parameter is not supported by this relay",
        ),
        ({"attachment": "text"}, "400 'attachment' parameter is not a file"),
        ({"h_X_A": "a\r\nBcc: b"}, "400 h:X-A has a line break in it"),
        ({"h_Message_Id": "nonsense"}, "400 h:Message-Id is not a message id"),
    ],
)  # fmt: skip
def test_invalid_message_is_refused_in_mailguns_words(fields, said):
    if "h_Message_Id" in fields:
        with pytest.raises(ApiError, match="is not a message id"):
            own_message_id(form(**fields))
    else:
        assert refused(**fields) == said


@pytest.mark.parametrize("more", [-1, 0, 1, 2, 3, 56, 57])
@pytest.mark.parametrize("kind", ["image/png", "text/plain; charset=utf-8", "message/rfc822"])
def test_large_files_arrive_whole_and_as_small_ones_do(more, kind):
    files = [
        File(disposition, f"{n}.bin", kind, bytes(range(256)) * 4096 + b"x" * more)
        for n, disposition in enumerate(("inline", "attachment", "attachment"))
    ]
    small = [File(one.name, one.filename, kind, b"small\0") for one in files]
    message, as_small = (
        email.message_from_bytes(
            compose(form(*those, html="cid:0.bin"), message_id=ID, now=NOW),
            policy=email.policy.default,
        )
        for those in (files, small)
    )
    parts = [part for part in message.walk() if part.get_filename()]
    assert [part.get_content() for part in parts if part.get_content_maintype() != "text"] == [
        one.content for one in files if not kind.startswith("text")
    ]
    assert [part.get_payload(decode=True) for part in parts] == [one.content for one in files]
    assert [part.items() for part in parts] == [
        part.items() for part in as_small.walk() if part.get_filename()
    ]
    assert all(len(line) <= 76 for part in parts for line in str(part.get_payload()).splitlines())


def test_messages_that_are_attached_are_put_in_in_linear_time():
    def seconds(count: int) -> float:
        letter = b"From: a@b.example\r\n\r\n" + b"x" * 900 + b"\r\n"
        files = [File("attachment", "a.eml", "message/rfc822", letter)] * count
        began = time.process_time()
        content = compose(form(*files), message_id=ID, now=NOW)
        took = time.process_time() - began
        assert content.count(letter) == count
        return took

    few, many = (min(seconds(count) for _ in range(3)) for count in (200, 2000))
    assert many < 25 * max(few, 0.01)


@pytest.mark.parametrize("name", ["text", "html", "amp-html"])
@pytest.mark.parametrize("line_end", ["\n", "\r", "\r\n"])
def test_text_of_very_many_lines_takes_no_more_memory_than_other_text(name, line_end):
    text = line_end * 200_000 + "ü"
    tracemalloc.start()
    content = compose(form(**{"text": "x", name: text}), message_id=ID, now=NOW)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    message = email.message_from_bytes(content, policy=email.policy.default)
    [found] = [
        part.get_content()
        for part in message.walk()
        if part.get_content_type()
        == {"text": "text/plain"}.get(name, f"text/{name.replace('amp', 'x-amp')}")
    ]
    assert found == "\r\n" * 200_000 + "ü"


@pytest.mark.parametrize(
    "fields",
    [
        {"o_deliverytime": "Fri, 27 Nov 2026 12:00:00 +0000"},
        {"o_deliver_within": "5m"},
        {"o_deliver_within": "300s"},
        {"o_deliver_within": "24h"},
        {"o_deliver_within": "23h59m60s"},
        {"v_x": "y" * (16 * 1024 - 3)},
        {"o_tag": [f"{n:0128}" for n in range(10)]},
        {"to": [f"a{n}@b.example" for n in range(1000)]},
        {"o_require_tls": ["yes", "True", "TRUE"]},
        {"subject": None},
    ],
)
def test_message_just_within_the_limits_is_sent(fields):
    assert refused(**fields) == "accepted"


@pytest.mark.parametrize(
    "fields",
    [
        {"o_deliverytime": "Fri, 27 Nov 2026 12:00:01 +0000"},
        {"o_deliver_within": "4m59s"},
        {"o_deliver_within": "24h1s"},
        {"o_deliver_within": "-1h"},
        {"o_deliver_within": "1d"},
        {"v_x": "y" * (16 * 1024 - 2)},
        {"v_x": "ü" * 8192},
        {"o_tag": ["t" * 129]},
    ],
)
def test_message_just_beyond_a_limit_is_refused_with_its_parameter(fields):
    said = refused(**fields)
    assert said.startswith("400 ")
    [name] = fields
    assert f"{name[0]}:" in said


def test_everybody_named_is_a_recipient_once():
    found = order(
        to=["Bob <bob@dest.example>, carl@dest.example", "bob@dest.example"],
        cc='"D, E" <d@b.example>',
        bcc="e@b.example",
    )
    assert [one.address for one in found.recipients] == [
        "bob@dest.example",
        "carl@dest.example",
        "d@b.example",
        "e@b.example",
    ]


@pytest.mark.parametrize(
    ("author", "reverse_path"),
    [
        ("Ann <ann@Example.COM>", "ann@Example.COM"),
        ("Ann <ann@other.example>", "postmaster@example.com"),
        ("ann@mail.example.com", "postmaster@example.com"),
    ],
)
def test_the_reverse_path_is_of_the_domain_the_message_is_sent_under(author, reverse_path):
    assert order(**{"from": author}).reverse_path == reverse_path


def test_options_count_as_wishes_of_the_message():
    found = order(
        o_require_tls="Yes", o_skip_verification="False", o_testmode="yes", o_deliver_within="1h30m"
    )
    assert found.options.wishes == Wishes(True, False)
    assert found.options.is_test
    assert found.options.deliver_within == timedelta(minutes=90)
    assert order().options.wishes == Wishes(None, None)


@pytest.mark.parametrize(
    ("said", "due"),
    [
        ("Fri, 20 Nov 2026 14:00:00 +0100", NOW + timedelta(hours=1)),
        ("Fri, 20 Nov 2026 13:00:00 -0000", NOW + timedelta(hours=1)),
        ("Fri, 20 Nov 2020 13:00:00 +0000", NOW),
        ("", NOW),
    ],
)
def test_a_delivery_time_is_when_the_message_is_due_and_never_in_the_past(said, due):
    found = order(o_deliverytime=said)
    assert found.options.due(NOW) == due
    assert found.options.terms(NOW).not_before == (due if due > NOW else None)


@pytest.mark.parametrize(
    "text", ["example", "[127.0.0.1]", "", "a b.example", "x" * 300 + ".example", "..", "a@b.c"]
)
def test_text_that_is_no_domain_is_not_found(text):
    with pytest.raises(ApiError) as caught:
        sending_domain(text)
    assert caught.value.status == 404


def test_only_configured_domains_may_send():
    assert sending_domain("Example.COM.", ("example.com",)) == "example.com"
    with pytest.raises(ApiError, match=r"Domain not found: other\.example"):
        sending_domain("other.example", ("example.com",), named=True)


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a@b.example", [("", "a@b.example")]),
        (' "A, B" <a@b.example> ,c@d.example', [("A, B", "a@b.example"), ("", "c@d.example")]),
        ('"A \\"x\\" B" <a@b.example>', [('A "x" B', "a@b.example")]),
        ("Jörg <j@b.example>", [("Jörg", "j@b.example")]),
        ("j@bücher.example", [("", "j@xn--bcher-kva.example")]),
        ("jörg@bücher.example", [("", "jörg@bücher.example")]),
        ("A (x, y) <a@b.example>", [("A (x, y)", "a@b.example")]),
        ("a..b@b.example, .c@b.example", [("", "a..b@b.example"), ("", ".c@b.example")]),
        (f"{'l' * 80}@b.example", [("", f"{'l' * 80}@b.example")]),
    ],
)
def test_a_comma_list_is_read_as_people_write_it(text, found):
    assert [(box.name, box.address) for box in mailboxes(text, "to")] == found


@pytest.mark.parametrize(
    "text",
    [
        "a@b.example <c@d.example> <e@f.example>",
        "a@b.example>, <c@d.example",
        "=?utf-8?q?a=40evil.example=3e?=@b.example",
        '"a@evil.example\r\nRCPT TO:<x@y.example>"@b.example',
        "a@[127.0.0.1]",
        "a@b.example\r\nBcc: x@y.example",
        "x\ny <a@b.example>",
        "list: a@b.example;",
        "a@b.example\0",
        "\udce9@b.example",
    ],
)
def test_address_that_another_reader_could_take_for_another_is_refused(text):
    with pytest.raises(ApiError):
        mailboxes(text, "to")


@given(st.text(max_size=60))
def test_no_text_gives_an_invalid_address(text):
    try:
        found = mailboxes(text, "to")
    except ApiError:
        return
    for box in found:
        assert not any(c in box.address + box.name for c in "\r\n\0")
        assert box.address.count("@") == 1
        assert box.domain


# --- the message ----------------------------------------------------------------------------------


def test_a_plain_message_has_the_fields_a_message_needs():
    message = parsed(subject="Hi", cc="c@dest.example", bcc="secret@dest.example")
    assert message["from"] == "Ann <ann@example.com>"
    assert (message["to"], message["cc"]) == ("bob@dest.example", "c@dest.example")
    assert (message["subject"], message["message-id"]) == ("Hi", ID)
    assert message["date"].datetime == NOW
    assert message["bcc"] is None
    assert "secret" not in message.as_string()
    assert message.get_content().split() == ["hello"]


def test_a_local_part_with_dots_in_odd_places_is_quoted_in_the_header():
    content = compose(
        form(**{"from": "Ann <a..b@example.com>", "to": "c.@dest.example"}), message_id=ID, now=NOW
    )
    assert b'From: Ann <"a..b"@example.com>\r\n' in content
    assert b'To: "c."@dest.example\r\n' in content


def test_text_beyond_ascii_arrives_as_it_was_written():
    message = parsed(
        to=['"Jörg Müller" <a@dest.example>', '"A, B; C: D" <b@dest.example>'],
        subject="Grüße " * 40,
        text="Schöne Grüße\r\n" * 3,
    )
    assert [one.display_name for one in message["to"].addresses] == ["Jörg Müller", "A, B; C: D"]
    assert [one.addr_spec for one in message["to"].addresses] == [
        "a@dest.example",
        "b@dest.example",
    ]
    assert message["subject"].strip() == ("Grüße " * 40).strip()
    assert message.get_content() == "Schöne Grüße\r\n" * 3


def test_a_long_name_is_divided_between_characters():
    name = "日本語の名前がとても長いのでいくつもの語に分けられる"
    content = compose(form(to=f"{name} <a@dest.example>"), message_id=ID, now=NOW)
    field = content.partition(b"\r\nTo: ")[2].partition(b"\r\nDate")[0].decode("ascii")
    assert str(make_header(decode_header(field))) == f"{name} <a@dest.example>"
    assert max(map(len, field.split("\r\n"))) <= 76


def test_a_thousand_recipients_make_no_line_too_long():
    recipients = [f"Recipient Number {n} <recipient{n}@dest.example>" for n in range(1000)]
    content = compose(form(to=recipients, subject="x" * 300), message_id=ID, now=NOW)
    assert max(map(len, content.split(b"\r\n"))) <= 998
    assert (
        len(email.message_from_bytes(content, policy=email.policy.default)["to"].addresses) == 1000
    )


def test_a_subject_cannot_become_a_header_field():
    message = parsed(subject="Hi\r\nX-Skip-Verification: yes\rBcc: x@y.example")
    assert message["x-skip-verification"] is None
    assert message["bcc"] is None
    assert message["subject"] == "Hi X-Skip-Verification: yes Bcc: x@y.example"
    content = compose(form(subject="Grüße\r\nBcc: x@y.example"), message_id=ID, now=NOW)
    field = content.partition(b"\r\nSubject: ")[2].partition(b"\r\nDate")[0].decode("ascii")
    assert str(make_header(decode_header(field))) == "Grüße Bcc: x@y.example", (
        "not in an encoded word, either"
    )


def test_the_parts_of_a_message_are_where_a_reader_looks_for_them():
    message = parsed(
        File("attachment", "Bericht für Ä.pdf", "application/pdf", b"%PDF"),
        File("inline", "logo.png", "image/png", b"\x89PNG"),
        html='<img src="cid:logo.png">',
        **{"amp-html": "<html amp4email></html>"},
    )
    assert message.get_content_type() == "multipart/mixed"
    alternative, attachment = message.iter_parts()
    assert [part.get_content_type() for part in alternative.iter_parts()] == [
        "text/plain",
        "text/x-amp-html",
        "multipart/related",
    ]
    html, logo = list(alternative.iter_parts())[2].iter_parts()
    assert html.get_content_type() == "text/html"
    assert (logo["content-id"], logo.get_content_disposition()) == ("<logo.png>", "inline")
    assert logo.get_content() == b"\x89PNG"
    assert attachment.get_filename() == "Bericht für Ä.pdf"
    assert attachment.get_content() == b"%PDF"


@pytest.mark.parametrize(
    ("filename", "content_type", "shown", "sent_as"),
    [
        ("../../etc/passwd", "text/plain; charset=latin-1", "passwd", "text/plain"),
        ('x"\r\nBcc: y', "nonsense", 'x"Bcc: y', "application/octet-stream"),
        ("", "message/rfc822", "file", "application/octet-stream"),
        ("a\u202egpj.exe", "multipart/mixed", "agpj.exe", "application/octet-stream"),
    ],
)
def test_an_attachment_cannot_break_the_message_it_is_in(filename, content_type, shown, sent_as):
    message = parsed(File("attachment", filename, content_type, b"\0\xff"))
    [attachment] = message.iter_attachments()
    assert attachment.get_filename() == shown
    assert attachment.get_content_type() == sent_as
    assert message["bcc"] is None
    assert attachment.get_payload(decode=True) == b"\0\xff"


def test_sender_may_add_header_fields():
    message = parsed(
        h_X_Order="Nr. 7 für Jörg",
        h_Reply_To="Jörg <j@example.com>",
        h_To="list@example.com",
        h_Date="Thu, 01 Jan 2026 00:00:00 +0000",
    )
    assert message["x-order"] == "Nr. 7 für Jörg"
    assert message["reply-to"].addresses[0].addr_spec == "j@example.com"
    assert message.get_all("to") == ["list@example.com"]
    assert message.get_all("date") == ["Thu, 01 Jan 2026 00:00:00 +0000"]
    assert own_message_id(form(h_Message_Id=" <x@y.example> ")) == "<x@y.example>"


def test_a_policy_field_of_the_senders_own_is_one_to_the_relay():
    content = compose(form(h_X_Require_TLS="yes"), message_id=ID, now=NOW)
    assert (
        read_wishes(HeaderSection(content.partition(b"\r\n\r\n")[0] + b"\r\n")).require_tls is True
    )


@given(
    st.text(max_size=80),
    st.text(max_size=200),
    st.text(min_size=1, max_size=40).filter(lambda text: not any(c in text for c in "\r\n\0")),
)
def test_header_section_has_the_same_fields_with_any_input(subject, text, value):
    fields = {"subject": subject, "text": text + "x", "h_X_Mine": value}
    try:
        content = compose(form(**fields), message_id=ID, now=NOW)
    except (ApiError, UnicodeEncodeError):
        return
    assume(value.strip(" \t"))  # an empty value means no field
    header = content.partition(b"\r\n\r\n")[0] + b"\r\n"
    names = [
        line.partition(b":")[0].lower()
        for line in header.split(b"\r\n")[:-1]
        if line[:1] not in b" \t"
    ]
    ours = (
        b"from to subject date message-id x-mine content-type content-transfer-encoding"
        b" mime-version"
    )
    assert sorted(names) == sorted(ours.split())


# --- a message that is made already ---------------------------------------------------------------


def test_a_file_with_lf_alone_is_a_message_with_crlf():
    assert normalise_mime(b"Subject: x\n\nhello\n") == b"Subject: x\r\n\r\nhello\r\n"
    assert normalise_mime(b"Subject: x\r\n\r\nhello\r\n") == b"Subject: x\r\n\r\nhello\r\n"


@pytest.mark.parametrize(
    "content",
    [b"Subject: a\nX-Skip-Verification: yes\r\n\r\n", b"A: b\rC: d\r\n", b"A\r: b\n", b"\0"],
)
def test_bare_cr_or_lf_in_a_file_begins_no_header_field(content):
    with pytest.raises(ApiError):
        normalise_mime(content)


def test_the_author_of_a_file_is_read_from_its_header():
    assert (
        author_of(
            HeaderSection(b"Subject: x\r\nFrom: =?utf-8?q?J=C3=B6rg?=\r\n <j@example.com>\r\n")
        )
        == "j@example.com"
    )
    assert author_of(HeaderSection(b"Subject: x\r\n")) is None
    assert author_of(HeaderSection(b"From: nobody\r\n")) is None
