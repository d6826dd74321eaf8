"""The hash of a body in its relaxed form (RFC 6376 §3.4.4), taken in pieces. Pure.

Spaces and tabs at the end of a line do not count, a run of them elsewhere counts as one space,
empty lines at the end do not count, and the last line ends with CRLF. What may still turn out not
to count is held back: a run of white space, however long, is a number and a few octets.
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["BodyHash"]

_NO_SINGLE_SPACE = re.compile(rb"[ \t]{2,}+|\t")
_MANY_LINE_ENDS = b"\r\n" * 4096


class BodyHash:
    """SHA-256 of a body; `update` with its pieces in order, then `digest`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._is_empty = True
        self._line_ends = 0
        self._white = b""

    def update(self, piece: bytes) -> None:
        """The next piece: any size, cut anywhere."""
        data = self._white + piece
        text = data.rstrip(b" \t\r\n")
        if text:
            self._emit_line_ends()
            self._hash.update(_relaxed(text))
            self._is_empty = False
        self._hold_back(data[len(text) :])

    def digest(self) -> bytes:
        """The hash of all that was given."""
        whole = self._hash.copy()
        if not self._is_empty:
            whole.update(b"\r\n")
        return whole.digest()

    def _hold_back(self, white: bytes) -> None:
        """White space, of which only what follows tells whether it counts."""
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
