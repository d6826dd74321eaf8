"""Converts 8-bit content for a host without 8BITMIME, as RFC 6152 §3 allows. Pure.

Each body with an octet above 127 is encoded: text as quoted-printable, other content as base64
(RFC 2045 §6.7, §6.8). Its Content-Transfer-Encoding says so, and the parts around it say 7bit. All
other octets stay. A message without MIME fields gets them, with the character set unknown-8bit
(RFC 1428 §3).

Some content cannot be converted without damage: signed content (multipart/signed, or a message with
a DKIM-Signature), encrypted content, 8-bit octets in a header section or outside of all parts, and
content that is no valid MIME. Such a message bounces (`NotConvertible`).

The content is never held completely. `Survey` reads all of it and makes a `ConversionPlan`;
`Conversion` reads it again and converts it piece by piece.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from relay.deliver.mime import Entity, PartKind, TooComplex, Walk, mime_fields

_IDENTITY = ("8bit", "binary")
_TEXT_LINE = 76
_BASE64_GROUP = 57
"""Octets in a line of base64."""
_LONGEST_LINE = 16 * 1024
"""A line of text is encoded in pieces of so many octets."""


class NotConvertible(Exception):
    """The content cannot be converted without damage. `str()` says why, to end a sentence."""


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """The new encoding of each entity, by its number. `size_bytes`: the approximate new size."""

    encodings: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    size_bytes: int = 0


class Survey:
    """Reads content to find what a conversion has to do."""

    def __init__(self) -> None:
        self._walk = Walk(self)
        self._encodings: dict[int, str] = {}
        self._size_bytes = 0
        self._escapes = 0

    def feed(self, octets: bytes) -> None:
        """Read more of the content. Raises `NotConvertible` as soon as that is certain."""
        try:
            self._walk.feed(octets)
        except TooComplex as error:
            raise NotConvertible(str(error)) from error

    def finish(self) -> ConversionPlan:
        """The content is complete: returns the plan."""
        try:
            self._walk.finish()
        except TooComplex as error:
            raise NotConvertible(str(error)) from error
        return ConversionPlan(
            self._encodings, self._size_bytes + 3 * self._escapes + self._size_bytes // 20
        )

    def header(self, entity: Entity, section: bytes) -> None:
        self._size_bytes += len(section)
        if not section.isascii():
            raise NotConvertible(entity.why)
        if entity.kind in (PartKind.MULTIPART, PartKind.MESSAGE) and entity.encoding in _IDENTITY:
            self._encodings[entity.number] = "7bit"

    def body(self, entity: Entity, octets: bytes) -> None:
        self._size_bytes += len(octets)
        if octets.isascii():
            return
        if entity.kind == PartKind.SEALED:
            raise NotConvertible(entity.why)
        is_text = entity.kind == PartKind.TEXT
        self._encodings[entity.number] = "quoted-printable" if is_text else "base64"
        self._escapes += len(octets.translate(None, _ASCII)) if is_text else len(octets) // 7

    def end(self, entity: Entity) -> None:
        pass

    def between(self, octets: bytes) -> None:
        self._size_bytes += len(octets)
        if not octets.isascii():
            raise NotConvertible("there are some outside of all parts")


_ASCII = bytes(range(128))


class Conversion:
    """Converts content by a plan. The pieces that come out joined are the new content."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._walk = Walk(self)
        self._encodings = plan.encodings
        # Labels alone ask for no MIME-Version; what is encoded needs one to be decoded.
        self._encodes = not _ENCODERS.keys().isdisjoint(plan.encodings.values())
        self._out: list[bytes] = []
        self._encoder: _QuotedPrintable | _Base64 | None = None

    def feed(self, octets: bytes) -> bytes:
        """Convert more of the content; returns the octets that are ready."""
        self._walk.feed(octets)
        return self._take()

    def finish(self) -> bytes:
        """The rest."""
        self._walk.finish()
        return self._take()

    def _take(self) -> bytes:
        taken = b"".join(self._out)
        self._out.clear()
        return taken

    def header(self, entity: Entity, section: bytes) -> None:
        encoding = self._encodings.get(entity.number, "")
        self._encoder = _ENCODERS[encoding]() if encoding in _ENCODERS else None
        self._out.append(
            _relabelled(entity, section, encoding, add_version=self._encodes and not entity.is_mime)
            if encoding
            else section
        )

    def body(self, entity: Entity, octets: bytes) -> None:
        self._out.append(self._encoder.encode(octets) if self._encoder else octets)

    def end(self, entity: Entity) -> None:
        if self._encoder is not None:
            self._out.append(self._encoder.finish())
            self._encoder = None

    def between(self, octets: bytes) -> None:
        self._out.append(octets)


