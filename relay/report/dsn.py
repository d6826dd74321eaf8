"""The message that tells a sender what became of theirs: a delivery status notification.

A multipart/report (RFC 6522) of three parts: a text for people, message/delivery-status
for programs (RFC 3464 §2), and of the message itself its header, or all of it where the
sender asked for that (RET=FULL, RFC 3461 §4.3), it is small, and TLS was not required:
what had to be encrypted must not come back in clear.

Everything a peer or a client wrote is hostile here. It is put on one line, escaped, cut
and indented, so that it can neither begin a header field nor end a part; `compose` raises
on no text at all. It is built from bytes, since the `email` package re-parses what it is
given and refuses some of it, and here nothing may be refused: a report that cannot be
made is a loss.

A report is pure ASCII unless it returns the content, so that any host takes it. Only to
an address that is not ASCII itself does it use the forms of RFC 6533 with UTF-8 in the
header, since such a report needs SMTPUTF8 on its way anyhow; elsewhere addresses beyond
ASCII are written as RFC 6533 §3 says (`utf-8; b\\x{FC}cher@…`).
"""

from __future__ import annotations

import binascii
import re
import textwrap
from collections.abc import Iterable, Iterator
from datetime import datetime
from email.utils import format_datetime

from relay.mail.address import in_header
from relay.mail.envelope import Ret
from relay.mail.header import split_content
from relay.mail.outcome import Code, Deferred
from relay.queue.entry import QueuedMessage, State
from relay.queue.settle import Change, Report, ReportKind

__all__ = ["MAX_CONTENT_BYTES", "compose", "returns_content"]

MAX_CONTENT_BYTES = 256 * 1024
"""A message longer than this is never returned whole."""

_MAX_HEADER_BYTES = 64 * 1024
_MAX_VALUE_BYTES = 940
"""Of one field; with its name it stays within a line (RFC 5322 §2.1.1: 998)."""

_MAX_REPLY_LINES = 20
_MAX_TOLD = 100
"""Recipients that the text for people is about; the part for programs has them all."""

_WIDTH = 76

_SUBJECT = {
    ReportKind.FAILED: "Your message could not be delivered",
    ReportKind.DELAYED: "Your message is delayed",
    ReportKind.RELAYED: "Your message was handed on",
}

_OPENING = {
    ReportKind.FAILED: "Your message could not be delivered to the recipients below. "
    "It will not be tried again.",
    ReportKind.DELAYED: "Your message has not reached the recipients below yet. It is still "
    "being tried; you need not send it again. If it cannot be delivered you will get another "
    "report.",
    ReportKind.RELAYED: "Your message was handed to the mail hosts of the recipients below. They "
    "do not report what becomes of it, so this is the last you hear unless it fails.",
}

_ADVICE = (  # the first that fits the status (RFC 3463 §3)
    (
        r"5\.7\.[45]",
        "This message was only to travel over a protected connection, and none of the recipient's "
        "mail hosts offered one that is good enough. Ask the recipient's postmaster to repair its "
        "TLS, or send what needs no protection without requiring it.",
    ),
    (
        r".\.4\.7",
        "The recipient's mail hosts did not take it for as long as it was tried. Send it again "
        "later, or reach the recipient some other way.",
    ),
    (
        r".\.1\.(?:10|2)|.\.4\.4",
        "The recipient's domain takes no mail, or does not exist. Check the part after the @.",
    ),
    (r".\.1\.", "Check the address for mistakes; the recipient may have a new one."),
    (
        r".\.2\.2|.\.2\.3",
        "The mailbox is full, or the message too large for it. Tell the recipient.",
    ),
    (
        r".\.3\.4",
        "The message is too large for the recipient's mail host. Send it in smaller parts.",
    ),
    (
        r".\.2\.",
        "The mailbox takes no mail at the moment. SessionOptions the recipient some other way.",
    ),
    (
        r".\.7\.",
        "The recipient's mail host refused it by a rule of its own. Its answer may say which; its "
        "postmaster can tell you more.",
    ),
    (
        r".\.6\.",
        "The recipient's mail host cannot handle the form of this message. Its answer may say what"
        " is wrong.",
    ),
    (r"", "If the answer does not help you, pass this report on to your postmaster."),
)

_UNSAFE_7BIT = re.compile(rb"[\x00\x80-\xff]|\r(?!\n)|(?<!\r)\n|[^\r\n]{999}")
_UNSAFE_8BIT = re.compile(rb"\x00|\r(?!\n)|(?<!\r)\n|[^\r\n]{999}")
_MESSAGE_ID = re.compile(
    rb"\r\nmessage-id[ \t]*:[ \t\r\n]{0,20}(<[!-;=?-~]{1,900}>)", re.IGNORECASE
)
_XTEXT = re.compile(r"\+([0-9A-F]{2})")
_ORCPT = re.compile(r"([A-Za-z0-9.-]{1,40});(.{1,1000})", re.DOTALL)
_JOINERS = "\u200c\u200d"


