"""Reads the structure of a MIME message while it streams through.

`Walk` takes content in pieces, and calls its `Visitor` for each header section, for the octets of
each body, and for the octets between bodies: all of it, in order, so that a visitor can write the
content again. It holds only a header section, and a line that may be a delimiter.

It enters multiparts (RFC 2046 §5.1) and message/rfc822 (§5.2.1), whose content has a header section
of its own. It does not enter signed or encrypted parts (RFC 1847), which must not be changed. A
delimiter has nothing else but white space on its line; the delimiter of an outer multipart ends the
inner ones.

The work is linear in the octets: a line that may be a delimiter costs one look-up at any depth, and
one search passes over all other lines. Nesting has Postfix's limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from relay.mail.header import named, unfold

HEADER_OCTETS = 2 * 1024 * 1024
"""For all header sections held at one time; the listener accepts only smaller ones."""

MOST_DEPTH = 100
"""Multiparts and messages within each other: Postfix's mime_nesting_limit."""

MOST_ENTITIES = 10_000
_DELIMITER_OCTETS = 1000
"""RFC 2046 §5.1.1 allows a boundary 70 characters; white space may follow."""

_NOTABLE_LINE = re.compile(rb"\r\n(?=\r\n|--)")


class TooComplex(Exception):
    """The content is too complex to be read to its end. `str()` says why, for a person."""


class PartKind:
    """How the body of an entity is treated."""

    TEXT = "text"
    OTHER = "other"
    MULTIPART = "multipart"
    MESSAGE = "message"
    SEALED = "sealed"
    """Not to be changed; `Entity.why` says why."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A header section as MIME reads it (RFC 2045 §3). `number` counts them from 0.

    `encoding`: its Content-Transfer-Encoding in lower case, "" without one. `is_mime`: it has a
    MIME-Version or is a part of a multipart; `has_type`: it has a Content-Type.
    """

    number: int
    kind: str
    encoding: str = ""
    boundary: bytes = b""
    why: str = ""
    is_mime: bool = False
    has_type: bool = False
    is_digest: bool = False


class Visitor(Protocol):
    """Gets all of the content, in order."""

    def header(self, entity: Entity, section: bytes) -> None:
        """A header section, with the empty line that ends it where there is one."""

    def body(self, entity: Entity, octets: bytes) -> None:
        """More of a body that is no multipart. The CRLF before a delimiter is not part of it."""

    def end(self, entity: Entity) -> None:
        """The end of that body."""

    def between(self, octets: bytes) -> None:
        """Delimiters, and the octets before the first and after the last."""


@dataclass(slots=True)
class _Multipart:
    """A multipart that is open. `level`: how deep it is nested; `outer`: the place among the open
    multiparts of the next outer one with the same delimiter, None without one.
    """

    delimiter: bytes
    is_digest: bool
    level: int
    outer: int | None


