"""What the mailers of Rails, WordPress, Symfony and Django send, and what becomes of each
parameter.
"""

from __future__ import annotations

import email
import email.policy
import re
from datetime import UTC, datetime, timedelta, timezone
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.api.mailgun import read_send_request
from relay.api.mailgun_addresses import mailboxes
from relay.api.mailgun_domains import read_settings
from relay.api.mailgun_events import read_query
from relay.api.mailgun_form import ApiError, File, Form
from relay.api.mailgun_header import own_message_id, with_own_fields
from relay.api.mailgun_mime import compose
from relay.api.mailgun_parameters import IGNORED, OBEYED, REFUSED, checked_message, checked_mime
from relay.mail.dates import read_date
from relay.mail.section import ASKING, NOT_SUPPORTED, HeaderSection
from relay.mail.section import IGNORED as IGNORED_FIELDS

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
PAGE = Path(__file__).resolve().parents[3] / "docs/moving-from-mailgun.md"
BASE = (("from", "ann@example.com"), ("to", "bob@dest.example"), ("text", "hello"))


def form(*fields: tuple[str, str], files: tuple[File, ...] = ()) -> Form:
    """The usual form; a field of `fields` takes the place of the usual one."""
    names = {name for name, _ in fields}
    return Form((*(pair for pair in BASE if pair[0] not in names), *fields), files)


def order(*fields: tuple[str, str]):
    asked = checked_message(form(*fields))
    return read_send_request(asked, domain="example.com", now=NOW, max_recipients=100)


def octets(*fields: tuple[str, str], files: tuple[File, ...] = ()) -> bytes:
    asked = checked_message(form(*fields, files=files))
    return compose(asked, message_id="<1@example.com>", now=NOW)


def sent(*fields: tuple[str, str], files: tuple[File, ...] = ()):
    return email.message_from_bytes(octets(*fields, files=files), policy=email.policy.default)


def refusal(ask, *arguments) -> str:
    with pytest.raises(ApiError) as caught:
        ask(*arguments)
    assert caught.value.status == 400
    return caught.value.message


# --- times ----------------------------------------------------------------------------------------

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("Fri, 20 Nov 2026 13:00:00 +0100", NOON),  # Ruby, PHP, Python
        ("Fri, 20 Nov 2026 12:00:00 GMT", NOON),  # JavaScript's toUTCString, .NET, Java
        ("Fri, 20 Nov 2026 12:00:00 UTC", NOON),  # Mailgun's own answers
        ("Fri, 20 Nov 2026 12:00:00 -0000", NOON),
        ("20 Nov 2026 12:00 +0000", NOON),
        ("Fri, 20 Nov 2026 07:00:00 EST", NOON),  # RFC 5322 §4.3
        ("Fri, 20 Nov 2026 04:00:00 pst", NOON),
        ("fri,20 nov 2026 12:00:00 Z", NOON),
        ("Fri, 20 Nov 2026 12:00:00 +0000 (Coordinated Universal Time)", NOON),
        ("Fri, 20 Nov 2026 17:45:00 +0545", NOON),
    ],
)
def test_a_date_that_a_client_sends_is_read_exactly(text, at):
    assert read_date(text) == at
    assert order(("o:deliverytime", text)).options.due(NOW) == at


@pytest.mark.parametrize(
    "text",
    [
        "Fri, 20 Nov 2026 12:00:00 CET",
        "Fri, 20 Nov 2026 12:00:00 Europe/Berlin",
        "Fri, 20 Nov 2026 13:00:00 +01:00",
        "Fri, 20 Nov 2026 10:00 PM +0000",
        "Fri, 20 Nov 2026 10:00:00 PM",
        "Fri, 20 Nov 2026 12:00:00",
        "Fri, 20 Nov 2026 12:00:00 A",
        "Mon, 20 Nov 2026 12:00:00 +0000",
        "Fri, 20 Nov 26 12:00:00 +0000",
        "Friday, 20 Nov 2026 12:00:00 +0000",
        "Fri, 20 November 2026 12:00:00 +0000",
        "Fri, 20 Nov 2026 25:00:00 +0000",
        "Fri, 20 Nov 2026 12:60:00 +0000",
        "Fri, 20 Nov 2026 12:00:00 +0075",
        "Fri, 20 Nov 2026 12:00:00 +9900",
        "Fri, 31 Nov 2026 12:00:00 +0000",
        "Fri Nov 20 12:00:00 2026",
        "2026-11-20T12:00:00Z",
        "2026-11-20 12:00:00",
        "Fri, 20 Nov 2026 12:00:00 +0000, 21 Nov 2026 12:00:00 +0000",
        "31 Dec 9999 23:59:59 -0100",
        "1795176000000",
        "tomorrow",
    ],
)
def test_a_date_that_is_not_understood_exactly_is_refused_by_name_wherever_one_is_taken(text):
    assert "o:deliverytime" in refusal(order, ("o:deliverytime", text))
    for name in ("begin", "end"):
        assert refusal(query, name, text).startswith(f"{name} is neither a time")


