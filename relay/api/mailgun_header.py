"""Writes the header section of a message made of a form's fields (RFC 5322 §3.6). Pure.

The email package is not used here: its folding loses or adds characters (U+2028, a vertical tab),
and more than one release made mistakes in address lists. Here a value unfolds to what the client
sent. Display names, subjects and other text beyond ASCII become encoded words (RFC 2047). Addresses
beyond ASCII stay UTF-8 (RFC 6532). Bcc is never written.

`h:` fields: mail libraries send all fields of a message that they made, also those that this module
makes (`Content-Type`, `MIME-Version`) and trace fields (`Received`, `Return-Path`). These are
ignored. An empty value means no field. `h:To`, `h:Cc`, `h:Subject` and `h:Date` replace the fields
that the parameters would make.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from email.utils import format_datetime

from relay.api.mailgun_addresses import Mailbox, authors, mailboxes
from relay.api.mailgun_form import ApiError, Form, shown, unfolded
from relay.mail.address import in_header
from relay.mail.header import unfold
from relay.mail.section import HeaderSection

_MADE_HERE = frozenset(
    {
        "bcc",
        "content-disposition",
        "content-length",
        "content-transfer-encoding",
        "content-type",
        "dkim-signature",
        "mime-version",
        "received",
        "return-path",
    }
)
_ADDRESS_FIELDS = frozenset({"to", "cc", "reply-to", "sender"})
_ONCE = frozenset({"date", "from", "in-reply-to", "message-id", "references", "sender", "subject"})
_FIELD_NAME = re.compile(r"[!-9;-~]{1,76}")
_ATOMS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]*")
_MESSAGE_ID = re.compile(r"<?([!-;=?A-~]{1,400}@[!-;=?A-~]{1,400})>?")
_BEFORE_BLANKS = re.compile(r"(?<=[^ \t])(?=[ \t])")
_LINE_CHARS = 76
_LONGEST_LINE = 998
_WORD_OCTETS = 45
"""The text of an encoded word of at most 75 characters (RFC 2047 §2)."""


def header_fields(form: Form) -> list[tuple[str, str]]:
    """The `h:` fields of a message, each value on one line. 400 where one is invalid."""
    found: list[tuple[str, str]] = []
    places: dict[str, int] = {}
    for name, folded in form.after("h:"):
        lower, value = name.lower(), unfolded(folded)
        if not _FIELD_NAME.fullmatch(name):
            raise ApiError(400, f"h:{shown(name)} is not a header field that can be set")
        if lower in _MADE_HERE or not value:
            continue
        if any(c in value for c in "\r\n\0"):
            raise ApiError(400, f"h:{shown(name)} has a line break in it")
        if lower in places and (lower in _ONCE or lower in _ADDRESS_FIELDS):
            earlier = found[places[lower]][1]
            found[places[lower]] = (name, _agreed(name, earlier, value))
        else:
            places[lower] = len(found)
            found.append((name, value))
    return _without_from(form, found)


def own_message_id(form: Form) -> str | None:
    """The Message-ID in a form; None where the relay has to make one."""
    for name, value in header_fields(form):
        if name.lower() == "message-id":
            match = _MESSAGE_ID.fullmatch(value)
            if match is None:
                raise ApiError(400, "h:Message-Id is not a message id")
            return f"<{match[1]}>"
    return None


def header_section(form: Form, *, message_id: str, now: datetime) -> bytes:
    """The header section without the fields of MIME."""
    fields = header_fields(form)
    own = {name.lower() for name, _ in fields}
    boxes = authors(form.all("from"))
    lines = [_address_line("From", boxes)]
    if len(boxes) > 1 and "sender" not in own:
        lines.append(_address_line("Sender", boxes[:1]))  # RFC 5322 §3.6.2
    for name in ("To", "Cc"):
        boxes = [box for value in form.all(name.lower()) for box in mailboxes(value, name.lower())]
        if boxes and name.lower() not in own:
            lines.append(_address_line(name, boxes))
    subject = form.first("subject")
    if subject is not None and "subject" not in own:
        lines.append(_text_line("Subject", re.sub(r"[\r\n\0]+", " ", unfolded(subject))))
    if "date" not in own:
        lines.append(f"Date: {format_datetime(now.replace(microsecond=0))}\r\n")
    lines.append(f"Message-ID: {message_id}\r\n")
    lines += [_own_line(name, value) for name, value in fields if name.lower() != "message-id"]
    return "".join(lines).encode()


def with_own_fields(form: Form, section: HeaderSection) -> HeaderSection:
    """The header section of a complete message, with the form's `h:` fields on top."""
    fields = header_fields(form)
    if not fields:
        return section
    for name, _ in fields:
        if name.lower() in _ONCE | _ADDRESS_FIELDS and name.lower().encode() in section:
            raise ApiError(400, f"h:{shown(name)}: the message has this field already")
    own = "".join(_own_line(name, value) for name, value in fields).encode()
    return HeaderSection(own + section.octets)