class Walk:
    """Walks content for a visitor. `feed` it, then `finish`; either may raise `TooComplex`."""

    def __init__(self, visitor: Visitor) -> None:
        self._visitor = visitor
        self._buffer = b""
        self._position = 0
        self._is_final = False
        self._multiparts: list[_Multipart] = []
        self._places: dict[bytes, int] = {}
        """By delimiter, the place of the innermost open multipart that has it."""
        self._level = 0
        self._count = 0
        self._in_header = True
        self._line = 0
        """In a header section: where the current line begins."""
        self._body: Entity | None = None
        """None: between bodies."""
        self._implied = 0
        """Octets of the buffer that were told already: the CRLF before a body, which a delimiter
        may need.
        """
        self._is_part = self._in_digest = False

    def feed(self, octets: bytes) -> None:
        """More of the content."""
        self._buffer = self._buffer[self._position :] + octets
        self._line -= self._position
        self._position = 0
        while self._header() if self._in_header else self._search():
            pass

    def finish(self) -> None:
        """The content is complete."""
        self._is_final = True
        self.feed(b"")
        self._end_body()

    # --- header sections ------------------------------------------------------------------------

    def _header(self) -> bool:
        """Read on in a header section; whether it came to its end.

        Only an empty line and lines that begin with `--` are looked at.
        """
        while (end := self._section_end()) is None:
            found = _NOTABLE_LINE.search(self._buffer, self._line)
            if found is not None:
                self._line = found.end()
                continue
            last = self._buffer.rfind(b"\r\n", self._line)
            self._line = last + 2 if last >= 0 else self._line
            if self._is_final:
                end = len(self._buffer)
                break
            if len(self._buffer) - self._position > HEADER_OCTETS:
                raise TooComplex("a header section is too long")
            return False
        is_more = end < len(self._buffer)
        self._begin_entity(end)
        return is_more

    def _section_end(self) -> int | None:
        """Where the header section ends, if the current line shows it."""
        if self._buffer.startswith(b"\r\n", self._line):
            return self._line + 2
        end = self._buffer.find(b"\r\n", self._line) if self._begins_with_dashes() else -1
        if end >= 0 and self._delimited_by(self._buffer[self._line : end]) is not None:
            return self._line  # no empty line: this header section has no body
        return None

    def _begins_with_dashes(self) -> bool:
        return self._buffer.startswith(b"--", self._line)

    def _begin_entity(self, end: int) -> None:
        section = self._buffer[self._position : end]
        if self._count == MOST_ENTITIES:
            raise TooComplex("it has too many parts")
        entity = read_entity(section, self._count, is_part=self._is_part, in_digest=self._in_digest)
        self._count += 1
        self._visitor.header(entity, section)
        self._position = end
        # A delimiter may stand right behind the header section: its CRLF is the one before.
        self._in_header, self._body, self._implied = False, None, 2
        if end >= 2:
            self._position -= 2
        else:
            self._buffer = b"\r\n" + self._buffer[end:]
            self._position = 0
        if entity.kind not in (PartKind.MULTIPART, PartKind.MESSAGE):
            self._body = entity
            return
        self._level += 1
        if self._level > MOST_DEPTH:
            raise TooComplex("its parts are nested too deeply")
        if entity.kind == PartKind.MULTIPART:
            self._open(entity)
        else:
            self._position += 2
            self._begin_header(is_part=False)

    def _begin_header(self, *, is_part: bool, in_digest: bool = False) -> None:
        self._in_header, self._line, self._implied = True, self._position, 0
        self._is_part, self._in_digest = is_part, in_digest

    # --- bodies and delimiters ------------------------------------------------------------------

    def _search(self) -> bool:
        """Pass the octets up to the next delimiter on. Returns whether one was found."""
        buffer, at = self._buffer, self._position
        while self._multiparts and (found := buffer.find(b"\r\n--", at)) >= 0:
            end = buffer.find(b"\r\n", found + 4)
            if end < 0 and not self._is_final and len(buffer) - found < _DELIMITER_OCTETS:
                self._tell(found)
                return False
            line = buffer[found + 2 : end if end >= 0 else found + _DELIMITER_OCTETS]
            depth = self._delimited_by(line) if len(line) < _DELIMITER_OCTETS - 2 else None
            if depth is not None:
                self._tell(found)
                self._delimit(depth, line, found + 2 + len(line))
                return True
            at = found + 4
        self._tell(len(buffer) - self._possible_beginning())
        return False

    def _tell(self, end: int) -> None:
        """The octets up to `end` belong to the body, or to what is between bodies."""
        start = self._position + self._implied
        if end < start:
            return
        octets = self._buffer[start:end]
        self._position, self._implied = end, 0
        if not octets:
            return
        if self._body is None:
            self._visitor.between(octets)
        else:
            self._visitor.body(self._body, octets)

    def _possible_beginning(self) -> int:
        """The number of octets at the end that may begin a delimiter."""
        if self._is_final or not self._multiparts:
            return 0
        for count in (3, 2, 1):
            if self._buffer.endswith(b"\r\n--"[:count]):
                return count
        return 0

    def _delimited_by(self, line: bytes) -> int | None:
        """Which of the open multiparts a line delimits: the innermost."""
        line = line.rstrip(b" \t")
        place = self._places.get(line)
        if not line.endswith(b"--"):
            return place
        closed = self._places.get(line[:-2])
        return place if closed is None or (place is not None and place > closed) else closed

    def _delimit(self, depth: int, line: bytes, end: int) -> None:
        self._end_body()
        self._close(depth + 1)
        multipart = self._multiparts[depth]
        closes = line[len(multipart.delimiter) :].startswith(b"--")
        self._level = multipart.level
        start = self._position + self._implied
        if closes:
            self._close(depth)
            self._visitor.between(self._buffer[start:end])
            self._position, self._implied = end, 0
            return
        end = min(end + 2, len(self._buffer))
        self._visitor.between(self._buffer[start:end])
        self._position = end
        self._begin_header(is_part=True, in_digest=multipart.is_digest)

    def _open(self, entity: Entity) -> None:
        delimiter = b"--" + entity.boundary
        outer = self._places.get(delimiter)
        self._places[delimiter] = len(self._multiparts)
        self._multiparts.append(_Multipart(delimiter, entity.is_digest, self._level, outer))

    def _close(self, depth: int) -> None:
        """End the open multiparts from `depth` on."""
        while len(self._multiparts) > depth:
            multipart = self._multiparts.pop()
            if multipart.outer is None:
                del self._places[multipart.delimiter]
            else:
                self._places[multipart.delimiter] = multipart.outer

    def _end_body(self) -> None:
        if self._body is not None:
            body, self._body = self._body, None
            self._visitor.end(body)