@pytest.mark.parametrize("text", ["1h 30m", "1.5h", "90", "-1h", "1H", "30m1h", "١h", "1h30m\n5m"])
def test_a_duration_that_is_not_understood_exactly_is_refused_by_name(text):
    assert "o:deliver-within" in refusal(order, ("o:deliver-within", text))


@given(st.integers(0, 200_000_000_000), st.integers(-1439, 1439))
def test_every_date_that_the_email_package_writes_is_read_as_it_was(seconds, minutes):
    at = datetime.fromtimestamp(seconds, timezone(timedelta(minutes=minutes)))
    assert read_date(format_datetime(at)) == at


@given(st.text(max_size=50))
def test_reader_of_dates_raises_no_unexpected_error_for_any_text(text):
    try:
        assert read_date(text).tzinfo is not None
    except ValueError:
        return


# --- parameters -----------------------------------------------------------------------------------


def test_every_parameter_is_in_the_table_of_the_page_with_what_becomes_of_it():
    page = PAGE.read_text(encoding="utf-8")
    refused_fields = {name.decode() for name in NOT_SUPPORTED}
    fields = {
        "obeyed": {name for name in ASKING if name.startswith("X-Mailgun")} - refused_fields,
        "ignored": {name.decode() for name in IGNORED_FIELDS},
        "refused": refused_fields,
    }
    for heading, names in (("obeyed", OBEYED), ("ignored", IGNORED), ("refused", REFUSED)):
        row, of_fields = re.findall(rf"^\| {heading} \| (.*) \|$", page, re.MULTILINE)
        assert set(re.findall(r"`([^`]+)`", row)) - {"t:"} == names
        told = {name.lower() for name in re.findall(r"`([^`]+)`", of_fields)}
        assert told == {name.lower() for name in fields[heading]}


def test_refused_option_is_400_by_name_unless_it_is_empty():
    for name in (*REFUSED, "t:variables", "t:text", "o:unheard-of", "unheard-of", "o:dkim-key"):
        assert name in refusal(checked_message, form((name, "yes")))
        assert name in refusal(checked_mime, Form((("to", "b@d.example"), (name, "yes"))))
    for name in REFUSED:
        checked_message(form((name, "")))


def test_a_file_that_nobody_chose_in_a_browser_is_none():
    assert octets(("attachment", ""), ("inline", "")) == octets()


def test_ignored_option_leaves_the_message_as_it_is():
    fields = [(name, value) for name in sorted(IGNORED) for value in ("htmlonly", "no")]
    assert octets(*fields) == octets()


@pytest.mark.parametrize("name", ["to[]", "to[0]", "TO", "To[1]"])
def test_a_name_is_known_in_the_way_every_client_writes_it(name):
    asked = checked_message(Form((*BASE[::2], ("to", "b@d.example"), (name, "c@d.example"))))
    assert asked.all("to") == ["b@d.example", "c@d.example"]


def test_lists_of_php_and_ruby_are_lists():
    files = (
        File("attachment[0]", "a.txt", "text/plain", b"a"),
        File("attachment[1]", "b.txt", "text/plain", b"b"),
        File("inline[]", "c.png", "image/png", b"c"),
    )
    message = sent(
        ("o:tag[]", "a"), ("h:X-A[]", "1"), ("html", "<img src='cid:c.png'>"), files=files
    )
    assert [part.get_filename() for part in message.iter_attachments()] == ["a.txt", "b.txt"]
    assert message["x-a"] == "1"
    assert order(("o:tag[]", "a"), ("o:tag[1]", "b")).options.tags == ("a", "b")


def test_the_name_of_a_variable_is_kept_as_it_is():
    assert order(("v:My[0]", "x"), ("V:Order", "y")).options.variables == (
        ("My[0]", "x"),
        ("Order", "y"),
    )


def test_a_field_that_comes_as_a_file_is_what_the_file_says():
    files = (File("text", "letter.txt", "text/plain", "Grüße\n".encode()),)
    asked = checked_message(Form(BASE[:2], files))
    assert asked.first("text") == "Grüße\n"
    assert "text" in refusal(checked_message, Form(BASE[:2], (File("text", "x", "", b"\xff"),)))
    assert "junk" in refusal(checked_message, form(files=(File("junk", "x", "", b"x"),)))


