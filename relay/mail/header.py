"""The header section of a message, as bytes.

Source: RFC 5322 §2.1 (a header section, an empty line, a body) and §2.2 (fields and
their folding). A line ends with CRLF and in no other way (RFC 5321 §2.3.8). A bare CR or a bare
LF begins no field: otherwise a person who fills in only a Subject could add a field.

One search over the octets finds the fields by their names (`named`): a section of a megabyte
of short fields costs some milliseconds. Other modules decide what a field means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

_PART_OCTETS = 64 * 1024
"""How much one search looks through: Python runs no other thread while an expression searches."""


class Span(NamedTuple):
    """The place of a field in its section: from `start` to `end`, without its final CRLF.

    `name` is in lower case, without the obsolete white space before the colon (RFC 5322 §4.5).
    """

    name: bytes
    start: int
    end: int

    def value(self, header: bytes) -> bytes:
        """The text after the colon, still folded."""
        return header[header.index(b":", self.start) + 1 : self.end]


def named(names: Iterable[bytes]) -> Callable[[bytes], Iterator[Span]]:
    """A function that finds the fields with these names (lower case) in a section, in order."""
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

    `search` sees the section in lower case with a CRLF put before it. So a match, which begins
    with the CRLF before its field, has the offset at which the field begins in `header`. The
    expression must not match beyond one line.
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
    """Where a search that begins at `at` has to end: at a CRLF, or at the end of `lines`."""
    end = lines.find(b"\r\n", at + _PART_OCTETS)
    return end if end >= 0 else len(lines)


def _field_end(header: bytes, at: int) -> int:
    """The end of the field that contains `at`: the first CRLF that no white space follows."""
    while (found := header.find(b"\r\n", at)) >= 0:
        at = found + 2
        if header[at : at + 1] not in (b" ", b"\t"):
            return found
    return len(header)


def split_content(content: bytes) -> tuple[bytes, bytes]:
    """The header section, and the rest of the content, which begins with the empty line.

    The section includes the CRLF of its last field. Without an empty line all of the content is
    header section, and the rest is b"".
    """
    if content.startswith(b"\r\n"):
        return b"", content
    end = content.find(b"\r\n\r\n")
    if end < 0:
        return content, b""
    return content[: end + 2], content[end + 2 :]


def unfold(value: bytes) -> bytes:
    """A value on one line: the CRLF of each fold removed, white space kept (RFC 5322 §2.2.3)."""
    return value.replace(b"\r\n", b"")
