"""The header section of a message, as bytes.

Source: RFC 5322 §2.1 (a header section, an empty line, a body) and §2.2 (fields and
their folding), on the line ends SMTP knows, CRLF and nothing else (RFC 5321 §2.3.8).
No field is born from a bare CR or a bare LF: where other parsers see a new line, a
client that fills in a Subject could otherwise write a field of its own choosing.

Fields are found by their names, in one search over the octets (`named`): a section of a megabyte
of short fields costs some milliseconds. What a field means is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

__all__ = ["Span", "each_field", "named", "part_end", "split_content", "unfold"]

_PART_OCTETS = 64 * 1024
"""An expression is searched for in so much at a time: Python runs no other thread meanwhile."""


class Span(NamedTuple):
    """Where a field stands in its section: from `start` to `end`, without its final CRLF.

    `name`: in lower case, without the obsolete white space before the colon (RFC 5322 §4.5).
    """

    name: bytes
    start: int
    end: int

    def value(self, header: bytes) -> bytes:
        """What follows the colon, still folded."""
        return header[header.index(b":", self.start) + 1 : self.end]


def named(names: Iterable[bytes]) -> Callable[[bytes], Iterator[Span]]:
    """A function that finds the fields of these names (lower case) in a header section, in order."""
    pattern = rf"\r\n({'|'.join(re.escape(name.decode()) for name in names)})[ \t]*+:"
    search = re.compile(pattern.encode()).search

    def found(header: bytes) -> Iterator[Span]:
        for match, end in each_field(header, search):
            yield Span(match[1], match.start(), end)

    return found


def each_field(
    header: bytes, search: Callable[[bytes, int, int], re.Match[bytes] | None]
) -> Iterator[tuple[re.Match[bytes], int]]:
    """Each field whose beginning `search` finds, and where it ends without its final CRLF.

    `search` sees the section in lower case, each field with the CRLF before it, so that a match
    begins in the one where the field begins in the other; it may not look beyond a line.
    """
    lines, at, end = b"\r\n" + header.lower(), 0, 0
    while at < len(lines):
        if at >= end:
            end = part_end(lines, at)
        match = search(lines, at, end)
        if match is None:
            at = end
            continue
        at = _field_end(lines, match.end())
        yield match, at - 2


def part_end(lines: bytes, at: int) -> int:
    """How far to search in one go from `at` on: to a CRLF, or to the end."""
    end = lines.find(b"\r\n", at + _PART_OCTETS)
    return end if end >= 0 else len(lines)


def _field_end(header: bytes, at: int) -> int:
    """Where the field ends that `at` lies in, without its CRLF: no white space follows that one."""
    while (found := header.find(b"\r\n", at)) >= 0:
        at = found + 2
        if header[at : at + 1] not in (b" ", b"\t"):
            return found
    return len(header)


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


def unfold(value: bytes) -> bytes:
    """A value on one line: each CRLF of a fold taken out, its white space kept (RFC 5322 §2.2.3)."""
    return value.replace(b"\r\n", b"")