def test_mime_message_may_have_the_parameters_of_the_python_client_and_no_content():
    fields = (
        ("from", "a@b.example"),
        ("to", "b@d.example"),
        ("cc", "c@d.example"),
        ("subject", "x"),
    )
    asked = checked_mime(Form(fields))
    found = read_send_request(asked, domain="example.com", now=NOW, max_recipients=9)
    assert [one.address for one in found.recipients] == ["b@d.example", "c@d.example"]
    for name in ("text", "html", "amp-html", "attachment", "inline"):
        assert name in refusal(checked_mime, Form((*fields, (name, "x"))))


def test_own_field_is_added_to_a_mime_message_and_never_twice():
    asked = Form((("h:X-Order", "7"), ("h:Reply-To", "r@b.example")))
    message = HeaderSection(b"From: a@b.example\r\n")
    assert with_own_fields(asked, message).octets == (
        b"X-Order: 7\r\nReply-To: r@b.example\r\nFrom: a@b.example\r\n"
    )
    assert "h:Reply-To" in refusal(
        with_own_fields, asked, HeaderSection(b"reply-to : x@b.example\r\n")
    )


def test_a_setting_of_a_domain_that_is_not_known_is_refused_by_name():
    asked = (("require_tls", "yes"), ("spam_action", "disabled"), ("wildcard", "false"))
    assert read_settings(Form(asked), needed=False).require_tls is True
    for name in ("requiretls", "smtp_password", "mailfrom_host"):
        assert name in refusal(
            lambda name=name: read_settings(Form(((name, "yes"),)), needed=False)
        )
    assert "spam_action" in refusal(lambda: read_settings(Form(asked), needed=True))


def test_dkim_is_left_out_where_the_sender_wants_none():
    assert order(("o:dkim", "no")).options.terms(NOW).is_signed is False
    assert order(("o:dkim", "True")).options.terms(NOW).is_signed is True
    assert order().options.terms(NOW).is_signed is True
    assert "o:dkim" in refusal(order, ("o:dkim", "maybe"))


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "address"),
    [
        ("root@x.example (Cron Daemon)", "Cron Daemon", "root@x.example"),
        ("<root@x.example> (Cron Daemon)", "Cron Daemon", "root@x.example"),
        ("Ann <a@x.example> (work)", "Ann (work)", "a@x.example"),
        ("Ann\r\n <a@x.example>", "Ann", "a@x.example"),
        ("=?utf-8?Q?J=C3=B6rg?= <j@x.example>", "=?utf-8?Q?J=C3=B6rg?=", "j@x.example"),
        ("'Ann' <a@x.example>\n", "'Ann'", "a@x.example"),
    ],
)
def test_a_mailbox_is_read_as_programs_write_it(text, name, address):
    [box] = mailboxes(text, "to")
    assert (box.name, box.address) == (name, address)


@pytest.mark.parametrize(
    "text",
    [
        "root@x.example (a) (b",
        "root@x.example (a <b@c.example>)",
        "root@x.example (a\r\nBcc: x)",
        "(only a comment)",
        "root (Cron) @x.example",
        "a@x.example, (b) c",
    ],
)
def test_a_comment_hides_no_address(text):
    assert "'to'" in refusal(mailboxes, text, "to")


def test_a_name_with_a_comma_is_one_author_and_never_a_lost_recipient():
    assert sent(("from", "Doe, Jane <j@example.com>"))["from"] == '"Doe, Jane" <j@example.com>'
    assert "'to'" in refusal(order, ("to", "bob, Alice <alice@dest.example>"))


def test_several_authors_stand_in_one_field_and_the_first_is_the_sender():
    fields = (("from", "Ann <ann@other.example>"), ("from", "Bob <bob@example.com>"))
    message = sent(*fields)
    assert message.get_all("from") == ["Ann <ann@other.example>, Bob <bob@example.com>"]
    assert message["sender"] == "Ann <ann@other.example>"
    assert order(*fields).reverse_path == "bob@example.com"
    assert sent(*fields, ("h:Sender", "bob@example.com"))["sender"] == "bob@example.com"


# --- header fields --------------------------------------------------------------------------------


