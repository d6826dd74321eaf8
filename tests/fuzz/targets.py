"""What is fuzzed: each target takes octets and raises where a promise is broken.

A target's first octets choose how the rest is read, so that one run covers all ways.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email import message_from_bytes, policy
from itertools import pairwise

from relay.deliver.framing import MAX_REPLY_BYTES, DotStuffing, Garbled, ReplyReader
from relay.deliver.mime import TooComplex, Walk
from relay.deliver.sevenbit import Conversion, NotConvertible, Survey
from relay.deliver.transaction import _is_safe_path, is_clean
from relay.mail.address import AddressError, domain_of, parse_path
from relay.mail.header import iter_fields, remove_fields, split_content
from relay.mail.reply import Reply
from relay.mail.section import HeaderSection, Sections
from relay.policy.fields import BadField, refuse_displaced
from relay.queue.summary import summarise
from relay.receive.content import BareNewlines, BdatReader, DataReader
from relay.receive.parameters import ParameterError, mail_parameters, rcpt_parameters
from relay.receive.sasl import Exchange
from relay.receive.spec import BareNewline
from relay.sign.signature import author_domain
from relay.submit.options import read_options
from tests.fakes.scribe import Scribe

__all__ = ["SEEDS", "TARGETS", "WORDS"]

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def _cut(octets: bytes, how: int) -> list[bytes]:
    """In pieces, as a network may; `how` 0: whole."""
    if not how:
        return [octets]
    marks = [0, *range(1 + how % 3, len(octets), 1 + how % 13), len(octets)]
    return [octets[a:b] for a, b in pairwise(marks)]


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
    assert len(path) <= 254
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
    exchange = Exchange()
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
    strays = list(BareNewlines)[octets[0] % 3]
    with_lf, how, wire = bool(octets[1] & 1), octets[2], octets[3:] + b"\r\n.\r\nQUIT\r\n"
    whole = DataReader(limit_bytes=4000, strays=strays, ends_with_lf=with_lf)
    end = whole.feed(wire)
    pieces, rest = DataReader(limit_bytes=4000, strays=strays, ends_with_lf=with_lf), b""
    for piece in _cut(wire, how):
        rest += piece if pieces.complete else piece[pieces.feed(piece) :]
    assert whole.complete
    assert pieces.complete
    assert (pieces.flaw, rest) == (whole.flaw, wire[end:])
    taken = whole.take()
    assert pieces.take() == taken
    if not (strays is BareNewlines.LINE_ENDS and with_lf):
        assert wire[end:] == (b"\r\n" + wire).partition(b"\r\n.\r\n")[2]
    if whole.flaw is None:
        assert taken.count(b"\r") == taken.count(b"\n") == taken.count(b"\r\n")
        assert whole.eight_bit or taken.isascii()
        _goes_on(taken, how)
    _in_chunks(octets[3:], how)


def _goes_on(taken: bytes, how: int) -> None:
    """As the next host reads it, strictly and loosely."""
    stuffer = DotStuffing()
    sent = b"".join([*map(stuffer.stuff, _cut(taken, how)), stuffer.end()])
    assert len(re.findall(rb"(?:\r\n|\r|\n|\A)\.(?:\r\n|\r|\n)", sent)) == 1
    reader = DataReader(limit_bytes=10_000)
    assert reader.feed(sent) == len(sent)
    arrived = reader.take()
    assert arrived in (taken, taken + b"\r\n")


def _in_chunks(octets: bytes, how: int) -> None:
    reader = BdatReader(limit_bytes=4000)
    chunks = _cut(octets, how) or [b""]
    for number, chunk in enumerate(chunks):
        reader.begin_chunk(len(chunk), last=number == len(chunks) - 1)
        assert reader.feed(chunk) == len(chunk)
    assert reader.complete
    if reader.flaw is None:
        assert reader.take() in (octets, octets + b"\r\n")


def headers(octets: bytes) -> None:
    """Fields are read in one way, and no policy field goes on that any reader could see."""
    header, rest = split_content(octets)
    assert header + rest == octets
    parts = Sections.of(octets)
    assert octets.endswith(parts.rest.removeprefix(b"\r\n"))
    with suppress(BadField):
        refuse_displaced(parts.behind)
    fields = list(iter_fields(header))
    assert b"".join(field.raw for field in fields) == header
    assert remove_fields(header, {b"subject"}) == b"".join(
        f.raw for f in fields if f.name.lower() != b"subject"
    )
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


def conversions(octets: bytes) -> None:
    """A conversion is ASCII, leaves nothing out, and does not depend on how the content is cut."""
    how, message = (octets[0] if octets else 0), re.sub(rb"\r\n|\r|\n", b"\r\n", octets[1:])
    scribe = Scribe()
    walk = Walk(scribe)
    with suppress(TooComplex):
        for piece in _cut(message, how):
            walk.feed(piece)
        walk.finish()
        assert b"".join(scribe.told) == message
    with suppress(NotConvertible):
        survey = Survey()
        for piece in _cut(message, how):
            survey.feed(piece)
        plan = survey.finish()
        results = []
        for pieces in ([message], _cut(message, how)):
            conversion = Conversion(plan)
            results.append(b"".join([*map(conversion.feed, pieces), conversion.finish()]))
        assert results[0] == results[1]
        assert results[0].isascii()
        assert results[0] == message or plan.encodings


# --- the other side -------------------------------------------------------------------------------


def replies(octets: bytes) -> None:
    """A stream of replies is read in one way however it is cut, or is garbled, in little memory."""
    heard: list[tuple[list[Reply], str]] = []
    how, stream = (octets[0] if octets else 0), octets[1:]
    for pieces in ([stream], _cut(stream, how)):
        reader, taken, trouble = ReplyReader(), [], ""
        try:
            for piece in pieces:
                reader.buffer += piece
                while (reply := reader.take()) is not None:
                    assert 100 <= reply.code <= 599
                    reply.text.encode()
                    taken.append(reply)
        except Garbled:
            trouble = "garbled"
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
        converse(_cut(octets[2:], how), may_relay=may_relay, bare_newline=newline)
    )
    assert REPLY.fullmatch(said), said
    assert not store.staged
    assert said.count(b"queued as") == len(store.messages)
    assert may_relay or not store.messages
    for taken in store.contents:
        assert taken.count(b"\r") == taken.count(b"\n") == taken.count(b"\r\n")


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        addresses,
        parameters,
        passwords,
        content,
        headers,
        conversions,
        replies,
        sessions,
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
    *(b"=?utf-8?q?a=0d=0a?=", b"IPv6:", b"xn--", b"127.0.0.1", b"b.example", b"postmaster"),
]
"""What inputs are made of."""

SEEDS: Mapping[str, list[bytes]] = {
    "addresses": [
        b"\3<a@b.example> SIZE=1",
        b'\1<"a b"@c.example>',
        b"\0<@x,@y:a@b.example>",
        b"\1<\xc3\xa5@b.example>",
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
    "replies": [b"\2220 mx\r\n250-a\r\n250 b\r\n", b"\1550 5.1.1 no\r\n"],
    "sessions": [
        b"\1\3EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
        b"Subject: x\r\n\r\nx\r\n.\r\nQUIT\r\n",
        b"\1\1EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nBDAT 5\r\nhelloBDAT 0 LAST\r\n",
        b"\5\2EHLO x\nAUTH LOGIN\n*\nMAIL FROM:<a@b.example>\nRCPT TO:<c@d.example>\nDATA\na\n.\n",
    ],
}
