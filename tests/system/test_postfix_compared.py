"""The same dialogues with our listener and with a Postfix: what it takes of a client, we take.

Where the two differ, `DIFFERENCES` names the paragraph of docs/decisions.md that says why. What we
take arrives at the next hop and in the delivery log as it was written.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from argon2 import PasswordHasher

from relay.sandbox.script import Script
from tests.fakes.client import Client
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port
from tests.rigs.postfix import postfix
from tests.rigs.sandbox import Sandbox
from tests.rigs.sasl import sasl_server

pytestmark = [pytest.mark.needs("root", "postfix"), pytest.mark.timeout(240)]

DECISIONS = Path(__file__).parents[2] / "docs/decisions.md"
EHLO, FROM, TO = b"EHLO client.example", b"MAIL FROM:<a@sender.example>", b"RCPT TO:<b@mx.example>"
PLAIN = b"AUTH PLAIN " + base64.b64encode(b"\0app1\0secret")
WRONG = b"AUTH PLAIN " + base64.b64encode(b"\0app1\0wrong")
ENVELOPE = (FROM, TO)

NAMES: dict[str, bytes] = {
    "a blank": b"my host",
    "blanks": b"my own  host here",
    "a blank at the end": b"client.example ",
    "two blanks before": b" client.example",
    "a tab": b"client\texample",
    "an umlaut in UTF-8": "büro.example".encode(),
    "an umlaut in Latin-1": "büro.example".encode("latin-1"),
    "a literal": b"[192.0.2.1]",
    "a literal of IPv6": b"[IPv6:2001:db8::1]",
    "a malformed literal": b"[192.0.2.1",
    "an address without brackets": b"192.0.2.1",
    "an underscore": b"my_host",
    "one label": b"localhost",
    "a final dot": b"client.example.",
    "a hyphen first": b"-host",
    "quotes and brackets": b'"<host>"',
    "parentheses": b"host(comment)",
    "an address": b"me@client.example",
    "a colon": b"host:25",
    "nothing": b"",
    "255 octets": b"x" * 255,
    "256 octets": b"x" * 256,
    "1,000 octets": b"x" * 1000,
    "an escape": b"host\x1b[2J",
    "a backspace": b"host\x08",
}

PATHS: dict[str, bytes] = {
    "plain": b"<%s@mx.example>",
    "a blank behind the colon": b" <%s@mx.example>",
    "blanks behind the colon": b"    <%s@mx.example>",
    "a tab behind the colon": b"\t<%s@mx.example>",
    "a blank at the end of the line": b"<%s@mx.example> ",
    "a tab at the end of the line": b"<%s@mx.example>\t",
    "a blank before the bracket": b"<%s@mx.example >",
    "a blank behind the bracket": b"< %s@mx.example>",
    "blanks on both sides": b"<  %s@mx.example  >",
    "a tab inside the brackets": b"<\t%s@mx.example\t>",
    "a blank before the at": b"<%s @mx.example>",
    "a blank behind the at": b"<%s@ mx.example>",
    "a blank in the local part": b"<%s c@mx.example>",
    "no brackets": b"%s@mx.example",
    "no brackets, blank before": b" %s@mx.example",
    "no brackets, blank behind": b"%s@mx.example ",
    "only an opening bracket": b"<%s@mx.example",
    "only a closing bracket": b"%s@mx.example>",
    "two pairs of brackets": b"<<%s@mx.example>>",
    "a name before the bracket": b"Bob <%s@mx.example>",
    "a quoted name before the bracket": b'"Bob" <%s@mx.example>',
    "a comment": b"<%s@mx.example(Bob)>",
    "a comment behind": b"<%s@mx.example> (Bob)",
    "64 octets": b"<%s" + b"l" * 56 + b"@mx.example>",
    "over 64 octets": b"<%s-srs0=hhhh=tt=" + b"orig.example=" * 8 + b"user@mx.example>",
    "200 octets": b"<%s" + b"l" * 192 + b"@mx.example>",
    "256 octets in all": b"<%s" + b"l" * 235 + b"@mx.example>",
    "400 octets": b"<%s" + b"l" * 392 + b"@mx.example>",
    "two dots": b"<%s..b@mx.example>",
    "a dot first": b"<.%s@mx.example>",
    "a dot last": b"<%s.@mx.example>",
    "dots only": b"<%s...@mx.example>",
    "quoted with a blank": b'<"%s b"@mx.example>',
    "quoted without need": b'<"%s"@mx.example>',
    "quoted with a dot last": b'<"%s."@mx.example>',
    "quoted with an escaped quote": b'<"%s\\"b"@mx.example>',
    "quoted with brackets": b'<"%s<b>"@mx.example>',
    "quoted with a comma": b'<"%s,b"@mx.example>',
    "quoted in part": b'<"%s"b@mx.example>',
    "a quoted word behind a dot": b'<%s."b c"@mx.example>',
    "a backslash": b"<%s\\b@mx.example>",
    "an escaped blank": b"<%s\\ b@mx.example>",
    "a comma": b"<%s,b@mx.example>",
    "a semicolon": b"<%s;b@mx.example>",
    "a colon": b"<%s:b@mx.example>",
    "square brackets": b"<%s[b]@mx.example>",
    "parentheses": b"<%s(b)@mx.example>",
    "signs": b"<%s+tag=x/y*z'{}|~^`#$&?@mx.example>",
    "a percent sign": b"<%s%%other.example@mx.example>",
    "an exclamation mark": b"<other.example!%s@mx.example>",
    "two at signs": b"<%s@other.example@mx.example>",
    "an at sign in quotes": b'<"%s@other.example"@mx.example>',
    "an encoded word": b"<=?utf-8?q?%s?=@mx.example>",
    "a source route": b"<@one.example:%s@mx.example>",
    "a source route of two": b"<@one.example,@two.example:%s@mx.example>",
    "upper case": b"<%sB@MX.EXAMPLE>",
    "a final dot": b"<%s@mx.example.>",
    "an underscore in the domain": b"<%s@m_x.example>",
    "a domain that begins with a hyphen": b"<%s@-mx.example>",
    "a domain with two dots": b"<%s@mx..example>",
    "a domain with a dot first": b"<%s@.mx.example>",
    "one label": b"<%s@mx>",
    "a literal": b"<%s@[192.0.2.1]>",
    "an address without brackets": b"<%s@192.0.2.1>",
    "a number as last label": b"<%s@mx.1>",
    "no domain": b"<%s>",
    "an at sign and no domain": b"<%s@>",
    "no local part": b"<@mx.example>",
    "an empty quoted local part": b'<""@mx.example>',
    "nothing": b"",
    "an umlaut": "<%sü@mx.example>".encode(),
    "an umlaut in Latin-1": b"<%s\xfc@mx.example>",
    "a hyphen first": b"<-%s@mx.example>",
    "an escape": b"<%s\x1b@mx.example>",
}


def path(form: bytes, tag: bytes = b"tag") -> bytes:
    return form % ((tag,) if b"%s" in form else ())


ORDERS: dict[str, tuple[bytes, ...]] = {
    "MAIL without EHLO": (*ENVELOPE,),
    "HELO, then a message": (b"HELO client.example", *ENVELOPE),
    "HELO, then AUTH": (b"HELO client.example", PLAIN, *ENVELOPE),
    "AUTH without EHLO": (PLAIN, EHLO, *ENVELOPE),
    "AUTH, then EHLO again": (EHLO, PLAIN, EHLO, PLAIN),
    "AUTH in a transaction": (EHLO, FROM, PLAIN, TO),
    "AUTH behind RCPT": (EHLO, FROM, TO, PLAIN, TO),
    "AUTH twice": (EHLO, PLAIN, PLAIN, *ENVELOPE),
    "AUTH with a wrong password, then the right one": (EHLO, WRONG, PLAIN, *ENVELOPE),
    "AUTH without argument": (EHLO, b"AUTH"),
    "AUTH in lower case": (EHLO, b"auth plain" + PLAIN[10:]),
    "AUTH with two blanks": (EHLO, b"AUTH  PLAIN  " + PLAIN[11:]),
    "AUTH with an unknown mechanism": (EHLO, b"AUTH CRAM-MD5"),
    "AUTH PLAIN in two lines": (EHLO, b"AUTH PLAIN", PLAIN[11:]),
    "AUTH LOGIN": (EHLO, b"AUTH LOGIN", b"YXBwMQ==", b"c2VjcmV0"),
    "AUTH LOGIN with the name": (EHLO, b"AUTH LOGIN YXBwMQ==", b"c2VjcmV0"),
    "AUTH cancelled": (EHLO, b"AUTH LOGIN", b"*", PLAIN),
    "AUTH that is not base64": (EHLO, b"AUTH PLAIN !!!", PLAIN),
    "AUTH for another identity": (EHLO, b"AUTH PLAIN " + base64.b64encode(b"app1\0app1\0secret")),
    "EHLO twice": (EHLO, EHLO, *ENVELOPE),
    "EHLO in a transaction": (EHLO, FROM, EHLO, TO, *ENVELOPE),
    "HELO behind EHLO": (EHLO, b"HELO client.example", *ENVELOPE),
    "RSET at first": (b"RSET", EHLO, *ENVELOPE),
    "RSET in a transaction": (EHLO, *ENVELOPE, b"RSET", *ENVELOPE),
    "RSET with an argument": (EHLO, b"RSET now"),
    "MAIL twice": (EHLO, FROM, FROM, TO),
    "RCPT without MAIL": (EHLO, TO, *ENVELOPE),
    "DATA without MAIL": (EHLO, b"DATA"),
    "DATA without RCPT": (EHLO, FROM, b"DATA"),
    "DATA behind a refused RCPT": (EHLO, FROM, b"RCPT TO:<>", b"DATA"),
    "DATA with an argument": (EHLO, *ENVELOPE, b"DATA now"),
    "NOOP": (b"NOOP", EHLO, b"NOOP"),
    "NOOP with an argument": (EHLO, b"NOOP hello there"),
    "QUIT with an argument": (EHLO, b"QUIT now"),
    "VRFY": (EHLO, b"VRFY bob"),
    "VRFY of an address": (EHLO, b"VRFY <b@mx.example>", b"VRFY b@mx.example"),
    "VRFY without argument": (EHLO, b"VRFY"),
    "VRFY without EHLO": (b"VRFY b@mx.example",),
    "EXPN": (EHLO, b"EXPN list"),
    "HELP": (EHLO, b"HELP"),
    "HELP with an argument": (EHLO, b"HELP MAIL"),
    "ETRN": (EHLO, b"ETRN mx.example"),
    "TURN, SEND, SOML": (EHLO, b"TURN", b"SEND FROM:<a@b.example>", b"SOML FROM:<a@b.example>"),
    "XCLIENT": (EHLO, b"XCLIENT ADDR=192.0.2.1"),
    "an unknown command": (EHLO, b"FOO", *ENVELOPE),
    "an empty line": (EHLO, b"", *ENVELOPE),
    "a blank line": (EHLO, b"  ", *ENVELOPE),
    "a blank before the command": (EHLO, b" MAIL FROM:<a@sender.example>"),
    "a blank behind the command": (EHLO, b"NOOP ", b"RSET ", FROM, TO, b"QUIT "),
    "a tab behind MAIL": (EHLO, b"MAIL\tFROM:<a@sender.example>"),
    "two blanks behind MAIL": (EHLO, b"MAIL  FROM:<a@sender.example>"),
    "a blank before the colon": (EHLO, b"MAIL FROM :<a@sender.example>"),
    "MAIL without a colon": (EHLO, b"MAIL FROM <a@sender.example>"),
    "MAIL without FROM": (EHLO, b"MAIL <a@sender.example>"),
    "MAIL TO": (EHLO, b"MAIL TO:<a@sender.example>"),
    "MAIL without argument": (EHLO, b"MAIL"),
    "lower case": (
        b"ehlo client.example",
        b"mail from:<a@sender.example>",
        b"rcpt to:<b@mx.example>",
    ),
    "odd case": (
        b"eHlO client.example",
        b"mAiL fRoM:<a@sender.example>",
        b"RcPt tO:<b@mx.example>",
    ),
    "the null reverse-path": (EHLO, b"MAIL FROM:<>", TO),
    "the null reverse-path behind a blank": (EHLO, b"MAIL FROM: <>", TO),
    "the null reverse-path with a blank in it": (EHLO, b"MAIL FROM:< >", TO),
    "the null forward-path": (EHLO, FROM, b"RCPT TO:<>"),
    "postmaster": (EHLO, FROM, b"RCPT TO:<postmaster>", b"RCPT TO:<Postmaster>"),
    "a recipient twice": (EHLO, FROM, TO, TO),
    "SIZE in lower case": (EHLO, FROM + b" size=1000", TO),
    "SIZE without a value": (EHLO, FROM + b" SIZE"),
    "SIZE with an empty value": (EHLO, FROM + b" SIZE="),
    "SIZE of nothing": (EHLO, FROM + b" SIZE=0", TO),
    "SIZE that is no number": (EHLO, FROM + b" SIZE=big"),
    "SIZE of too much": (EHLO, FROM + b" SIZE=999999999"),
    "SIZE beyond any": (EHLO, FROM + b" SIZE=" + b"9" * 25),
    "BODY in odd case": (EHLO, FROM + b" bOdY=8bitmime", TO),
    "BODY=7BIT": (EHLO, FROM + b" BODY=7BIT", TO),
    "BODY=BINARYMIME": (EHLO, FROM + b" BODY=BINARYMIME"),
    "BODY with another value": (EHLO, FROM + b" BODY=9BIT"),
    "parameters with many blanks": (EHLO, FROM + b"   SIZE=1000   BODY=8BITMIME  ", TO),
    "parameters behind a tab": (EHLO, FROM + b"\tSIZE=1000", TO),
    "parameters without a blank": (EHLO, FROM + b"SIZE=1000"),
    "a parameter twice": (EHLO, FROM + b" SIZE=1000 SIZE=1000"),
    "an unknown parameter of MAIL": (EHLO, FROM + b" FOO=bar"),
    "an unknown parameter of RCPT": (EHLO, FROM, TO + b" FOO=bar"),
    "parameters after HELO": (b"HELO client.example", FROM + b" SIZE=1000 BODY=8BITMIME", TO),
    "AUTH of MAIL": (EHLO, FROM + b" AUTH=<>", TO),
    "AUTH of MAIL with an address": (EHLO, FROM + b" AUTH=a@sender.example", TO),
    "RET and ENVID in odd case": (EHLO, FROM + b" ret=hdrs envid=QQ314159", TO),
    "RET with another value": (EHLO, FROM + b" RET=SOME"),
    "ENVID that is no xtext": (EHLO, FROM + b" ENVID=a+b"),
    "NOTIFY in odd case": (EHLO, FROM, TO + b" notify=success,Failure"),
    "NOTIFY of NEVER and more": (EHLO, FROM, TO + b" NOTIFY=NEVER,FAILURE"),
    "NOTIFY with an empty value": (EHLO, FROM, TO + b" NOTIFY="),
    "ORCPT": (EHLO, FROM, TO + b" ORCPT=rfc822;b+2Bx@mx.example"),
    "ORCPT without a type": (EHLO, FROM, TO + b" ORCPT=b@mx.example"),
    "ORCPT that is no xtext": (EHLO, FROM, TO + b" ORCPT=rfc822;b+x@mx.example"),
    "ORCPT with a blank": (EHLO, FROM, TO + b" ORCPT=rfc822; b@mx.example"),
    "SMTPUTF8 with an umlaut": (
        EHLO,
        "MAIL FROM:<ü@sender.example> SMTPUTF8".encode(),
        "RCPT TO:<ü@mx.example>".encode(),
    ),
    "SMTPUTF8 without need": (EHLO, FROM + b" SMTPUTF8", TO),
    "BDAT without a transaction": (EHLO, b"BDAT 0 LAST", *ENVELOPE),
    "BDAT of nothing": (EHLO, *ENVELOPE, b"BDAT 0 LAST"),
    "BDAT with a size that is none": (EHLO, *ENVELOPE, b"BDAT many"),
    "a command of 1,000 octets": (EHLO, b"NOOP " + b"x" * 995),
    "a command of 3,000 octets": (EHLO, b"NOOP " + b"x" * 2995),
    "GET": (b"GET / HTTP/1.1",),
    "commands that end with LF": (EHLO + b"\n", FROM + b"\n", TO + b"\n"),
    "STARTTLS": (EHLO, b"STARTTLS"),
    "STARTTLS without EHLO": (b"STARTTLS",),
    "STARTTLS after HELO": (b"HELO client.example", b"STARTTLS"),
    "STARTTLS with an argument": (EHLO, b"STARTTLS now"),
    "STARTTLS in a transaction": (EHLO, FROM, b"STARTTLS"),
    "fifteen unknown commands, then a message": (EHLO, *[b"FOO"] * 15, *ENVELOPE),
    "ninety NOOPs and RSETs, then a message": (EHLO, *[b"NOOP", b"RSET"] * 45, *ENVELOPE),
}

CONTENTS: dict[str, bytes] = {
    "an ordinary message": b"From: a@sender.example\r\nSubject: x\r\n\r\nhello\r\n",
    "nothing": b"",
    "an empty line": b"\r\n",
    "a header alone": b"Subject: x\r\n",
    "text alone": b"hello\r\n",
    "no line end before the dot": b"Subject: x\r\n\r\nhello",
    "the line of a mailbox file": b"From a@b Fri Nov 27 10:00:00 2026\r\nSubject: x\r\n\r\nx\r\n",
    "a blank first": b" Subject: x\r\n\r\nhello\r\n",
    "a field with a blank before its colon": b"From : a@sender.example\r\nSubject : x\r\n\r\nx\r\n",
    "a field without a name": b": x\r\n\r\nhello\r\n",
    "8 bits without BODY": "Subject: größer\r\n\r\nGrüße\r\n".encode(),
    "Latin-1 in the header": b"Subject: gr\xf6\xdfer\r\n\r\nhello\r\n",
    "a line of 3,000 octets": b"Subject: x\r\n\r\n" + b"x" * 3000 + b"\r\n",
    "a line of 100,000 octets": b"Subject: x\r\n\r\n" + b"x" * 100_000 + b"\r\n",
    "a field of 100,000 octets": b"Subject: x\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\nhello\r\n",
    "5,000 fields": b"X-Many: x\r\n" * 5000 + b"\r\nhello\r\n",
    "a dot line": b"Subject: x\r\n\r\n..\r\n. \r\n..x\r\n",
    "two From fields": b"From: a@b.example\r\nFrom: c@d.example\r\n\r\nhello\r\n",
    "control characters": b"Subject: x\x07\x1b\r\n\r\n\x01\x02\x7f\r\n",
    "forty Received fields": b"Received: from x by y\r\n" * 40 + b"\r\nhello\r\n",
    "a NUL": b"Subject: x\r\n\r\na\0b\r\n",
    "a bare LF": b"Subject: x\r\n\r\na\nb\r\n",
    "a bare CR": b"Subject: x\r\n\r\na\rb\r\n",
}

DIALOGUES: dict[str, tuple[bytes, ...]] = {
    **{f"EHLO with {name}": (b"EHLO " + text, *ENVELOPE) for name, text in NAMES.items()},
    **{f"HELO with {name}": (b"HELO " + text, *ENVELOPE) for name, text in NAMES.items()},
    **{f"MAIL: {n}": (EHLO, b"MAIL FROM:" + path(form), TO) for n, form in PATHS.items()},
    **{f"RCPT: {n}": (EHLO, FROM, b"RCPT TO:" + path(form)) for n, form in PATHS.items()},
    **ORDERS,
    **{
        f"DATA: {name}": (EHLO, *ENVELOPE, b"DATA", content + b"\r\n.\r\n")
        for name, content in CONTENTS.items()
    },
}

GRAMMAR, ROUTING = "A path is a mailbox of RFC 5321", "An address is what software behind us"
LITERAL, DOMAIN, UTF8 = (
    "Address literals are refused",
    "An address has a domain",
    "An address beyond ASCII needs SMTPUTF8",
)
HELO, NEWLINE, TWICE = (
    "MAIL waits for EHLO or HELO",
    "Bare CR and LF are refused",
    "A parameter is said once",
)

NUL = "A NUL in a message is refused"

_REFUSED_PATHS = {
    "a blank before the at": GRAMMAR,
    "a blank behind the at": GRAMMAR,
    "only a closing bracket": GRAMMAR,
    "a comment": GRAMMAR,
    "a quoted word behind a dot": GRAMMAR,
    "a backslash": GRAMMAR,
    "an escaped blank": GRAMMAR,
    "a colon": GRAMMAR,
    "parentheses": GRAMMAR,
    "no local part": GRAMMAR,
    "an escape": GRAMMAR,
    "a percent sign": ROUTING,
    "an exclamation mark": ROUTING,
    "two at signs": ROUTING,
    "an at sign in quotes": ROUTING,
    "an encoded word": ROUTING,
    "a number as last label": LITERAL,
    "no domain": DOMAIN,
    "an umlaut": UTF8,
}

DIFFERENCES: dict[str, str] = {
    **{f"MAIL: {name}": reason for name, reason in _REFUSED_PATHS.items()},
    **{f"RCPT: {name}": reason for name, reason in _REFUSED_PATHS.items()},
    "RCPT: a literal": LITERAL,
    "MAIL without EHLO": HELO,
    "EHLO with nothing": HELO,
    "HELO with nothing": HELO,
    "commands that end with LF": NEWLINE,
    "DATA: a bare LF": NEWLINE,
    "DATA: a bare CR": NEWLINE,
    "DATA: a NUL": NUL,
    "a parameter twice": TWICE,
}
"""Where we refuse and Postfix takes: the first words of the paragraph of docs/decisions.md."""

WE_TAKE = {
    "EHLO with an umlaut in Latin-1",
    "HELO with an umlaut in Latin-1",
    "MAIL: a hyphen first",  # Postfix guards programs that it runs for a recipient; we run none
    "RCPT: a hyphen first",
    "HELP",
    "HELP with an argument",
}
"""Where Postfix refuses and we take."""


@dataclass(frozen=True)
class Ports:
    ours: int
    postfix: int


def certificate_files(directory: Path) -> tuple[str, str]:
    """A certificate and its key, in files that a Postfix may read."""
    leaf = trustme.CA().issue_cert("localhost")
    certificate, key = directory / "tls.pem", directory / "tls.key"
    leaf.cert_chain_pems[0].write_to_path(str(certificate))
    leaf.private_key_pem.write_to_path(str(key))
    return str(certificate), str(key)


@contextlib.asynccontextmanager
async def both(sandbox: Sandbox) -> AsyncIterator[Ports]:
    """A relay and a Postfix with the same networks, the same user and the same limits."""
    hashed = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("secret")
    async with sasl_server("app1", "secret") as sasl:
        certificate, key = certificate_files(sandbox.directory)
        settings = {
            "myhostname": "postfix.test.example",
            "default_transport": "discard",
            "relay_transport": "discard",
            "smtpd_error_sleep_time": "0",
            "smtpd_client_connection_count_limit": "0",
            "smtpd_sasl_auth_enable": "yes",
            "smtpd_sasl_type": "dovecot",
            "smtpd_sasl_path": f"inet:127.0.0.1:{sasl}",
            "smtpd_tls_security_level": "may",
            "smtpd_tls_cert_file": certificate,
            "smtpd_tls_key_file": key,
        }
        relay = await sandbox.prepare(access={"users": {"app1": {"password": hashed}}})
        relay.config["listeners"][0] |= {
            "auth": "optional",
            "auth_without_tls": True,
            "tls": "starttls",
            "certificate": certificate,
            "key": key,
        }
        await asyncio.to_thread(relay.start)
        port = free_port()
        with postfix(settings, port=port, name="compared") as running:
            yield Ports(relay.port, running.port)


async def played(port: int, lines: tuple[bytes, ...], *, at_once: bool = False) -> list[str]:
    """The reply to the greeting and to each line; "closed" where there is none."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        octets = [line if line.endswith(b"\n") else line + b"\r\n" for line in lines]
        heard = [await reply(reader)]
        if at_once:
            await _say(writer, b"".join(octets))
        for line in octets:
            if not at_once:
                await _say(writer, line)
            heard.append(await reply(reader))
        return heard
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _say(writer: asyncio.StreamWriter, octets: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(octets)
        await writer.drain()


async def reply(reader: asyncio.StreamReader) -> str:
    line = b"   -"
    with contextlib.suppress(ConnectionError):
        while line[3:4] == b"-":
            async with asyncio.timeout(patient(20)):
                line = await reader.readline()
    return line.decode("ascii", "backslashreplace").rstrip() or "closed"


def taken(lines: tuple[bytes, ...], replies: list[str]) -> list[bool]:
    """Of each line, whether the reply says yes. 221 says so to QUIT alone: else it is the end."""
    said = zip((b"", *lines), replies, strict=True)
    return [
        reply[:1] in "23" and (reply[:3] != "221" or line[:4] == b"QUIT") for line, reply in said
    ]


async def test_relay_accepts_what_postfix_accepts_from_a_client(sandbox: Sandbox) -> None:
    async with both(sandbox) as ports:
        at_once = asyncio.Semaphore(20)

        async def compared(name: str) -> tuple[list[str], list[str]]:
            async with at_once:
                ours = await played(ports.ours, DIALOGUES[name])
                return ours, await played(ports.postfix, DIALOGUES[name])

        both_said = await asyncio.gather(*map(compared, DIALOGUES))
    we_refuse, we_take = {}, {}
    for (name, lines), (ours, theirs) in zip(DIALOGUES.items(), both_said, strict=True):
        answers = list(zip(taken(lines, ours), taken(lines, theirs), strict=True))
        if (False, True) in answers:
            we_refuse[name] = f"{name}\n  ours    {ours[1:]}\n  Postfix {theirs[1:]}"
        elif (True, False) in answers:
            we_take[name] = f"{name}\n  ours    {ours[1:]}\n  Postfix {theirs[1:]}"
    found = we_refuse | we_take
    unlisted = [text for name, text in found.items() if name not in DIFFERENCES.keys() | WE_TAKE]
    assert not unlisted, "no reason is given for:\n" + "\n".join(unlisted)
    assert we_refuse.keys() == DIFFERENCES.keys()
    assert we_take.keys() == WE_TAKE


async def test_commands_said_at_once_are_answered_as_those_said_one_by_one(
    sandbox: Sandbox,
) -> None:
    """All but those whose octets mean something else while the client does not wait."""
    waited_for = (b"STARTTLS", b"BDAT 0", b"BDAT many")
    async with both(sandbox) as ports:
        for name, lines in DIALOGUES.items():
            if any(line.startswith(waited_for) for line in lines) or name.startswith("DATA: "):
                continue
            answers = await asyncio.gather(
                played(ports.ours, lines), played(ports.ours, lines, at_once=True)
            )
            assert answers[0] == answers[1], name


def test_each_difference_has_its_reason_in_the_decisions() -> None:
    decisions = DECISIONS.read_text("utf-8")
    assert [reason for reason in set(DIFFERENCES.values()) if f"**{reason}" not in decisions] == []


@dataclass(frozen=True)
class Odd:
    """A forward-path as a client says it, and the address that is carried on."""

    said: str
    carried: str = ""

    @property
    def address(self) -> str:
        return self.carried or self.said.strip("<>")


ODD = (
    Odd("<a..b@dest.example>"),
    Odd("<.a@dest.example>"),
    Odd("<a.@dest.example>"),
    Odd("<...@dest.example>"),
    Odd("<srs0=hhhh=tt=" + "orig.example=" * 8 + "user@dest.example>"),
    Odd("<" + "l" * 400 + "@dest.example>"),
    Odd('<"john smith"@dest.example>'),
    Odd('<"a>b"@dest.example>'),
    Odd('<"a..b"@dest.example>'),
    Odd("<-x@dest.example>"),
    Odd("<one+tag=x/y*z'{}|~^`#$&?@dest.example>"),
    Odd("<UPPER@Dest.Example>"),
    Odd("< blanks@dest.example\t>", "blanks@dest.example"),
    Odd("\t<tab@dest.example>\t", "tab@dest.example"),
    Odd("<<double@dest.example>>", "double@dest.example"),
    Odd("bare@dest.example", "bare@dest.example"),
    Odd("<@one.example:route@dest.example>", "route@dest.example"),
    Odd("<dot@dest.example.>", "dot@dest.example"),
)


async def test_accepted_address_is_sent_and_logged_as_it_was_written(sandbox: Sandbox) -> None:
    mx = await sandbox.domain("dest.example")
    relay = await sandbox.start()
    client = await Client.connect("127.0.0.1", relay.port)
    await client.begin("x..y@sender.example", "plain@dest.example")
    said = {odd: await client.say(f"RCPT TO:{odd.said}") for odd in ODD}
    assert {odd: reply for odd, reply in said.items() if not reply.startswith("250")} == {}
    assert (await client.data(b"Subject: odd\r\n\r\nodd\r\n.\r\n")).startswith("250")
    await client.close()
    carried = {odd.address for odd in ODD}
    events = await sandbox.all_attempted(carried, seconds=30)
    assert {address for address, told in events.items() if told} == carried
    [message] = mx.messages
    assert message.reverse_path == "x..y@sender.example"
    assert set(message.recipients) == {f"TO:<{a}>" for a in (*carried, "plain@dest.example")}


async def test_the_report_about_an_odd_address_reaches_its_odd_sender(sandbox: Sandbox) -> None:
    home = await sandbox.domain("sender.example")
    await sandbox.domain("dest.example", Script(replies={"RCPT": "550 5.1.1 no such user"}))
    await sandbox.start()
    await sandbox.submit("x..y@sender.example", "a..b@dest.example")
    await sandbox.attempts("x..y@sender.example")
    [report] = home.messages
    assert b'\r\nTo: <"x..y"@sender.example>\r\n' in report.content
    assert b"\r\nFinal-Recipient: rfc822; a..b@dest.example\r\n" in report.content