def test_header_fields_that_the_relay_makes_itself_are_passed_over():
    handed = [
        ("h:content-type", 'multipart/mixed; boundary="x"; charset=UTF-8'),
        ("h:Content-Transfer-Encoding", "7bit"),
        ("h:mime-version", "1.0"),
        ("h:Return-Path", "bounces@example.com"),
        ("h:Received", "from x by y; z"),
        ("h:DKIM-Signature", "v=1"),
        ("h:Bcc", "secret@dest.example"),
        ("h:From", "Ann <ann@example.com>"),
        ("h:X-Empty", ""),
        ("h:X-Blank", " \r\n "),
    ]
    assert octets(*handed) == octets()


@pytest.mark.parametrize(
    "value",
    [
        "<a@b.example>\r\n <c@d.example>\r\n\t<e@f.example>",
        "=?utf-8?Q?Gr=C3=BC=C3=9Fe?=\r\n =?utf-8?Q?_und_mehr?=",
        "<https://x.example/" + "u" * 300 + ">,\r\n <mailto:x@y.example>",
        "two  blanks   and a\ttab, and  words " * 9,
    ],
)
def test_a_folded_value_arrives_as_it_would_unfold(value):
    header = octets(("h:References", value)).partition(b"\r\n\r\n")[0].decode("ascii")
    [field] = re.findall(r"^References: ([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)", header, re.MULTILINE)
    wanted = value.replace("\r\n", "").strip()
    assert field.replace("\r\n", "") == wanted


@pytest.mark.parametrize(
    "value", ["a\r\nBcc: x@y.example", "a\nb", "a\rb", "a\0b", "x\r\n\r\nbody"]
)
def test_value_cannot_begin_a_header_field(value):
    assert "h:X-A" in refusal(octets, ("h:X-A", value))
    assert "h:Reply-To" in refusal(octets, ("h:Reply-To", f"r@b.example{value[1:]}"))


def test_several_reply_to_are_one_field():
    fields = (("h:Reply-To", "Jörg <j@x.example>, k@x.example"), ("h:reply-to", "l@x.example"))
    [value] = sent(*fields).get_all("reply-to")
    assert value == "Jörg <j@x.example>, k@x.example, l@x.example"


def test_the_clients_own_message_id_needs_no_brackets():
    assert own_message_id(form(("h:Message-Id", "x@y.example"))) == "<x@y.example>"


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=120))
def test_a_subject_arrives_as_it_was_written(subject):
    header = octets(("subject", subject)).partition(b"\r\n\r\n")[0].decode("ascii")
    [field] = re.findall(r"^Subject: ([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)", header, re.MULTILINE)
    plain = field.replace("\r\n", "")
    if "=?" not in subject:
        plain = str(make_header(decode_header(plain)))
    wanted = re.sub(r"[\r\n\0]+", " ", re.sub(r"\r?\n(?=[ \t])", "", subject).strip(" \t\r\n"))
    assert plain == wanted


# --- files ----------------------------------------------------------------------------------------


def test_an_inline_file_has_the_content_id_its_url_says():
    html = '<img src="cid:my logo (1).png"><img src="cid:5f@host.mail">'
    files = (
        File("inline", "my logo (1).png", "image/png", b"1"),
        File("inline", "5f@host.mail", "image/png", b"2"),
        File("inline", "a" * 200 + ".png", "image/png", b"3"),
    )
    content = octets(("html", html), files=files)
    assert b"\r\nContent-ID: <my logo (1).png>\r\n" in content
    assert b"\r\nContent-ID: <5f@host.mail>\r\n" in content
    assert b"\r\nContent-ID: <" + b"a" * 200 + b".png>\r\n" in content
    message = email.message_from_bytes(content, policy=email.policy.default)
    body = message.get_body(("html",))
    assert isinstance(body, EmailMessage)
    assert body.get_content().strip() == html


def test_an_inline_file_beyond_ascii_is_found_by_the_html_all_the_same():
    html = '<img src="cid:größe.png"><img src="cid:gr%C3%B6%C3%9Fe.png">'
    message = sent(("html", html), files=(File("inline", "größe.png", "image/png", b"x"),))
    related = next(part for part in message.walk() if part.get_content_type() == "image/png")
    body = message.get_body(("html",))
    assert isinstance(body, EmailMessage)
    shown = body.get_content()
    cid = related["content-id"].strip("<>")
    assert cid.isascii()
    assert shown.count(f'"cid:{cid}"') == 2
    assert related.get_filename() == "größe.png"