def returns_content(report: Report) -> bool:
    """Whether a report is to bring back all of the message, so that `compose` wants its content."""
    message = report.entry.message
    return (
        report.kind is ReportKind.FAILED
        and message.ret is Ret.FULL
        and not message.requiretls  # RFC 8689 §5
        and message.size_bytes <= MAX_CONTENT_BYTES
        and not any(change.recipient.settings.require_tls.value for change in report.changes)
    )


def compose(
    report: Report,
    *,
    header: bytes,
    hostname: str,
    queue_id: str,
    now: datetime,
    content: bytes | None = None,
) -> bytes:
    """The content of a DSN, lines ended by CRLF.

    `header` is the header section of the message it is about, `content` all of that message
    if `returns_content`; `queue_id` is the DSN's own. The envelope is the caller's: from
    the null reverse-path to the message's (RFC 3464 §2), SMTPUTF8 if that is not ASCII.
    """
    message = report.entry.message
    sender = _one_line(message.reverse_path)
    international = not sender.isascii()
    section = _bounded(split_content(header[: 2 * _MAX_HEADER_BYTES])[0])
    parts = [
        _text_part(report, hostname),
        _status_part(report, hostname, international),
        _full_part(report, content, international) or _header_part(section, international),
    ]
    name = re.sub(r"[^0-9A-Za-z]", "", queue_id)[:60] or "report"
    boundary = _boundary(name, parts)
    fields = [
        _field("From", f"Mail Delivery System <MAILER-DAEMON@{_ascii(hostname)}>", international),
        _field("To", f"<{in_header(sender)}>", international),
        _field("Subject", _SUBJECT[report.kind], international),
        _field("Date", format_datetime(now), international),
        _field("Message-ID", f"<{name}@{_ascii(hostname)}>", international),
        *_thread(section),
        _field("Auto-Submitted", "auto-replied", international),  # RFC 3834 §5
        _field("MIME-Version", "1.0", international),
        "Content-Type: multipart/report; report-type=delivery-status;\r\n"
        f' boundary="{boundary}"\r\n',
    ]
    delimiter = f"--{boundary}\r\n".encode()
    return b"".join(
        [
            _bytes("".join(fields)),
            b"\r\nThis is a MIME message with a delivery report (RFC 3464).\r\n\r\n",
            *(delimiter + part + b"\r\n" for part in parts),
            f"--{boundary}--\r\n".encode(),
        ]
    )


# The three parts.


def _text_part(report: Report, hostname: str) -> bytes:
    """What a person reads: what happened, what the host said, what to do."""
    text = "\r\n".join(_words(report, hostname)) + "\r\n"
    body = _bytes(text)
    charset = "us-ascii" if text.isascii() else "utf-8"
    return _part(f"text/plain; charset={charset}", "Notification", body)


def _status_part(report: Report, hostname: str, international: bool) -> bytes:
    """The part for programs (RFC 3464 §2): the message's fields, then each recipient's."""
    groups = [_message_fields(report.entry.message, hostname, international)]
    groups += [_recipient_fields(report, change, international) for change in report.changes]
    kind = "message/global-delivery-status" if international else "message/delivery-status"
    return _part(kind, "Delivery report", _bytes("\r\n".join("".join(group) for group in groups)))


def _header_part(section: bytes, international: bool) -> bytes:
    if international and _is_utf8(section):
        return _part("message/global-headers", "Header of your message", section)
    kind = "text/rfc822-headers"
    if not section.isascii():
        # Octets of no known charset: one that every octet fits shows them at least.
        kind += "; charset=utf-8" if _is_utf8(section) else "; charset=iso-8859-1"
    return _part(kind, "Header of your message", section)


def _full_part(report: Report, content: bytes | None, international: bool) -> bytes | None:
    """All of the message, where that is asked for, allowed and possible."""
    if content is None or len(content) > MAX_CONTENT_BYTES or not returns_content(report):
        return None
    if _UNSAFE_8BIT.search(content):
        return None  # RFC 2046 §5.2.1: a message in a message cannot be encoded
    header = split_content(content)[0]
    if not (_is_utf8(header) if international else header.isascii()):
        return None
    kind = "message/global" if international else "message/rfc822"
    encoding = "7bit" if content.isascii() else "8bit"
    return _headed(kind, "Your message", encoding) + content


