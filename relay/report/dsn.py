"""Writes a delivery status notification: the message that reports to a sender. Pure.

A DSN is a multipart/report (RFC 6522) of three parts: a text for people (`dsn_text`), a
message/delivery-status for programs (RFC 3464 §2), and the header section of the message. The
third part is all of the message if the sender asked for that (RET=FULL, RFC 3461 §4.3), the message
is small, and it did not require TLS: content that had to be encrypted must not come back in clear.

The relay trusts no text of a peer or a client here. Such a text is put on one line, escaped, cut
and indented, so that it can neither begin a header field nor end a part. `compose` accepts every
text: a sender would hear nothing of a message whose report could not be written. The `email`
package refuses some texts, so this module writes the octets itself.

A report is ASCII unless it returns the content, so that every host accepts it. Only a report to an
address that is not ASCII uses the forms of RFC 6533 with UTF-8 in the header section: it needs
SMTPUTF8 in any case. In other reports, addresses beyond ASCII have the form of RFC 6533 §3
(`utf-8; b\\x{FC}cher@…`).
"""

from __future__ import annotations

import binascii
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime

from relay.mail.address import in_header
from relay.mail.envelope import Ret
from relay.mail.header import split_content
from relay.mail.printable import one_line
from relay.queue.entry import QueuedMessage
from relay.queue.settle import Change, Report, ReportKind
from relay.report.dsn_text import WIDTH, is_reply, text_for_people

MAX_CONTENT_BYTES = 256 * 1024
"""A longer message is never returned whole."""

_MAX_HEADER_BYTES = 64 * 1024
_MAX_VALUE_BYTES = 940
"""The value of a field; with its name it fits a line of 998 octets (RFC 5322 §2.1.1)."""

_SUBJECT = {
    ReportKind.FAILED: "Your message could not be delivered",
    ReportKind.DELAYED: "Your message is delayed",
    ReportKind.RELAYED: "Your message was handed on",
}

_UNSAFE_7BIT = re.compile(rb"[\x00\x80-\xff]|\r(?!\n)|(?<!\r)\n|[^\r\n]{999}")
_UNSAFE_8BIT = re.compile(rb"\x00|\r(?!\n)|(?<!\r)\n|[^\r\n]{999}")
_MESSAGE_ID = re.compile(
    rb"\r\nmessage-id[ \t]*:[ \t\r\n]{0,20}(<[!-;=?-~]{1,900}>)", re.IGNORECASE
)
_XTEXT = re.compile(r"\+([0-9A-F]{2})")
_ORCPT = re.compile(r"([A-Za-z0-9.-]{1,40});(.{1,1000})", re.DOTALL)


