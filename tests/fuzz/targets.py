"""What is fuzzed: each target takes octets and raises where a promise is broken.

A target's first octets choose how the rest is read, so that one run covers all ways.
"""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email import message_from_bytes, policy
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from relay.deliver.framing import MAX_REPLY_BYTES, BadReply, DotStuffing, ReplyReader
from relay.deliver.mime import TooComplex, Walk
from relay.deliver.sevenbit import Conversion, NotConvertible, Survey
from relay.deliver.transaction import _is_safe_path, is_clean
from relay.mail.address import AddressError, domain_of, in_header, parse_path
from relay.mail.header import named, split_content
from relay.mail.ip import unmapped
from relay.mail.reply import Reply
from relay.mail.section import ASKING, HeaderSection, Sections, _as_read
from relay.policy.fields import BadField, refuse_fields_in_body
from relay.policy.rules import PolicyRules
from relay.queue.summary import summarise
from relay.receive.content import BdatReader, DataReader
from relay.receive.parameters import ParameterError, mail_parameters, rcpt_parameters
from relay.receive.sasl import AuthExchange
from relay.receive.spec import BareNewline
from relay.sign.signature import author_domain
from relay.submit.message import Refusal, judge_header
from relay.submit.options import read_options
from relay.submit.trace import Arrival
from tests.fakes.fields import iter_fields
from tests.fakes.scribe import Scribe
from tests.fuzz.domain_targets import TLSA_WORDS, policies, tlsa
from tests.fuzz.http_targets import forms, origins, webhooks
from tests.fuzz.operator_targets import requests
from tests.fuzz.pieces import cut

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


# --- addresses ------------------------------------------------------------------------------------


def addresses(octets: bytes) -> None:
    """What is accepted can be sent, is read the same by the next reader, and goes to one domain."""
    how, arg = octets[:1], octets[1:]
    flags = how[0] if how else 0
    try:
        text, rest = parse_path(arg, smtputf8=bool(flags & 1), lenient=bool(flags & 2))
    except AddressError:
        return
    path = text.encode()
    assert _is_safe_path(text) or not text
    assert is_clean(path)
    assert len(path) <= 898
    if text:
        parse_path(b"<%s>" % in_header(text).encode(), smtputf8=True)
    again, _ = parse_path(b"<%s>" % path, smtputf8=True)
    assert again == text
    with suppress(AddressError):
        domain = domain_of(text)
        assert domain.isascii()
        assert re.fullmatch(r"(?:[a-z0-9_.-]+|\[[0-9A-Za-z:.]+\])?", domain)
        assert domain_of(f"x@{domain}" if domain else "") == domain
    for read in (
        mail_parameters,
        lambda r, t: rcpt_parameters(r, t, "d.example", smtputf8=bool(flags & 1)),
    ):
        with suppress(ParameterError):
            read(rest, text)


def parameters(octets: bytes) -> None:
    """A parameter is obeyed or refused in one line."""
    for read in (mail_parameters, lambda r, t: rcpt_parameters(r, t, "d.example", smtputf8=True)):
        try:
            read(octets, "a@b.example")
        except ParameterError as error:
            encoded = error.reply.encode()
            assert encoded.count(b"\r\n") == 1
            assert encoded.isascii()


def passwords(octets: bytes) -> None:
    """An exchange ends, whatever a client answers."""
    exchange = AuthExchange()
    lines = octets.split(b"\n")
    step = exchange.begin(lines[0])
    for line in lines[1:4]:
        if isinstance(step, Reply):
            assert step.code >= 400
            return
        step.encode() if hasattr(step, "encode") else None
        step = exchange.answer(line)


# --- content --------------------------------------------------------------------------------------