def _part(kind: str, description: str, body: bytes) -> bytes:
    if kind.startswith("message/global") and not _UNSAFE_8BIT.search(body):
        return _headed(kind, description, "7bit" if body.isascii() else "8bit") + body
    if not _UNSAFE_7BIT.search(body):
        return _headed(kind, description, "7bit") + body
    return _headed(kind, description, "quoted-printable") + _quoted_printable(body)


def _headed(kind: str, description: str, encoding: str) -> bytes:
    return (
        f"Content-Type: {kind}\r\nContent-Description: {description}\r\n"
        f"Content-Transfer-Encoding: {encoding}\r\n\r\n"
    ).encode()


# The fields for programs.


def _message_fields(message: QueuedMessage, hostname: str, international: bool) -> list[str]:
    """RFC 3464 §2.2."""
    fields = [_field("Reporting-MTA", f"dns; {_ascii(hostname)}", international)]
    if message.envid:
        fields.append(_field("Original-Envelope-Id", _from_xtext(message.envid), international))
    fields.append(_field("Arrival-Date", format_datetime(message.arrived), international))
    fields.append(_field("X-Queue-ID", message.queue_id, international))
    return fields


def _recipient_fields(report: Report, change: Change, international: bool) -> list[str]:
    """RFC 3464 §2.3."""
    recipient, outcome = change.recipient, change.outcome
    fields = []
    original = _original_recipient(recipient.orcpt)
    if original:
        fields.append(_field("Original-Recipient", original, international))
    fields += [
        _field("Final-Recipient", _typed_address(recipient.address, international), international),
        _field("Action", report.kind.value, international),
        _field("Status", change.status, international),
    ]
    if outcome.session is not None and outcome.session.mx_host:
        fields.append(_field("Remote-MTA", f"dns; {outcome.session.mx_host}", international))
    if _is_reply(outcome.code):
        said = f"smtp; {outcome.code} {outcome.message}"
        fields.append(_field("Diagnostic-Code", said, international, fold=True))
    elif outcome.description or outcome.message:
        why = f"x-relay; {outcome.description or outcome.message}"
        fields.append(_field("Diagnostic-Code", why, international, fold=True))
    if recipient.last is not None:
        fields.append(
            _field("Last-Attempt-Date", format_datetime(recipient.last.at), international)
        )
    if report.kind is ReportKind.DELAYED and report.retry_until is not None:
        fields.append(
            _field("Will-Retry-Until", format_datetime(report.retry_until), international)
        )
    return fields


def _is_reply(code: int) -> bool:
    """Whether a code is a peer's, not one of our own."""
    return 200 <= code < 600 and code != Code.NO_USABLE_MX


def _typed_address(address: str, international: bool) -> str:
    """RFC 3464 §2.1.2; beyond ASCII RFC 6533 §3."""
    if address.isascii():
        return f"rfc822; {address}"
    if international:
        return f"utf-8; {address}"
    encoded = (c if "!" <= c <= "~" and c not in "+=\\" else f"\\x{{{ord(c):X}}}" for c in address)
    return f"utf-8; {''.join(encoded)}"


def _original_recipient(orcpt: str) -> str:
    """ORCPT as in RFC 3464 §2.3.1: its type, and the address without xtext; "": it is none."""
    match = _ORCPT.fullmatch(orcpt)
    if match is None:
        return ""
    # RFC 6533 §3: an address of type utf-8 has an encoding of its own, which stays.
    return f"{match[1]}; {match[2] if match[1].lower() == 'utf-8' else _from_xtext(match[2])}"


def _from_xtext(text: str) -> str:
    """RFC 3461 §4."""
    return _XTEXT.sub(lambda match: chr(int(match[1], 16)), text)


def _thread(section: bytes) -> list[str]:
    """The message this is about, so that a mail program shows both together (RFC 5322 §3.6.4)."""
    match = _MESSAGE_ID.search(b"\r\n" + section)
    if match is None:
        return []
    message_id = match[1].decode("ascii")
    return [f"In-Reply-To: {message_id}\r\n", f"References: {message_id}\r\n"]


# The words for people.


