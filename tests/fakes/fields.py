"""The fields of a header section, one by one: slower than what the relay does, and simpler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """One field. `raw` is all of it with its CRLFs.

    `name` is what stands before the colon, exactly (an obsolete space before the colon belongs to
    it, and so makes it another name); b"" on a line that is no field. `value` is what follows the
    colon, still folded, without the final CRLF.
    """

    name: bytes
    raw: bytes
    value: bytes


def iter_fields(header: bytes) -> Iterator[Field]:
    """The fields of a header section, in order; their `raw` joined is the section."""
    for start, end in _bounds(header):
        raw = header[start:end]
        colon = _colon(raw)
        value_end = len(raw) - 2 if raw.endswith(b"\r\n") else len(raw)
        yield Field(raw[:colon], raw, raw[colon + 1 if colon else 0 : value_end])


def _bounds(header: bytes) -> Iterator[tuple[int, int]]:
    """Where each field begins and ends."""
    start, size = 0, len(header)
    while start < size:
        end = start
        while True:
            found = header.find(b"\r\n", end)
            end = size if found < 0 else found + 2
            if end == size or header[end] not in b" \t":
                break
        yield start, end
        start = end


def _colon(raw: bytes) -> int:
    """Where the name ends: at a colon in the first line; 0 where there is no name."""
    colon = raw.find(b":")
    if colon <= 0 or raw[0] in b" \t" or raw.find(b"\r\n", 0, colon) >= 0:
        return 0
    return colon
