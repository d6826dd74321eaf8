"""Makes a message of the fields of a form (RFC 5322, RFC 2045), with the email package.

    multipart/mixed                     where there are attachments
      multipart/alternative             where there are several of text, amp-html and html
        text/plain
        text/x-amp-html
        multipart/related               where html has inline parts: <img src="cid:FILENAME">
          text/html
          the inline parts
      the attachments

Parts have 7-bit encodings, so that no host has to convert them. Only a message attached as
`message/rfc822` is not encoded (RFC 2046 §5.2.1), and may have 8-bit characters. The email package
composes the body, `mailgun_header` the header section.

A file keeps the media type that the client gave it, with its parameters (`text/calendar;
method=REQUEST`). A file without a type gets one by its name. A file of `multipart/*`, or of
`message/*` that would have to be encoded, becomes `application/octet-stream`.

The Content-ID of an inline part is its file name: `<img src="cid:my logo (1).png">`. A name beyond
ASCII is not allowed there, so it is replaced by another, in the part and in the html.
"""

from __future__ import annotations

import binascii
import email.policy
import itertools
import mimetypes
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.message import EmailMessage
from urllib.parse import quote

from relay.api.mailgun_form import ApiError, File, Form, shown
from relay.api.mailgun_header import header_section

_POLICY = email.policy.SMTP.clone(cte_type="7bit")
_HEADER_POLICY = _POLICY.clone(cte_type="8bit", max_line_length=990)
"""For the fields of parts: a folded Content-ID would not match its URL."""

_MEDIA_TYPE = re.compile(r"([A-Za-z0-9!#$&^_.+-]{1,64})/([A-Za-z0-9!#$&^_.+-]{1,64})")
_BARE_CR = re.compile(rb"\r(?!\n)")
_LINE_END = re.compile(r"\r\n|\r|\n")
_LONGEST_LINE = 998
_LARGE_OCTETS = 1024 * 1024
_LINE_OCTETS = 57
"""Octets in a line of base64."""
_MANY_LINES = 100_000
"""A text with more lines is encoded here. The email package makes an object of each line: seven
million empty lines took half a gigabyte.
"""
_FILENAME_CHARS = 255
_TYPES = mimetypes.MimeTypes(filenames=())


def compose(form: Form, *, message_id: str, now: datetime) -> bytes:
    """The content of the message, header section and body, with CRLF."""
    text, html = form.first("text"), form.first("html")
    if not (text or html):
        raise ApiError(400, "Need at least one of 'text' or 'html' parameters specified")
    parts = [_named(file) for file in form.files]
    body = _body(text, form.first("amp-html"), html, parts)
    top = header_section(form, message_id=message_id, now=now)
    octets = body.as_bytes(policy=_HEADER_POLICY)
    contents = {part.token: part.content for part in parts if part.media[0] == "message"}
    contents |= {_base64(part.token): _base64(part.content) for part in parts if part.is_large}
    return top + _TOKEN.sub(lambda found: contents.get(found[0], found[0]), octets)


_MARK = secrets.token_hex(12).encode()
"""The beginning of all tokens. It has 24 octets, so that their base64 has one beginning, too."""
_NUMBERS = itertools.cycle(range(10**8))
_TOKEN = re.compile(
    rb"%s[0-9]{8}|%s[A-Za-z0-9+/]{11}="
    % (_MARK, re.escape(binascii.b2a_base64(_MARK, newline=False)))
)


@dataclass(frozen=True, slots=True)
class _Part:
    """A file as a part of the message. `cid`: its name in the html.

    `token`: replaces an attached message while the email package puts the parts together, because
    the package would change the message. It also replaces a large file, because the package runs
    regular expressions over all of it, during which no other thread runs.
    """

    disposition: str
    name: str
    cid: str
    media: tuple[str, str]
    params: dict[str, str]
    content: bytes
    token: bytes = field(default_factory=lambda: b"%s%08d" % (_MARK, next(_NUMBERS)))

    @property
    def is_large(self) -> bool:
        return len(self.content) > _LARGE_OCTETS and self.media[0] != "message"

    @property
    def given(self) -> bytes:
        """The content, or the token, for the email package."""
        return self.token if self.is_large else self.content


def _named(file: File) -> _Part:
    name, content = _filename(file), file.content
    if file.content_type.lower().startswith("message/") and b"\r" not in content:
        content = content.replace(b"\n", b"\r\n")
    cid = name if name.isascii() else quote(name, safe=" !$&*+-=^_~.@()").replace("%", "_")
    main, sub, params = _media_type(file.content_type, name, content)
    return _Part(file.name, name, cid, (main, sub), params, content)