def _relabelled(entity: Entity, section: bytes, encoding: str, *, add_version: bool) -> bytes:
    """A header section that says the new encoding, where the old one stood or at its end.

    The last line of a section may lack its end: within a multipart that belongs to the delimiter.
    """
    if section and not section.endswith(b"\r\n"):
        return _relabelled(entity, section + b"\r\n", encoding, add_version=add_version)[:-2]
    label = f"Content-Transfer-Encoding: {encoding}\r\n".encode()
    fields, has_end = section, section.endswith(b"\r\n\r\n") or section == b"\r\n"
    if has_end:
        fields = section[:-2]
    lines: list[bytes] = []
    begun = 0
    for name, start, end in mime_fields(fields):
        if name == b"content-transfer-encoding":
            lines += fields[begun:start], label
            begun = end + 2
    lines.append(fields[begun:])
    if add_version:
        lines.append(b"MIME-Version: 1.0\r\n")
    if not begun:
        if not entity.has_type:
            lines.append(b"Content-Type: text/plain; charset=unknown-8bit\r\n")
        lines.append(label)
    return b"".join(lines) + (b"\r\n" if has_end else b"")


class _QuotedPrintable:
    """RFC 2045 §6.7, a line at a time; a long line in pieces."""

    def __init__(self) -> None:
        self._held = b""

    def encode(self, octets: bytes) -> bytes:
        held = self._held + octets
        end = held.rfind(b"\r\n") + 2
        if end < 2:
            end = 0
        lines, self._held = held[:end], held[end:]
        out = _quoted(lines)
        while len(self._held) > _LONGEST_LINE:
            piece, self._held = self._held[:_LONGEST_LINE], self._held[_LONGEST_LINE:]
            if piece.endswith(b"\r"):
                piece, self._held = piece[:-1], b"\r" + self._held
            out += _soft_ended(piece)
        return out

    def finish(self) -> bytes:
        held, self._held = self._held, b""
        return _quoted(held + b"\r\n")[:-2] if held else b""


def _quoted(lines: bytes) -> bytes:
    """Whole lines, quoted. The library looks at the first line's end for what a line end is."""
    return binascii.b2a_qp(lines, istext=True) if lines else b""


def _soft_ended(piece: bytes) -> bytes:
    """A piece of a line, quoted, with a soft line break behind it."""
    quoted = _quoted(piece + b"\r\n")[:-2]
    start = quoted.rfind(b"\r\n") + 2 if b"\r\n" in quoted else 0
    if len(quoted) - start >= _TEXT_LINE:
        last = 3 if quoted[-3:-2] == b"=" else 1
        quoted = quoted[:-last] + b"=\r\n" + quoted[-last:]
    return quoted + b"=\r\n"


class _Base64:
    """RFC 2045 §6.8. No line end before a delimiter but its own; one at the end of a message."""

    def __init__(self) -> None:
        self._held = b""
        self._begun = False

    def encode(self, octets: bytes) -> bytes:
        held = self._held + octets
        whole = len(held) // _BASE64_GROUP * _BASE64_GROUP
        lines, self._held = held[:whole], held[whole:]
        return self._lines(lines)

    def finish(self) -> bytes:
        lines, self._held = self._held, b""
        return self._lines(lines)

    def _lines(self, octets: bytes) -> bytes:
        if not octets:
            return b""
        text = binascii.b2a_base64(octets, newline=False)
        lines = b"\r\n".join(text[at : at + _TEXT_LINE] for at in range(0, len(text), _TEXT_LINE))
        begun, self._begun = self._begun, True
        return b"\r\n" + lines if begun else lines


_ENCODERS: Mapping[str, type[_QuotedPrintable] | type[_Base64]] = {
    "quoted-printable": _QuotedPrintable,
    "base64": _Base64,
}