# --- one header section -------------------------------------------------------------------------

mime_fields = named(
    (b"content-type", b"content-transfer-encoding", b"mime-version", b"dkim-signature")
)
"""The fields of a header section that count here."""

_TYPE = re.compile(
    rb"[ \t]*+([!#$%&'*+.^_`{|}~0-9A-Za-z-]++)/([!#$%&'*+.^_`{|}~0-9A-Za-z-]++)[ \t]*+(?=;|\Z)"
)
_PARAMETER = re.compile(
    rb'[ \t]*+;[ \t]*+([^\s=;"]++)[ \t]*+=[ \t]*+(?:"([^"\\]*+(?:\\.[^"\\]*+)*)"|([^\s;"]++))'
)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)


def read_entity(section: bytes, number: int, *, is_part: bool, in_digest: bool = False) -> Entity:
    """What a header section says about its body."""
    found: dict[bytes, list[bytes]] = {}
    for field in mime_fields(section):
        found.setdefault(field.name, []).append(unfold(field.value(section)))
    types, encodings = found.get(b"content-type", []), found.get(b"content-transfer-encoding", [])
    is_mime = is_part or b"mime-version" in found
    encoding = encodings[0].strip().lower().decode("ascii", "replace") if encodings else ""
    kind, boundary, why = _kind(types, in_digest)
    if not section.isascii():
        why = why or "its header section has 8-bit octets"
    elif len(types) > 1 or len(encodings) > 1:
        why = "a field of its MIME header comes twice"
    elif b"dkim-signature" in found and not is_part:
        why = "it is signed (DKIM)"
    elif encoding not in ("", "7bit", "8bit", "binary"):
        why = f"a part in {encoding[:20]!r} has some all the same"
    return Entity(
        number,
        PartKind.SEALED if why else kind,
        encoding,
        boundary,
        why,
        is_mime,
        bool(types),
        is_digest=kind == PartKind.MULTIPART and b"/digest" in types[0].lower(),
    )


def _kind(types: list[bytes], in_digest: bool) -> tuple[str, bytes, str]:
    """Kind, boundary, and why it is sealed."""
    if not types:
        return (
            (PartKind.MESSAGE if in_digest else PartKind.TEXT),
            b"",
            "",
        )  # RFC 2045 §5.2, RFC 2046 §5.1.5
    match = _TYPE.match(types[0])
    if match is None:
        return PartKind.SEALED, b"", "a Content-Type cannot be read"
    main, sub = match[1].lower(), match[2].lower()
    if main == b"text":
        return PartKind.TEXT, b"", ""
    if main == b"multipart":
        return _multipart(sub, _boundary(types[0], match.end()))
    if main == b"message":
        return _message(sub)
    return PartKind.OTHER, b"", ""


def _multipart(sub: bytes, boundary: bytes) -> tuple[str, bytes, str]:
    if sub in (b"signed", b"encrypted"):
        return PartKind.SEALED, b"", f"multipart/{sub.decode()} is not to be changed"
    if not boundary:
        return PartKind.SEALED, b"", "a multipart has no boundary"
    return PartKind.MULTIPART, boundary, ""


def _message(sub: bytes) -> tuple[str, bytes, str]:
    """RFC 2046 §5.2: no encoding but of what is inside; of message/global and its kin any (RFC 6532
    §3.5).
    """
    if sub == b"rfc822":
        return PartKind.MESSAGE, b"", ""
    if sub.startswith(b"global"):
        return PartKind.OTHER, b"", ""
    return PartKind.SEALED, b"", "a part of type message/* may not be encoded"


def _boundary(value: bytes, start: int) -> bytes:
    while (match := _PARAMETER.match(value, start)) is not None:
        if match[1].lower() == b"boundary":
            quoted = match[2]
            return (_ESCAPE.sub(rb"\1", quoted) if quoted is not None else match[3]).rstrip(b" \t")
        start = match.end()
    return b""