def _body(
    text: str | None, amp: str | None, html: str | None, parts: Sequence[_Part]
) -> EmailMessage:
    message = EmailMessage(policy=_POLICY)
    for part in parts:
        if html and part.disposition == "inline" and part.cid != part.name:
            for written in (part.name, quote(part.name)):
                html = html.replace(f"cid:{written}", f"cid:{part.cid}")
    alternatives = [("plain", text), ("x-amp-html", amp), ("html", html)]
    for subtype, content in alternatives:
        if not content:
            continue
        add = message.add_alternative if "content-type" in message else message.set_content
        if content.count("\n") + content.count("\r") <= _MANY_LINES:
            add(content, subtype=subtype, charset="utf-8")
        else:
            lines = _LINE_END.sub("\r\n", content).encode()
            add(lines, "text", subtype, cte="base64", params={"charset": "utf-8"})
    shown_in = message.get_body(("html",)) if html else None
    for part in parts:
        if part.disposition == "inline" and isinstance(shown_in, EmailMessage):
            _add(shown_in, part, inline=True)
    for part in parts:
        if part.disposition == "attachment" or shown_in is None:
            _add(message, part, inline=False)
    return message


def _add(message: EmailMessage, part: _Part, *, inline: bool) -> None:
    main, sub = part.media
    if main == "message":
        _add_message(message, part)
        return
    if inline:
        message.add_related(
            part.given,
            main,
            sub,
            cid=f"<{part.cid}>",
            filename=part.name,
            disposition="inline",
            params=part.params,
        )
    else:
        message.add_attachment(part.given, main, sub, filename=part.name, params=part.params)


def _add_message(message: EmailMessage, part: _Part) -> None:
    """Attach a message without a change."""
    if message.get_content_type() != "multipart/mixed":
        message.make_mixed()
    attached = EmailMessage(policy=_POLICY)
    attached["Content-Type"] = "/".join(part.media)
    if not part.content.isascii():
        attached["Content-Transfer-Encoding"] = "8bit"
        del message["Content-Transfer-Encoding"]
        message["Content-Transfer-Encoding"] = "8bit"  # RFC 2045 §6.4: of the whole, too
    attached.add_header("Content-Disposition", "attachment", filename=part.name)
    attached.set_payload(part.token.decode())
    message.attach(attached)


def _base64(content: bytes) -> bytes:
    """Lines of 76 characters with CRLF between them (RFC 2045 §6.8)."""
    return b"\r\n".join(
        binascii.b2a_base64(content[begin : begin + _LINE_OCTETS], newline=False)
        for begin in range(0, len(content), _LINE_OCTETS)
    )


def _media_type(said: str, name: str, content: bytes) -> tuple[str, str, dict[str, str]]:
    """Type, subtype and parameters of a file."""
    said = said.strip() or _TYPES.guess_type(name)[0] or ""
    match = _MEDIA_TYPE.match(said)
    if match is None:
        return "application", "octet-stream", {}
    main, sub = match[1].lower(), match[2].lower()
    if main == "multipart" or (main == "message" and not _can_stand_as_it_is(content)):
        return "application", "octet-stream", {}
    header = _POLICY.header_factory("Content-Type", re.sub(r"[\r\n]+[ \t]*", " ", said))
    return main, sub, dict(header.params)


def _can_stand_as_it_is(content: bytes) -> bool:
    """Whether a message needs no encoding as a part: it has CRLF, no NUL, no line too long."""
    lines = content.split(b"\r\n")
    return (
        b"\0" not in content
        and content.count(b"\n") == content.count(b"\r") == len(lines) - 1
        and max(map(len, lines)) <= _LONGEST_LINE
    )


def _filename(file: File) -> str:
    """The last part of a path, without characters that could end a header field."""
    name = re.split(r"[/\\]", file.filename)[-1]
    clean = "".join(c for c in name if c.isprintable()).encode("utf-8", "ignore").decode()
    if len(clean) > _FILENAME_CHARS:
        raise ApiError(
            400, f"{file.name}: a file name is longer than {_FILENAME_CHARS}: {shown(clean)}"
        )
    return clean or "file"


def normalise_mime(content: bytes) -> bytes:
    """A message that came as a file, with CRLF.

    A file that has only LF was written on a machine where lines end with LF. In a file with CRLF, a
    LF or CR alone is no line end: 400, so that no header field begins there.
    """
    if b"\0" in content:
        raise ApiError(400, "the message has a NUL character")
    if b"\r" not in content:
        return content.replace(b"\n", b"\r\n")
    if _BARE_CR.search(content) or content.count(b"\n") != content.count(b"\r\n"):
        raise ApiError(400, "the message has a bare CR or LF")
    return content
