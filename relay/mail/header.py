"""The header section of a message, as bytes.

Source: RFC 5322 §2.1 (a header section, an empty line, a body) and §2.2 (fields and
their folding), on the line ends SMTP knows, CRLF and nothing else (RFC 5321 §2.3.8).
No field is born from a bare CR or a bare LF: where other parsers see a new line, a
client that fills in a Subject could otherwise write a field of its own choosing.

A line that is no field (no colon, or white space where a name should begin) is kept as
a field without a name, so that joining the `raw` of all fields gives the section back.
What a field means is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

__all__ = [
    "Field",
    "field_at",
    "field_end",
    "iter_fields",
    "remove_fields",
    "split_content",
    "unfold",
]

_WHITE_SPACE = frozenset(b" \t")


class Field(NamedTuple):
    """One field. `raw` is all of it with its CRLFs.

    `name` is what stands before the colon, exactly (an obsolete space before the colon belongs to
    it, and so makes it another name); b"" on a line that is no field. `value` is what follows the
    colon, still folded, without the final CRLF.
    """

    name: bytes
    raw: bytes
    value: bytes


def split_content(content: bytes) -> tuple[bytes, bytes]:
    """The header section with the CRLF of its last field, and the rest, which begins with the empty
    line.

    Without an empty line all of the content is header section, and the rest is b"".
    """
    if content.startswith(b"\r\n"):
        return b"", content
    end = content.find(b"\r\n\r\n")
    if end < 0:
        return content, b""
    return content[: end + 2], content[end + 2 :]


def field_end(header: bytes, at: int) -> int:
    """Where the field ends that `at` lies in, without its CRLF: no white space follows that one."""
    while (found := header.find(b"\r\n", at)) >= 0:
        at = found + 2
        if header[at : at + 1] not in (b" ", b"\t"):
            return found
    return len(header)


def iter_fields(header: bytes) -> Iterator[Field]:
    """The fields of a header section, in order; their `raw` joined is the section."""
    for start, end in _bounds(header):
        yield _field(header[start:end])


def field_at(header: bytes, start: int) -> Field:
    """The field whose first line begins at `start`; nothing else of the section is looked at."""
    return _field(header[slice(*next(_bounds(header, start)))])


def remove_fields(header: bytes, names: Collection[bytes]) -> bytes:
    """The section without the fields of these names (lower case); byte for byte nothing else
    changes.
    """
    kept: list[bytes] = []
    begun = 0
    for start, end in _bounds(header):
        raw = header[start:end]
        if raw[: _colon(raw)].lower() in names:
            kept.append(header[begun:start])
            begun = end
    if not begun:
        return header
    kept.append(header[begun:])
    return b"".join(kept)


def unfold(value: bytes) -> bytes:
    """A value on one line: each CRLF of a fold taken out, its white space kept (RFC 5322 §2.2.3)."""
    return value.replace(b"\r\n", b"")


def _field(raw: bytes) -> Field:
    colon = _colon(raw)
    value_end = len(raw) - 2 if raw.endswith(b"\r\n") else len(raw)
    if not colon:
        return Field(b"", raw, raw[:value_end])
    return Field(raw[:colon], raw, raw[colon + 1 : value_end])


def _bounds(header: bytes, start: int = 0) -> Iterator[tuple[int, int]]:
    """Where each field from `start` on begins and ends; one pass, whatever the section holds."""
    size = len(header)
    while start < size:
        end = min(field_end(header, start) + 2, size)
        yield start, end
        start = end


def _colon(raw: bytes) -> int:
    """Where the name ends: at a colon in the first line; 0 where there is no name."""
    colon = raw.find(b":")
    if colon <= 0 or raw[0] in _WHITE_SPACE or raw.find(b"\r\n", 0, colon) >= 0:
        return 0
    return colon