@pytest.mark.parametrize(
    ("content_type", "filename", "sent_as"),
    [
        (
            "text/calendar; method=REQUEST; charset=UTF-8",
            "i.ics",
            'text/calendar; method="REQUEST"; charset="UTF-8"',
        ),
        ("application/pdf; name*=utf-8''gr%C3%B6.pdf", "x.pdf", "application/pdf"),
        ('text/x-log; format="a;b"', "x.log", 'text/x-log; format="a;b"'),
        ("", "report.pdf", "application/pdf"),
        ("", "unheard.of", "application/octet-stream"),
        ("application/octet-stream", "report.pdf", "application/octet-stream"),
    ],
)  # fmt: skip
def test_a_file_keeps_the_type_its_client_gave_it(content_type, filename, sent_as):
    [part] = sent(files=(File("attachment", filename, content_type, b"x\n"),)).iter_attachments()
    assert part["content-type"].startswith(sent_as)
    assert part.get_payload(decode=True) == b"x\n"


@pytest.mark.parametrize("content", [b"Subject: a\r\n\r\nb\r\n", "Subject: a\n\nGrüße\n".encode()])
def test_a_message_is_attached_in_no_encoding(content):
    attached = octets(files=(File("attachment", "m.eml", "message/rfc822", content),))
    assert content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") in attached
    [part] = email.message_from_bytes(attached, policy=email.policy.default).iter_attachments()
    assert part.get_content_type() == "message/rfc822"
    assert part["content-transfer-encoding"] == (None if content.isascii() else "8bit")


@pytest.mark.parametrize("content", [b"Subject: " + b"x" * 2000, b"a\0b", b"a\rb\r\n"])
def test_a_message_that_would_have_to_be_encoded_arrives_as_a_file(content):
    [part] = sent(
        files=(File("attachment", "m.eml", "message/rfc822", content),)
    ).iter_attachments()
    assert part.get_content_type() == "application/octet-stream"
    assert part.get_payload(decode=True) == content


def test_a_file_name_that_is_too_long_is_refused_and_not_cut():
    files = (File("attachment", "x" * 252 + ".pdf", "", b""),)
    assert "attachment" in refusal(lambda: octets(files=files))


def test_text_arrives_whatever_its_lines_are():
    long_line = "x" * 3000 + " ü\r\n.\r\nFrom here\r\n"
    assert sent(("text", long_line)).get_content() == long_line
    only_html = sent(("text", ""), ("html", "<p>x"))
    assert only_html.get_content_type() == "text/html"


# --- events ---------------------------------------------------------------------------------------


def query(name: str, value: str):
    return read_query({name: value}, domain="example.com")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("delivered", {"delivered"}),
        ("accepted OR delivered", {"accepted", "delivered"}),
        ("failed or Delivered", {"delivered", "failed"}),
        ('"delivered"', {"delivered"}),
        ("NOT accepted", {"delivered", "failed"}),
        ("opened", {"opened"}),
    ],
)
def test_expression_of_events_selects_exactly_its_events(value, names):
    if " or " in value:
        assert "event" in refusal(query, "event", value)  # in lower case it is a word
    else:
        assert query("event", value).wanted.names == names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("event", "accepted AND delivered"),
        ("event", "accepted delivered"),
        ("event", "accepted,delivered"),
        ("event", "NOT accepted OR delivered"),
        ("event", "accepted OR"),
        ("event", "(accepted OR delivered)"),
        ("event", "OR"),
        ("tags", "a OR b"),
        ("tags", "NOT a"),
        ("subject", "a AND"),
        ("subject", 'a "b"'),
        ("subject", '"a" OR "b"'),
        ("subject", "Hello (urgent)"),
        ("from", "a OR b"),
        ("recipient", "a@b.example OR c@d.example"),
        ("recipient", "a@b.example,c@d.example"),
        ("message-id", "a@b OR c@d"),
        ("severity", "high"),
        ("severity", "permanent OR temporary"),
        ("attachment", "a.pdf"),
        ("list", "l@b.example"),
        ("size", ">1000"),
        ("recipients", "a@b.example"),
        ("Event", "delivered"),
        ("evnt", "delivered"),
    ],
)
def test_a_filter_that_is_not_understood_is_refused_by_name(name, value):
    assert name in refusal(query, name, value)


@pytest.mark.parametrize(
    ("name", "value", "fields"),
    [
        ("subject", "rock and roll", (("subject", "rock and roll"),)),
        ("subject", '"a AND b"', (("subject", "a AND b"),)),
        ("subject", 'x y AND "z"', (("subject", "x y"), ("subject", "z"))),
        ("tags", "a AND b", (("tag", "a"), ("tag", "b"))),
        ("message-id", "<a@b>", (("message-id", "a@b"),)),
        ("severity", "permanent", (("severity", "permanent"),)),
    ],
)
def test_every_value_of_a_filter_has_to_match(name, value, fields):
    assert query(name, value).wanted.fields == fields