def content(octets: bytes) -> None:
    """Content ends where it ends however it is cut, has CRLF and nothing else, and survives the
    next hop.
    """
    if len(octets) < 3:
        return
    bare_newline = list(BareNewline)[octets[0] % 3]
    with_lf, how, wire = bool(octets[1] & 1), octets[2], octets[3:] + b"\r\n.\r\nQUIT\r\n"
    whole = DataReader(limit_bytes=4000, bare_newline=bare_newline, ends_with_lf=with_lf)
    end = whole.feed(wire)
    pieces, rest = (
        DataReader(limit_bytes=4000, bare_newline=bare_newline, ends_with_lf=with_lf),
        b"",
    )
    for piece in cut(wire, how):
        rest += piece if pieces.complete else piece[pieces.feed(piece) :]
    assert whole.complete
    assert pieces.complete
    assert (pieces.flaw, rest) == (whole.flaw, wire[end:])
    taken = whole.held.take_all()
    assert pieces.held.take_all() == taken
    if not (bare_newline is BareNewline.LINE_END and with_lf):
        assert wire[end:] == (b"\r\n" + wire).partition(b"\r\n.\r\n")[2]
    if whole.flaw is None:
        assert taken.count(b"\r") == taken.count(b"\n") == taken.count(b"\r\n")
        assert whole.eight_bit or taken.isascii()
        _goes_on(taken, how)
    _in_chunks(octets[3:], how)


def _goes_on(taken: bytes, how: int) -> None:
    """As the next host reads it, strictly and loosely."""
    stuffer = DotStuffing()
    sent = b"".join([*map(stuffer.stuff, cut(taken, how)), stuffer.end()])
    assert len(re.findall(rb"(?:\r\n|\r|\n|\A)\.(?:\r\n|\r|\n)", sent)) == 1
    reader = DataReader(limit_bytes=10_000)
    assert reader.feed(sent) == len(sent)
    arrived = reader.held.take_all()
    assert arrived in (taken, taken + b"\r\n")


def _in_chunks(octets: bytes, how: int) -> None:
    reader = BdatReader(limit_bytes=4000)
    chunks = cut(octets, how) or [b""]
    for number, chunk in enumerate(chunks):
        reader.begin_chunk(len(chunk), last=number == len(chunks) - 1)
        assert reader.feed(chunk) == len(chunk)
    assert reader.complete
    if reader.flaw is None:
        assert reader.held.take_all() in (octets, octets + b"\r\n")


def headers(octets: bytes) -> None:
    """Fields are read in one way, and no policy field goes on that any reader could see."""
    header, rest = split_content(octets)
    assert header + rest == octets
    parts = Sections.of(octets)
    assert octets.endswith(parts.rest.removeprefix(b"\r\n"))
    with suppress(BadField):
        refuse_fields_in_body(parts.behind)
    fields = list(iter_fields(header))
    assert b"".join(field.raw for field in fields) == header
    found = [span.value(header) for span in named((b"subject",))(header)]
    assert found == [
        field.value for field in fields if field.name.rstrip(b" \t").lower() == b"subject"
    ]
    section = HeaderSection(header)
    with suppress(BadField):
        read_options(section, _NOW)
    stripped = section.without()
    assert not any(field.name.lower() == b"x-require-tls" for field in iter_fields(stripped))
    if header.count(b"\r") == header.count(b"\n") == header.count(b"\r\n"):
        parsed = message_from_bytes(stripped, policy=policy.compat32)
        assert "x-skip-verification" not in {name.lower() for name in parsed}
    assert section.count(b"received") <= header.lower().count(b"received")
    author_domain(header)
    summary = summarise(section)
    for text in (summary.subject, summary.from_, summary.to, summary.message_id):
        assert len(text) <= 4000
        assert not re.search(r"[\x00-\x1f\x7f]", text)


def beginnings(octets: bytes) -> None:
    """What any reader may take for a policy field is obeyed or refused; all other octets go on."""
    content = re.sub(rb"\r\n|\r|\n", b"\r\n", octets)
    header, rest, displaced = Sections.of(content)
    top = b"X-Mailbox-Line: "
    mailbox_line = top if header.startswith(top) and not content.startswith(top) else b""
    assert not mailbox_line or re.match(rb">*From ", content)
    whole = mailbox_line + content
    assert whole.startswith(header)
    if header + rest != whole:  # an empty line was missing behind the fields
        assert displaced
        assert rest == b"\r\n" + whole[len(header) :]
    opened = judge_header(
        HeaderSection(header),
        Arrival("relay.example", "Q", datetime(2026, 11, 20, tzinfo=UTC)),
        reverse_path="",
        domains=["d.example"],
        rules=PolicyRules(),
        received_hops=100,
        on_top=b"",
        displaced=displaced,
    )
    fields = re.split(rb"\r\n(?![ \t]|\Z)", header) if header else []
    asked = [wish for field in fields if (wish := _as_wish(field.replace(b"\r\n", b"")))]
    lines = displaced.split(b"\r\n")
    lines += [line for line in _FOLD.sub(b"\0", displaced).split(b"\r\n") if _is_cut(line)]
    behind = [wish for line in lines if (wish := _as_wish(line))]
    if isinstance(opened, Refusal):
        assert opened.reply.encode().count(b"\r\n") == 1
        assert asked or behind or _may_ask(header + displaced)
        return
    settings = opened.settings["d.example"]
    obeyed = {b"require": settings.require_tls.value, b"skip": settings.skip_verification.value}
    for what, value in asked:
        assert obeyed[what] is value
    assert all(value is (what == b"skip") for what, value in behind), behind
    assert obeyed[b"require"] is ((b"require", True) in asked)
    assert obeyed[b"skip"] is ((b"skip", True) in asked)
    kept = [field for field in fields if field.partition(b":")[0].lower() not in _OBEYED]
    assert opened.header.removesuffix(b"\r\n") == b"\r\n".join(kept).removesuffix(b"\r\n")
    parsed = message_from_bytes(opened.header + rest, policy=policy.compat32)
    assert not any(_as_wish(name.encode("latin-1", "replace") + b":") for name in parsed)