def _words(report: Report, hostname: str) -> Iterator[str]:
    message = report.entry.message
    yield from _wrapped(f"This is the mail system at {hostname}.")
    yield ""
    yield from _wrapped(_OPENING[report.kind])
    if report.kind is ReportKind.DELAYED and report.retry_until is not None:
        yield ""
        yield from _wrapped(f"It will be tried until {format_datetime(report.retry_until)}.")
    yield ""
    for name, value in (
        ("Subject", message.summary.subject),
        ("Sent", format_datetime(message.arrived)),
        ("Message-ID", message.summary.message_id),
        ("Queue ID", message.queue_id),
    ):
        if value:
            yield from _wrapped(f"{name}: {value}", "    ")
    for change in report.changes[:_MAX_TOLD]:
        yield ""
        yield from _about(report.kind, message, change)
    if len(report.changes) > _MAX_TOLD:
        yield ""
        more = len(report.changes) - _MAX_TOLD
        yield f"And {more} more recipients, listed in the report for programs."
    yield ""
    yield from _wrapped("The same for programs, and the header of your message, are attached.")


def _about(kind: ReportKind, message: QueuedMessage, change: Change) -> Iterator[str]:
    """One recipient."""
    outcome = change.outcome
    yield from _wrapped(f"<{change.recipient.address}>")
    if change.recipient.state is State.EXPIRED:
        days = (
            change.recipient.last.at if change.recipient.last else message.arrived
        ) - message.arrived
        yield from _wrapped(f"Given up after {max(days.days, 0)} days. The last attempt:", "    ")
    yield from _what_was_said(change)
    if outcome.description:
        yield from _wrapped(outcome.description, "    ")
    if isinstance(outcome, Deferred) and outcome.in_doubt:
        yield from _wrapped(
            "The host had all of the message then: it may have arrived all the same.", "    "
        )
    if outcome.hosts and kind is not ReportKind.RELAYED:
        yield "    Other hosts that were tried:"
        for host in outcome.hosts[:_MAX_REPLY_LINES]:
            yield from _wrapped(host, "        ")
    if kind is ReportKind.FAILED:
        yield from _wrapped(f"What to do: {_advice(change.status)}", "    ")


def _what_was_said(change: Change) -> Iterator[str]:
    """The host's own words, each line as it was."""
    outcome, session = change.outcome, change.outcome.session
    if not _is_reply(outcome.code):
        return
    host = f"{session.mx_host} [{session.mx_ip}]" if session is not None else "The mail host"
    yield from _wrapped(f"{host} answered:", "    ")
    for line in f"{outcome.code} {outcome.message}"[:4000].splitlines()[:_MAX_REPLY_LINES]:
        yield from _wrapped(line, "        ")


def _advice(status: str) -> str:
    return next(advice for pattern, advice in _ADVICE if re.match(pattern, status))


def _wrapped(text: str, indent: str = "") -> list[str]:
    """A paragraph on lines of 76, whatever is in it."""
    line = _one_line(text).strip()
    if len(line) + len(indent) <= _WIDTH:
        return [indent + line] if line else []
    return textwrap.wrap(
        line, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


# Text made harmless, and the way it is written.


def _one_line(text: str) -> str:
    """Text on one line: white space of any kind a space, what cannot be seen escaped, its length
    bounded.
    """
    text = text[: 4 * _MAX_VALUE_BYTES]
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    return " " if char.isspace() else char.encode("unicode_escape").decode("ascii")


def _ascii(text: str) -> str:
    return _one_line(text).encode("ascii", "backslashreplace").decode("ascii")


def _field(name: str, value: str, international: bool, *, fold: bool = False) -> str:
    """One field, with its CRLF. Folded at white space if `fold`: an address is better not taken
    apart.
    """
    value = _one_line(value) if international else _ascii(value)
    value = value.encode("utf-8")[:_MAX_VALUE_BYTES].decode("utf-8", "ignore").strip()
    line = f"{name}: {value}"
    if not fold or len(line) <= _WIDTH:
        return f"{line}\r\n"
    lines = textwrap.wrap(
        line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\r\n".join(lines) + "\r\n"


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _bounded(section: bytes) -> bytes:
    """As many whole lines of a header section as a report may carry."""
    if len(section) <= _MAX_HEADER_BYTES:
        return section
    return section[: section.rfind(b"\r\n", 0, _MAX_HEADER_BYTES) + 2]


def _quoted_printable(body: bytes) -> bytes:
    """RFC 2045 §6.7; CRLF stays the end of a line, any other CR or LF is encoded."""
    lines = (binascii.b2a_qp(line, istext=False) for line in body.split(b"\r\n"))
    return b"\r\n".join(line.replace(b"=\r\n", b"=\n").replace(b"=\n", b"=\r\n") for line in lines)


def _boundary(name: str, parts: Iterable[bytes]) -> str:
    """A boundary that no part contains (RFC 2046 §5.1.1)."""
    together = b"\n".join(parts)
    number = 1
    while f"{name}/{number}".encode() in together:
        number += 1
    return f"{name}/{number}"