def author_of(section: HeaderSection) -> str | None:
    """The first From address of a header section; None where it cannot be read."""
    try:
        return authors([unfold(section.first(b"from")).decode("utf-8", "replace")])[0].address
    except (ApiError, IndexError):
        return None


def _agreed(name: str, earlier: str, value: str) -> str:
    """One value for two fields of a name that may occur only once."""
    if earlier == value:
        return value
    if name.lower() in _ONCE:
        raise ApiError(400, f"h:{shown(name)} is there more than once")
    return f"{earlier}, {value}"


def _without_from(form: Form, fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The fields without From, which the parameter makes. 400 where both differ."""
    kept = []
    for name, value in fields:
        if name.lower() != "from":
            kept.append((name, value))
        elif [box.address for box in authors([value])] != [
            box.address for box in authors(form.all("from"))
        ]:
            raise ApiError(400, f"h:{name} is not what the from parameter says")
    return kept


def _own_line(name: str, value: str) -> str:
    if name.lower() in _ADDRESS_FIELDS:
        return _address_line(name, mailboxes(value, f"h:{name}"))
    return _text_line(name, value)


def _address_line(name: str, boxes: Sequence[Mailbox]) -> str:
    """An address field with one mailbox a line, so that no line is too long (RFC 5322 §2.1.1)."""
    return f"{name}: " + ",\r\n ".join(_address(box, name) for box in boxes) + "\r\n"


def _address(box: Mailbox, field: str) -> str:
    address = in_header(box.address)
    if not box.name:
        return address
    if not _is_plain(box.name) or len(box.name) > _LONGEST_LINE // 3:
        words = "\r\n ".join(_encoded_words(box.name, after=len(field) + 2))
        return f"{words}\r\n <{address}>"
    if _ATOMS.fullmatch(box.name):
        return f"{box.name} <{address}>"
    escaped = re.sub(r'(["\\])', r"\\\1", box.name)
    return f'"{escaped}" <{address}>'


def _text_line(name: str, value: str) -> str:
    """An unstructured field, folded; beyond ASCII in encoded words (RFC 2047 §5)."""
    if _is_plain(value):
        lines = _folded(f"{name}: {value}")
        if max(map(len, lines)) <= _LONGEST_LINE:
            return "\r\n".join(lines) + "\r\n"
        if name != "Subject":  # an unknown field may have a form that encoded words would change
            raise ApiError(400, f"h:{name} has a word that is longer than a line may be")
    return f"{name}: " + "\r\n ".join(_encoded_words(value, after=len(name) + 2)) + "\r\n"


def _is_plain(text: str) -> bool:
    return text.isascii() and text.replace("\t", "").isprintable()


def _folded(text: str) -> list[str]:
    """A field in lines, folded before white space."""
    name, *words = _BEFORE_BLANKS.split(text)
    lines = [name + "".join(words[:1])]
    for word in words[1:]:
        if len(lines[-1]) + len(word) > _LINE_CHARS:
            lines.append(word)
        else:
            lines[-1] += word
    return lines


def _encoded_words(text: str, *, after: int) -> list[str]:
    """The text as encoded words in base64, divided between characters.

    `after`: how many characters come before the first word on its line.
    """
    room = max((_LINE_CHARS - after - len("=?utf-8?B??=")) // 4 * 3, 9)
    pieces: list[bytes] = []
    piece = b""
    for char in text:
        octets = char.encode()
        if len(piece) + len(octets) > (_WORD_OCTETS if pieces else min(room, _WORD_OCTETS)):
            pieces.append(piece)
            piece = b""
        piece += octets
    pieces.append(piece)
    return [f"=?utf-8?B?{base64.b64encode(piece).decode()}?=" for piece in pieces]