def returns_content(report: Report) -> bool:
    """Whether a report returns all of the message, so that `compose` needs its content."""
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
    """The content of a DSN, with CRLF.

    `header`: the header section of the message that the DSN reports on. `content`: all of that
    message, if `returns_content`. `queue_id`: of the DSN. The caller makes the envelope: from the
    null reverse-path to the message's reverse-path (RFC 3464 §2), with SMTPUTF8 if that is not
    ASCII.
    """
    sender = _bounded_line(report.entry.message.reverse_path)
    writer = _FieldWriter(international=not sender.isascii())
    section = _bounded(split_content(header[: 2 * _MAX_HEADER_BYTES])[0])
    parts = [
        _text_part(report, hostname),
        _status_part(report, hostname, writer),
        _full_part(report, content, writer) or _header_part(section, writer),
    ]
    name = re.sub(r"[^0-9A-Za-z]", "", queue_id)[:60] or "report"
    boundary = _boundary(name, parts)
    fields = [
        writer.field("From", f"Mail Delivery System <MAILER-DAEMON@{_ascii(hostname)}>"),
        writer.field("To", f"<{in_header(sender)}>"),
        writer.field("Subject", _SUBJECT[report.kind]),
        writer.field("Date", format_datetime(now)),
        writer.field("Message-ID", f"<{name}@{_ascii(hostname)}>"),
        *_references(section),
        writer.field("Auto-Submitted", "auto-replied"),  # RFC 3834 §5
        writer.field("MIME-Version", "1.0"),
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


@dataclass(frozen=True, slots=True)
class _FieldWriter:
    """Writes fields in ASCII, or in UTF-8 for a sender whose address is not ASCII (RFC 6533)."""

    international: bool

    def field(self, name: str, value: str, *, fold: bool = False) -> str:
        """One field with its CRLF, folded at white space if `fold`. An address is not folded."""
        value = _bounded_line(value) if self.international else _ascii(value)
        value = value.encode("utf-8")[:_MAX_VALUE_BYTES].decode("utf-8", "ignore").strip()
        line = f"{name}: {value}"
        if not fold or len(line) <= WIDTH:
            return f"{line}\r\n"
        lines = textwrap.wrap(
            line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        return "\r\n".join(lines) + "\r\n"

    def typed_address(self, address: str) -> str:
        """An address with its type (RFC 3464 §2.1.2; beyond ASCII RFC 6533 §3)."""
        if address.isascii():
            return f"rfc822; {address}"
        if self.international:
            return f"utf-8; {address}"
        kept = (c if "!" <= c <= "~" and c not in "+=\\" else f"\\x{{{ord(c):X}}}" for c in address)
        return f"utf-8; {''.join(kept)}"


# --- the three parts ----------------------------------------------------------------------------


def _text_part(report: Report, hostname: str) -> bytes:
    text = "\r\n".join(text_for_people(report, hostname)) + "\r\n"
    charset = "us-ascii" if text.isascii() else "utf-8"
    return _part(f"text/plain; charset={charset}", "Notification", _bytes(text))


def _status_part(report: Report, hostname: str, writer: _FieldWriter) -> bytes:
    """The part for programs (RFC 3464 §2): fields of the message, then of each recipient."""
    groups = [_message_fields(report.entry.message, hostname, writer)]
    groups += [_recipient_fields(report, change, writer) for change in report.changes]
    kind = "message/global-delivery-status" if writer.international else "message/delivery-status"
    return _part(kind, "Delivery report", _bytes("\r\n".join("".join(group) for group in groups)))


def _header_part(section: bytes, writer: _FieldWriter) -> bytes:
    if writer.international and _is_utf8(section):
        return _part("message/global-headers", "Header of your message", section)
    kind = "text/rfc822-headers"
    if not section.isascii():
        # The charset is not known. With iso-8859-1, every octet is shown as some character.
        kind += "; charset=utf-8" if _is_utf8(section) else "; charset=iso-8859-1"
    return _part(kind, "Header of your message", section)


def _full_part(report: Report, content: bytes | None, writer: _FieldWriter) -> bytes | None:
    """All of the message, if that was asked for, and is allowed and possible."""
    if content is None or len(content) > MAX_CONTENT_BYTES or not returns_content(report):
        return None
    if _UNSAFE_8BIT.search(content):
        return None  # RFC 2046 §5.2.1: a message in a message cannot be encoded
    header = split_content(content)[0]
    if not (_is_utf8(header) if writer.international else header.isascii()):
        return None
    kind = "message/global" if writer.international else "message/rfc822"
    encoding = "7bit" if content.isascii() else "8bit"
    return _part_header(kind, "Your message", encoding) + content


def _part(kind: str, description: str, body: bytes) -> bytes:
    if kind.startswith("message/global") and not _UNSAFE_8BIT.search(body):
        return _part_header(kind, description, "7bit" if body.isascii() else "8bit") + body
    if not _UNSAFE_7BIT.search(body):
        return _part_header(kind, description, "7bit") + body
    return _part_header(kind, description, "quoted-printable") + _quoted_printable(body)


def _part_header(kind: str, description: str, encoding: str) -> bytes:
    return (
        f"Content-Type: {kind}\r\nContent-Description: {description}\r\n"
        f"Content-Transfer-Encoding: {encoding}\r\n\r\n"
    ).encode()


# --- the fields for programs ----------------------------------------------------------------------


def _message_fields(message: QueuedMessage, hostname: str, writer: _FieldWriter) -> list[str]:
    """RFC 3464 §2.2."""
    fields = [writer.field("Reporting-MTA", f"dns; {_ascii(hostname)}")]
    if message.envid:
        fields.append(writer.field("Original-Envelope-Id", _from_xtext(message.envid)))
    fields.append(writer.field("Arrival-Date", format_datetime(message.arrived)))
    fields.append(writer.field("X-Queue-ID", message.queue_id))
    return fields


def _recipient_fields(report: Report, change: Change, writer: _FieldWriter) -> list[str]:
    """RFC 3464 §2.3."""
    recipient, outcome = change.recipient, change.outcome
    original = _original_recipient(recipient.orcpt)
    fields = [writer.field("Original-Recipient", original)] if original else []
    fields += [
        writer.field("Final-Recipient", writer.typed_address(recipient.address)),
        writer.field("Action", report.kind.value),
        writer.field("Status", change.status),
    ]
    if outcome.session is not None and outcome.session.mx_host:
        fields.append(writer.field("Remote-MTA", f"dns; {outcome.session.mx_host}"))
    if is_reply(outcome.code):
        reply = f"smtp; {outcome.code} {outcome.message}"
        fields.append(writer.field("Diagnostic-Code", reply, fold=True))
    elif outcome.description or outcome.message:
        reason = f"x-relay; {outcome.description or outcome.message}"
        fields.append(writer.field("Diagnostic-Code", reason, fold=True))
    if recipient.last is not None:
        fields.append(writer.field("Last-Attempt-Date", format_datetime(recipient.last.at)))
    if report.kind is ReportKind.DELAYED and report.retry_until is not None:
        fields.append(writer.field("Will-Retry-Until", format_datetime(report.retry_until)))
    return fields


def _original_recipient(orcpt: str) -> str:
    """ORCPT in the form of RFC 3464 §2.3.1: type, address without xtext; "" if it is invalid."""
    match = _ORCPT.fullmatch(orcpt)
    if match is None:
        return ""
    # RFC 6533 §3: an address of type utf-8 keeps its own encoding.
    return f"{match[1]}; {match[2] if match[1].lower() == 'utf-8' else _from_xtext(match[2])}"


def _from_xtext(text: str) -> str:
    """The text that xtext stands for (RFC 3461 §4)."""
    return _XTEXT.sub(lambda match: chr(int(match[1], 16)), text)


def _references(section: bytes) -> list[str]:
    """Fields that name the message, so that mail programs show both together (RFC 5322 §3.6.4)."""
    match = _MESSAGE_ID.search(b"\r\n" + section)
    if match is None:
        return []
    message_id = match[1].decode("ascii")
    return [f"In-Reply-To: {message_id}\r\n", f"References: {message_id}\r\n"]


# --- texts and octets ----------------------------------------------------------------------------


def _bounded_line(text: str) -> str:
    return one_line(text[: 4 * _MAX_VALUE_BYTES])


def _ascii(text: str) -> str:
    return _bounded_line(text).encode("ascii", "backslashreplace").decode("ascii")


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _bounded(section: bytes) -> bytes:
    """The first whole lines of a header section, as many as a report may have."""
    if len(section) <= _MAX_HEADER_BYTES:
        return section
    return section[: section.rfind(b"\r\n", 0, _MAX_HEADER_BYTES) + 2]


def _quoted_printable(body: bytes) -> bytes:
    """Quoted-printable (RFC 2045 §6.7): a CRLF stays a line end, any other CR or LF is encoded."""
    lines = (binascii.b2a_qp(line, istext=False) for line in body.split(b"\r\n"))
    return b"\r\n".join(line.replace(b"=\r\n", b"=\n").replace(b"=\n", b"=\r\n") for line in lines)


def _boundary(name: str, parts: Iterable[bytes]) -> str:
    """A boundary that no part contains (RFC 2046 §5.1.1)."""
    together = b"\n".join(parts)
    number = 1
    while f"{name}/{number}".encode() in together:
        number += 1
    return f"{name}/{number}"