_OBEYED = frozenset(name.lower().encode() for name in ASKING)
_FOLD = re.compile(rb"\r\n(?=[ \t])")
_NAMES_IN_LETTERS = re.compile("xmaiigun|x(?:requiretis|skipverification)")


def _is_cut(line: bytes) -> bool:
    """Whether a name goes on behind a fold, which is a NUL here."""
    return 0 <= line.find(b"\0") < line.find(b":")


def _may_ask(octets: bytes) -> bool:
    """Whether a person could find the name of a policy field there."""
    text = _as_read(octets)
    readings = text, text.translate(str.maketrans("1|!0$5", "iiioss"))
    return any(
        _NAMES_IN_LETTERS.search(re.sub(r"[^a-z]", "", reading).replace("l", "i"))
        for reading in readings
    )


_NEAR_NAME = re.compile(
    "A*xA*(?:mailgunA*)?(?:(require)A*tls|(skip)A*verification)A*".replace("A", r"[\W\d_]")
)
"""Between the words may be anything but letters, of whatever script."""
_VALUES = {b"true": True, b"yes": True, b"1": True, b"on": True} | dict.fromkeys(
    (b"false", b"no", b"0", b"off"), False
)


def _as_wish(line: bytes) -> tuple[bytes, bool | None] | None:
    """What the most forgiving reader of a line on its own takes it for."""
    text = unicodedata.normalize("NFKD", line.decode("utf-8", "replace")).lower()
    name, colon, value = text.partition(":")
    match = _NEAR_NAME.fullmatch(name)
    if match is None or not colon:
        return None
    return (match[1] or match[2]).encode(), _VALUES.get(value.strip(" \t").encode())


def conversions(octets: bytes) -> None:
    """A conversion is ASCII, leaves nothing out, and does not depend on how the content is cut."""
    how, message = (octets[0] if octets else 0), re.sub(rb"\r\n|\r|\n", b"\r\n", octets[1:])
    scribe = Scribe()
    walk = Walk(scribe)
    with suppress(TooComplex):
        for piece in cut(message, how):
            walk.feed(piece)
        walk.finish()
        assert b"".join(scribe.told) == message
    with suppress(NotConvertible):
        survey = Survey()
        for piece in cut(message, how):
            survey.feed(piece)
        plan = survey.finish()
        results = []
        for pieces in ([message], cut(message, how)):
            conversion = Conversion(plan)
            results.append(b"".join([*map(conversion.feed, pieces), conversion.finish()]))
        assert results[0] == results[1]
        assert results[0].isascii()
        assert results[0] == message or plan.encodings


# --- the other side -------------------------------------------------------------------------------


def replies(octets: bytes) -> None:
    """A stream of replies is read in one way however it is cut, or is refused, in little memory."""
    heard: list[tuple[list[Reply], str]] = []
    how, stream = (octets[0] if octets else 0), octets[1:]
    for pieces in ([stream], cut(stream, how)):
        reader, taken, trouble = ReplyReader(), [], ""
        try:
            for piece in pieces:
                reader.buffer += piece
                while (reply := reader.take()) is not None:
                    assert 100 <= reply.code <= 599
                    reply.text.encode()
                    taken.append(reply)
        except BadReply:
            trouble = "refused"
        assert len(reader.buffer) <= MAX_REPLY_BYTES + len(stream)
        heard.append((taken, trouble))
    assert heard[0] == heard[1]


