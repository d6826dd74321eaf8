"""A message made of the fields of a form (RFC 5322, RFC 2045 and its kin), by the email package.

    multipart/mixed                     where there are attachments
      multipart/alternative             where there are several of text, amp-html and html
        text/plain
        text/x-amp-html
        multipart/related               where html has inline parts: <img src="cid:FILENAME">
          text/html
          the inline parts
      the attachments

Bodies are in 7-bit encodings, so that no host on the way has to convert them. Display names,
subjects and other text beyond ASCII become encoded words (RFC 2047), addresses beyond ASCII
stay UTF-8 (RFC 6532), for hosts that take them. Bcc is never written. The package composes the
body; the top header is written here, address by address, since its own folding of address
lists has been wrong in more than one release.
"""

from __future__ import annotations

import email.policy
import re
from collections.abc import Sequence
from datetime import datetime
from email.header import Header
from email.message import EmailMessage
from email.utils import format_datetime
from urllib.parse import quote

from relay.api.mailgun import ApiError, File, Form, Mailbox, header_fields, mailboxes
from relay.mail.header import iter_fields, unfold

__all__ = ["author_of", "compose", "normalise_mime", "own_message_id"]

_POLICY = email.policy.SMTP.clone(cte_type="7bit")
_ADDRESS_FIELDS = ("to", "cc", "reply-to", "sender")
_MEDIA_TYPE = re.compile(r"([A-Za-z0-9!#$&^_.+-]{1,64})/([A-Za-z0-9!#$&^_.+-]{1,64})")
_CHARSET = re.compile(r";\s*charset=\"?([A-Za-z0-9_.:-]{1,40})\"?", re.IGNORECASE)
_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]*")
_MESSAGE_ID = re.compile(r"<[!-;=?A-~]{1,400}@[!-;=?A-~]{1,400}>")
_BARE_CR = re.compile(rb"\r(?!\n)")
_LINE_CHARS = 76


def own_message_id(form: Form) -> str | None:
    """The Message-ID a form brings along, None where it leaves that to us."""
    for name, value in header_fields(form):
        if name.lower() == "message-id":
            if not _MESSAGE_ID.fullmatch(value.strip()):
                raise ApiError(400, "h:Message-Id is not a message id")
            return value.strip()
    return None


def compose(form: Form, *, message_id: str, now: datetime) -> bytes:
    """The content of the message, header section and body, with CRLF."""
    text, html = form.first("text"), form.first("html")
    if not (text or html):
        raise ApiError(400, "Need at least one of 'text' or 'html' parameters specified")
    body = _body(text, form.first("amp-html"), html, form.files)
    octets = body.as_bytes()
    return "".join(_top(form, message_id, now)).encode() + octets


def _top(form: Form, message_id: str, now: datetime) -> list[str]:
    """The header section but for the fields of MIME."""
    own = {name.lower() for name, _ in header_fields(form)}
    lines = [_address_line("From", mailboxes(form.first("from") or "", "from"))]
    for name in ("To", "Cc"):
        boxes = [box for value in form.all(name.lower()) for box in mailboxes(value, name.lower())]
        if boxes and name.lower() not in own:
            lines.append(_address_line(name, boxes))
    subject = form.first("subject")
    if subject is not None and "subject" not in own:
        lines.append(_text_line("Subject", re.sub(r"[\r\n\0]+", " ", subject)))
    if "date" not in own:
        lines.append(f"Date: {format_datetime(now.replace(microsecond=0))}\r\n")
    lines.append(f"Message-ID: {message_id}\r\n")
    for name, value in header_fields(form):
        if name.lower() in _ADDRESS_FIELDS:
            lines.append(_address_line(name, mailboxes(value, f"h:{name}")))
        elif name.lower() != "message-id":
            lines.append(_text_line(name, value))
    return lines


def _address_line(name: str, boxes: Sequence[Mailbox]) -> str:
    """An address field, one mailbox a line: no line grows with their number (RFC 5322 §2.1.1)."""
    return f"{name}: " + ",\r\n ".join(_address(box, name) for box in boxes) + "\r\n"


