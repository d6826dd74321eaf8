"""The hash of a body in its relaxed form (RFC 6376 §3.4.4), computed from its pieces. Pure.

The relaxed form has no spaces and tabs at the end of a line, one space in the place of a run of
them elsewhere, no empty lines at the end, and a CRLF behind the last line. White space at the end
of a piece may have to be left out, so it is held back until the next piece: as a number of line
ends and a few octets, however long it is.
"""

from __future__ import annotations

import hashlib
import re

_NO_SINGLE_SPACE = re.compile(rb"[ \t]{2,}+|\t")
_MANY_LINE_ENDS = b"\r\n" * 4096


class BodyHash:
    """The SHA-256 of a body: `update` takes its pieces in order, then `digest` returns the hash."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._is_empty = True
        self._line_ends = 0
        self._white = b""

    def update(self, piece: bytes) -> None:
        """Take the next piece. It may have any size, and be cut anywhere."""
        data = self._white + piece
        text = data.rstrip(b" \t\r\n")
        if text:
            self._emit_line_ends()
            self._hash.update(_relaxed(text))
            self._is_empty = False
        self._hold_back(data[len(text) :])

    def digest(self) -> bytes:
        """The hash of all pieces so far."""
        whole = self._hash.copy()
        if not self._is_empty:
            whole.update(b"\r\n")
        return whole.digest()

    def _hold_back(self, white: bytes) -> None:
        """Keep white space at the end of a piece: what follows it decides whether it counts."""
        relaxed = _relaxed(white)
        self._line_ends += relaxed.count(b"\r\n")
        self._white = relaxed.rpartition(b"\r\n")[2]

    def _emit_line_ends(self) -> None:
        while self._line_ends:
            count = min(self._line_ends, 4096)
            self._hash.update(_MANY_LINE_ENDS[: 2 * count])
            self._line_ends -= count


def _relaxed(text: bytes) -> bytes:
    if b"  " in text or b"\t" in text:
        text = _NO_SINGLE_SPACE.sub(b" ", text)
    return text.replace(b" \r\n", b"\r\n")