# --- all of it ------------------------------------------------------------------------------------


def sessions(octets: bytes) -> None:
    """Whatever a client says is answered in replies, and nobody relays who may not."""
    from tests.unit.receive.test_any_octets import REPLY, converse

    if len(octets) < 2:
        return
    may_relay, how = bool(octets[0] & 1), octets[1]
    newline = list(BareNewline)[octets[0] % 3]
    said, store = asyncio.run(
        converse(cut(octets[2:], how), may_relay=may_relay, bare_newline=newline)
    )
    assert REPLY.fullmatch(said), said
    assert not store.staged
    assert said.count(b"queued as") == len(store.messages)
    assert may_relay or not store.messages
    for taken in store.contents:
        assert taken.count(b"\r") == taken.count(b"\n") == taken.count(b"\r\n")


def proxies(octets: bytes) -> None:
    """Whoever a PROXY header names is the client; without a sound one nobody gets in."""
    from tests.unit.receive.test_any_octets import converse

    if not octets:
        return
    how, header = octets[0], octets[1:]
    results = []
    for pieces in ([header + _SCRIPT], cut(header + _SCRIPT, how)):
        said, store = asyncio.run(converse(pieces, networks=_PROXIED, proxied=True))
        assert not said or said.startswith((b"220 ", b"421 "))
        results.append((said, [new.message.client for new in store.messages]))
    assert _without_queue_ids(results[0]) == _without_queue_ids(results[1])
    client = _client_in(header + _SCRIPT)
    [(_, clients), _] = results
    for taken in clients:
        assert client is not None
        assert taken == f"x [{client}]"
        assert any(client in network for network in _PROXIED)


_PROXIED = (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))
_SCRIPT = (
    b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n\r\nx\r\n"
    b".\r\nQUIT\r\n"
)
_V2 = re.compile(rb"\r\n\r\n\0\r\nQUIT\n\x21([\x11\x12\x21\x22])..", re.DOTALL)
_V1 = re.compile(rb"PROXY TCP[^ ]*([46]) ([0-9A-Fa-f:.]+) [0-9A-Fa-f:.]+ [^ ]+ [^ ]+\r\n")


def _client_in(octets: bytes) -> IPv4Address | IPv6Address | None:
    """The client by the PROXY header that octets begin with; None where it names none."""
    if match := _V2.match(octets):
        size = 4 if match[1] < b"\x20" else 16
        return unmapped(ip_address(octets[16 : 16 + size]))
    if match := _V1.match(octets):
        try:
            return unmapped(ip_address(match[2].decode()))
        except ValueError:
            return None
    return None


def _without_queue_ids(result: tuple[bytes, list[str]]) -> tuple[bytes, list[str]]:
    return re.sub(rb"queued as \S+", b"", result[0]), result[1]


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        addresses,
        parameters,
        passwords,
        content,
        headers,
        beginnings,
        conversions,
        replies,
        sessions,
        proxies,
        forms,
        origins,
        webhooks,
        policies,
        tlsa,
        requests,
    )
}