def _address(box: Mailbox, field: str) -> str:
    if not box.name:
        return box.address
    if not box.name.isascii():
        word = Header(box.name, "utf-8", maxlinelen=_LINE_CHARS, header_name=field).encode(
            linesep="\r\n"
        )
        return f"{word}\r\n <{box.address}>"
    if _ATOMS.fullmatch(box.name):
        return f"{box.name} <{box.address}>"
    escaped = re.sub(r'(["\\])', r"\\\1", box.name)
    return f'"{escaped}" <{box.address}>'


def _text_line(name: str, value: str) -> str:
    """An unstructured field, folded; beyond ASCII in encoded words (RFC 2047 §5)."""
    if value.isascii() and len(name) + len(value) + 2 <= _LINE_CHARS and value.isprintable():
        return f"{name}: {value}\r\n"
    charset = "us-ascii" if value.isascii() and value.isprintable() else "utf-8"
    folded = Header(value, charset, maxlinelen=_LINE_CHARS, header_name=name).encode(linesep="\r\n")
    return f"{name}: {folded}\r\n"


def _body(
    text: str | None, amp: str | None, html: str | None, files: Sequence[File]
) -> EmailMessage:
    message = EmailMessage(policy=_POLICY)
    alternatives = [("plain", text), ("x-amp-html", amp), ("html", html)]
    for subtype, content in alternatives:
        if not content:
            continue
        if "content-type" not in message:
            message.set_content(content, subtype=subtype, charset="utf-8")
        else:
            message.add_alternative(content, subtype=subtype, charset="utf-8")
    shown = message.get_body(("html",)) if html else None
    for file in files:
        if file.name == "inline" and isinstance(shown, EmailMessage):
            _add(shown, file, inline=True)
    for file in files:
        if file.name == "attachment" or (file.name == "inline" and shown is None):
            _add(message, file, inline=False)
    return message


def _add(message: EmailMessage, file: File, *, inline: bool) -> None:
    media, charset = (
        _MEDIA_TYPE.match(file.content_type.strip()),
        _CHARSET.search(file.content_type),
    )
    main, sub = (media[1].lower(), media[2].lower()) if media else ("application", "octet-stream")
    if main in ("multipart", "message"):
        main, sub = "application", "octet-stream"  # base64 is not for these (RFC 2045 §6.4)
    name = _filename(file.filename)
    params = {"charset": charset[1]} if charset and main == "text" else None
    if inline:
        cid = f"<{quote(name, safe='@!$&*+-=^_~.')}>"
        message.add_related(
            file.content, main, sub, cid=cid, filename=name, disposition="inline", params=params
        )
    else:
        message.add_attachment(file.content, main, sub, filename=name, params=params)


def _filename(text: str) -> str:
    """The last step of a path, without what could end a header field."""
    name = re.split(r"[/\\]", text)[-1]
    clean = "".join(c for c in name if c.isprintable()).encode("utf-8", "ignore").decode()
    return clean[:200] or "file"


def normalise_mime(content: bytes) -> bytes:
    """A message given as a file, with CRLF.

    A file in which every line ends with LF alone was written on a machine where lines end so. In one
    that knows CRLF, a LF or CR alone is none of its line ends, and no header field is born from it.
    """
    if b"\0" in content:
        raise ApiError(400, "the message has a NUL character")
    if b"\r" not in content:
        return content.replace(b"\n", b"\r\n")
    if _BARE_CR.search(content) or content.count(b"\n") != content.count(b"\r\n"):
        raise ApiError(400, "the message has a bare CR or LF")
    return content


def author_of(header: bytes) -> str | None:
    """The From address of a header section that somebody else wrote, as far as it can be told."""
    for field in iter_fields(header):
        if field.name.lower() == b"from":
            try:
                return mailboxes(unfold(field.value).decode("utf-8", "replace"), "from")[0].address
            except (ApiError, IndexError):
                return None
    return None
