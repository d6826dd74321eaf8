"""How a mail host of the sandbox behaves, as data: a `Script`. Pure.

A script says what the host offers, how its TLS behaves, its answers to each verb, and where it
stops to answer or closes the connection. The keys of `replies` are the verbs of SMTP, and
`GREETING`, `CONTENT` (the final dot) and `TLS` (after the handshake, where the host sends nothing
but may close the connection). A key with an argument, such as `RCPT <bob@example.net>`, comes
before a key without.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from relay.sandbox.certificates import Kind


class StartTls(StrEnum):
    """How the host behaves at STARTTLS."""

    OK = "ok"
    ABSENT = "absent"
    """Not in the EHLO list; the command gets 502."""
    REFUSED_454 = "454"
    REFUSED_502 = "502"
    REPLY_354 = "354"
    CLOSE = "close"
    """No answer; the connection closes."""
    SILENCE = "silence"
    """No answer ever."""
    GARBAGE = "garbage"
    """220, then bytes that are no TLS."""
    HANG = "hang"
    """220, then nothing."""
    RESET = "reset"
    """220, then RST on the first bytes of the handshake."""
    CLOSE_IN_HANDSHAKE = "close-in-handshake"


class Then(StrEnum):
    """What the host does after an answer."""

    GO_ON = "go-on"
    CLOSE = "close"
    RESET = "reset"
    SILENCE = "silence"
    """The host reads on and sends nothing more."""


@dataclass(frozen=True, slots=True)
class ScriptedReply:
    """An answer and how to send it. `text` None: no answer. `bytes` are sent unchanged.

    `delay`: seconds before the answer. `drip`: seconds between its single bytes.
    """

    text: str | bytes | None
    delay: float = 0.0
    then: Then = Then.GO_ON
    drip: float = 0.0


ReplyOrText = str | ScriptedReply
"""A string is a reply without its line end; LF separates lines, each with its own code."""
Replies = Mapping[str, ReplyOrText | Sequence[ReplyOrText]]
"""The answers by verb. Of several answers, each use on a connection takes the next; the last one
repeats.
"""

_OFFERS = ("PIPELINING", "SIZE 52428800", "8BITMIME", "ENHANCEDSTATUSCODES", "DSN", "SMTPUTF8")

USUAL_REPLIES: dict[str, str] = {
    "GREETING": "220 {name} ESMTP",
    "HELO": "250 {name}",
    "MAIL": "250 2.1.0 OK",
    "RCPT": "250 2.1.5 OK",
    "DATA": "354 go on",
    "CONTENT": "250 2.0.0 OK",
    "BDAT": "250 2.0.0 OK",
    "RSET": "250 2.0.0 OK",
    "NOOP": "250 2.0.0 OK",
    "AUTH": "235 2.7.0 OK",
    "QUIT": "221 2.0.0 bye",
}

STARTTLS_REPLIES = {
    StartTls.ABSENT: "502 5.5.1 not implemented",
    StartTls.REFUSED_454: "454 4.7.0 TLS not available",
    StartTls.REFUSED_502: "502 5.5.1 not implemented",
    StartTls.REPLY_354: "354 go on",
}


@dataclass(frozen=True, slots=True)
class Script:
    """How a host behaves. The default is a good host with a good certificate.

    `offers`: the EHLO list (the host adds STARTTLS where it applies); `offers_in_tls`: the list
    after the handshake. `no_ehlo`: EHLO gets 502, HELO works. `inject`: bytes sent in clear in one
    segment with the 220 to STARTTLS. `replies_in_clear`: answers outside TLS, before `replies`.
    `resumes_tls`: one TLS context for all connections, so that a client may resume a session (RFC
    8446 §2.2). `read_bytes_per_second`: how fast the host reads content; `read_stops_after`: after
    how many bytes it stops. `client_ca`: the host asks for a client certificate, and takes none but
    of this authority (PEM).
    """

    offers: tuple[str, ...] = _OFFERS
    offers_in_tls: tuple[str, ...] | None = None
    no_ehlo: bool = False
    starttls: StartTls = StartTls.OK
    implicit_tls: bool = False
    certificate: Kind = Kind.GOOD
    minimum_tls: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    maximum_tls: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED
    resumes_tls: bool = False
    client_ca: bytes = b""
    inject: bytes = b""
    replies: Replies = field(default_factory=dict)
    replies_in_clear: Replies = field(default_factory=dict)
    read_bytes_per_second: int | None = None
    read_stops_after: int | None = None


TLS_1_0_ONLY = Script(minimum_tls=ssl.TLSVersion.TLSv1, maximum_tls=ssl.TLSVersion.TLSv1)


def as_reply(answer: ReplyOrText) -> ScriptedReply:
    return answer if isinstance(answer, ScriptedReply) else ScriptedReply(answer)


def begins_with(text: str | bytes, first_digit: str) -> bool:
    return (
        text.startswith(first_digit)
        if isinstance(text, str)
        else text.startswith(first_digit.encode())
    )


def encoded(text: str | bytes, name: str) -> bytes:
    """The octets of a reply: a hyphen after each code but the last (RFC 5321 §4.2.1)."""
    if isinstance(text, bytes):
        return text
    lines = text.replace("{name}", name).split("\n")
    marked = [f"{line[:3]}-{line[4:]}" for line in lines[:-1]] + [lines[-1]]
    return "".join(f"{line}\r\n" for line in marked).encode("utf-8", "surrogateescape")