WORDS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b".",
        b"\r\n.\r\n",
        b"\n.\n",
        b"\0",
        b" ",
        b"\t",
        b"<",
        b">",
        b"@",
        b'"',
        b"\\",
        b'\\"',
    ),
    *(
        b",",
        b":",
        b";",
        b"=",
        b"?=",
        b"=?",
        b"%",
        b"!",
        b"[",
        b"]",
        b"(",
        b")",
        b"-",
        b"--",
        b"\xc3\xa5",
        b"\xff",
    ),
    *(
        "\uff20".encode(),
        "\u3002".encode(),
        "\u200d".encode(),
        "\u212a".encode(),
        b"\xe2\x80\xae",
        b"a" * 70,
    ),
    *(
        b"MAIL FROM:<",
        b"RCPT TO:<",
        b"DATA\r\n",
        b"BDAT 5\r\n",
        b"BDAT 3 LAST\r\n",
        b"RSET\r\n",
        b"EHLO x\r\n",
    ),
    *(
        b"AUTH PLAIN ",
        b"AUTH LOGIN\r\n",
        b"*",
        b"AGFwcDEAc2VjcmV0",
        b"250-",
        b"250 ",
        b"550 5.1.1 ",
        b"421",
        b"354",
    ),
    *(
        b"SIZE=",
        b"BODY=8BITMIME",
        b"SMTPUTF8",
        b"ORCPT=rfc822;",
        b"NOTIFY=NEVER",
        b"RET=HDRS",
        b"ENVID=",
        b"+3D",
    ),
    *(
        b"X-Require-TLS:",
        b"X-Skip-Verification: yes",
        b"X-Mailgun-Drop-Message: yes",
        b"X-Mailgun-Variables: {}",
        "X-R\u0435quire-TLS:".encode(),
        b"Subject:",
        b"Received:",
        b"From: a@b.example",
        b"Content-Type:",
    ),
    *(
        b"multipart/mixed; boundary=b",
        b"message/rfc822",
        b"Content-Transfer-Encoding: 8bit",
        b"\r\n--b\r\n",
        b"--b--",
    ),
    *(
        b"X-Require-TLS: yes\r\n",
        b"x_skip_verification :no\r\n",
        b"\r\nX-Mailgun-Require-TLS: yes\r\n",
        b"From a@b\r\n",
        b"\xef\xbb\xbf",
        b"\xc2\xa0",
    ),
    *(
        b"\r\n--b\r\nContent-Disposition: form-data; name=",
        b"filename=",
        b"%41",
        b"&",
        b"base64",
        b"charset=",
    ),
    *(b"http://", b"https://", b"127.1", b"0x7f", b"localhost", b"::ffff:", b"/", b"#", b"?"),
    *(b"PROXY TCP4 ", b"PROXY UNKNOWN\r\n", b"10.0.0.5 ", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"),
    *(b"v=STSv1;", b"id=", b"version: STSv1\n", b"mode: none\n", b"mx: *.", b"max_age: 1\n"),
    *(b"\xfd", b"\xfe", b"\3\1\1", b"\2\0\0", *TLSA_WORDS),
    *(b'"all": true', b'"ids": ["M1"]', b'"verb": "remove"', b"\\ud800", b"{}", b"null", b"1e400"),
    *(b'"since": "0001-01-01T00:00:00+23:59"', b'"limit": ', b'"state": "held"', b'"follow": true'),
    *(b"=?utf-8?q?a=0d=0a?=", b"IPv6:", b"xn--", b"127.0.0.1", b"b.example", b"postmaster"),
]
"""What inputs are made of."""

SEEDS: Mapping[str, list[bytes]] = {
    "addresses": [
        b"\3<a@b.example> SIZE=1",
        b'\1<"a b"@c.example>',
        b"\0<@x,@y:a@b.example>",
        b"\1<\xc3\xa5@b.example>",
        b"\2\t< a..b@c.example\t>\tSIZE=1",
        b"\2<<.a.@b.example>> BODY=7BIT",
        b"\2" + b"l" * 80 + b"@b.example",
    ],
    "parameters": [
        b"SIZE=10 BODY=8BITMIME RET=FULL ENVID=x",
        b"NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;a+40b",
    ],
    "passwords": [b"PLAIN AGFwcDEAc2VjcmV0", b"LOGIN\nYXBwMQ==\nc2VjcmV0", b"PLAIN\n*"],
    "content": [b"\0\0\3Subject: x\r\n\r\n..a\r\n", b"\1\1\1a\n.\nb", b"\2\1\1a\n.\r\nb"],
    "headers": [
        b"X-Require-TLS: yes\r\nSubject: =?utf-8?q?x?=\r\n\r\nbody",
        b"From: A <a@b.example>\r\n fold\r\n\r\n",
    ],
    "conversions": [
        b"\3MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
        b"--b\r\n\r\n\xc3\xa5\r\n--b--\r\n",
        b"\1Subject: x\r\n\r\n\xe5 =\r\n",
    ],
    "beginnings": [
        b"X-Require-TLS: yes\r\nSubject: x\r\n\r\nbody",
        b"From a@b Fri Nov 20\r\nX-Skip-Verification: no\r\n folded\r\nTo: x\r\n\r\nbody",
        b"Subject: x\r\ngarbage\r\nX-Require-TLS: no\r\nX-Mailgun-Require-TLS : yes\r\n\r\nbody",
        b"\xef\xbb\xbfX-Require-TLS: 1\r\n\r\n",
        b"X-Require-\r\n TLS: on\r\n\r\n",
    ],
    "replies": [b"\2220 mx\r\n250-a\r\n250 b\r\n", b"\1550 5.1.1 no\r\n"],
    "sessions": [
        b"\1\3EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
        b"Subject: x\r\n\r\nx\r\n.\r\nQUIT\r\n",
        b"\1\1EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nBDAT 5\r\nhelloBDAT 0 LAST\r\n",
        b"\1\2 HELO my host\r\nMAIL\tFROM:< a..b@c.example >\r\nRCPT TO:<<d@e.example>>\r\n"
        b"QUIT x\r\n",
        b"\1\1\x16\3\1\2\0\1\0\1\xfc\3\3\r\nGET / HTTP/1.1\r\n\r\n",
        b"\5\2EHLO x\nAUTH LOGIN\n*\nMAIL FROM:<a@b.example>\nRCPT TO:<c@d.example>\nDATA\na\n.\n",
    ],
    "proxies": [
        b"\3PROXY TCP4 10.0.0.5 192.0.2.1 4000 25\r\n",
        b"\1PROXY TCP6 ::ffff:10.0.0.5 2001:db8::1 4000 25\r\n",
        b"\0PROXY UNKNOWN\r\n",
        b"\2\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\0\0\5\xc0\0\2\1\x0f\xa0\0\x19",
        b"\2\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24\x20\1\x0d\xb8" + bytes(27) + b"\1\x0f\xa0\0\x19",
        b"\4\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
    ],
    "forms": [
        b"\3\0from=a%40b.example&to=%c3%a5&text=a+b&&x&=y",
        b"\2\1text\xfeFfile\xfe\r\n--\xfe\xc3\xa5",
        b'\1\2multipart/form-data; boundary=b\n--b\r\nContent-Disposition: form-data; name="a"\r\n'
        b'\r\nx\r\n--b\r\nContent-Disposition: form-data; name=f; filename="y\\"z"\r\n'
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        b"eHh4\r\n--b--",
    ],
    "origins": [
        b"\0\nrelay.example:8080\nhttp://relay.example:8080\nhttps://relay.example:8080/a\n"
        b"same-origin",
        b"\0\n[::1]\nnull\nhttp://user@[::1]:80/?x#y\nnone",
    ],
    "webhooks": [
        b" https://hooks.example/a?b#c\n93.184.215.14\n10.0.0.5\n::ffff:10.0.0.5",
        b"Lhttp://user:pass@127.0.0.1:8080/\nfd00::5",
        b" http://[::ffff:169.254.169.254]/\n64:ff9b::a00:5\n2002:a00:5::",
        b" http://2130706433/\n0177.0.0.1",
    ],
    "policies": [
        b"v=STSv1; id=20261120T1;\xfev: x\r\nversion: STSv1\r\nmode: enforce\r\n"
        b"mx: mx.b.example\r\n"
        b"mx: *.b.example\r\nmax_age: 604800\r\n",
        b"v=spf1 -all\xfdv=STSv1;id=a ;x=\xfeversion:STSv1\nmode:testing\nmx:.b\n"
        b"max_age: 99999999999",
    ],
    "tlsa": [
        b"\0\0\0\3\1\1<leaf11>\n\3\1\2<leaf12>\n\2\0\1<issuer01>",
        b"\2\0\0\2\1\1<issuer11>\n\1\1\1<leaf11>",
        b"\7\x0c\x62\3\0\0<leaf00>\n\2\0\0<leaf00>",
        b"\3\7\1\3\0\0<leaf00>\n\2\0\0<issuer00>\n\2\1\0<issuer10>\n\2\1\2<leaf12>",
    ],
    "requests": [
        b'{"verb": "list", "domain": "example.net", "older-than": 1}',
        b'{"verb": "remove", "ids": ["M1"], "sender": "a@b.example", "state": "queued"}',
        b'{"verb": "hold", "all": true}',
        b'{"verb": "log", "since": "2026-01-31T12:00:00Z", "events": ["accepted"], "limit": 5}',
        b'{"verb": "log", "follow": true, "recipient": "<>", "id": "\\ud800"}',
        b'{"verb": "mta-sts-show", "domain": "b.example"}',
        b'{"verb": "show", "id": "M1"}',
        b'{"verb": "show", "id": "\\ud800"}',
        b'{"verb": "log", "limit": true}',
    ],
}
