"""The bytes of SMTP as a client sees them: replies in, content out. No I/O.

`ReplyReader` reads replies from a stream that is cut anywhere (RFC 5321 §4.2), in
bounded memory. Text that is no reply raises `BadReply`. `DotStuffing` prepares content
for DATA (RFC 5321 §4.5.2), piece by piece.
"""

from __future__ import annotations

import re
from functools import lru_cache

from relay.mail.reply import Reply, parse_reply

MAX_LINE_BYTES = 8 * 1024
"""RFC 5321 §4.5.3.1.5 allows 512; real hosts send more."""

MAX_REPLY_BYTES = 32 * 1024
"""All lines of one reply."""


_ONE_LINE = re.compile(rb"([1-5][0-9][0-9])(?: (.*))?", re.DOTALL)
"""A complete reply, without its line end."""


_LF_DOT = re.compile(rb"\n\.").search
_CR_DOT = re.compile(rb"\r\.").search


class BadReply(Exception):
    """The peer's text is no reply. `str()` says what is wrong, for a person."""


class ReplyReader:
    """Reads replies from `buffer`, which its owner fills (and may empty between two replies)."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self._lines: list[bytes] = []
        self._code = b""
        self._bytes = 0
        self._error: BadReply | None = None

    @property
    def is_empty(self) -> bool:
        """Whether all bytes that came belong to replies that were taken."""
        return not self.buffer and not self._lines

    def reset(self) -> None:
        """Forget all that came."""
        self.buffer.clear()
        self._lines, self._code, self._bytes, self._error = [], b"", 0, None

    def take(self) -> Reply | None:
        """The next reply, if all of it has come.

        Raises `BadReply` for text that cannot become a reply, and at each later call: it would be
        unknown which command the next line belongs to.
        """
        if self._error is not None:
            raise self._error
        if not self._lines:
            end = self.buffer.find(b"\n", 0, MAX_LINE_BYTES)
            if end < 0 and len(self.buffer) <= MAX_LINE_BYTES:
                return None
            if end >= 0 and (reply := _on_one_line(bytes(self.buffer[:end]))) is not None:
                del self.buffer[: end + 1]
                return reply
        try:
            return self._take()
        except BadReply as error:
            self._error = error
            raise

    def _take(self) -> Reply | None:
        while (line := self._take_line()) is not None:
            code, mark = line[:3], line[3:4]
            if (
                len(code) < 3
                or not (code.isdigit() and b"100" <= code <= b"599")
                or mark not in (b"", b" ", b"-")
            ):
                raise BadReply(f"not a reply: {_shown(line)}")
            if self._lines and code[:1] != self._code[:1]:
                raise BadReply(f"a reply of two minds: {_shown(self._code)} and {_shown(line)}")
            # RFC 5321 §4.2.1 wants one code on all lines; where they differ the last one counts.
            self._code = code
            self._lines.append(line[4:])
            if mark != b"-":
                return self._finish()
        return None

    def _take_line(self) -> bytes | None:
        end = self.buffer.find(b"\n")
        length = end if end >= 0 else len(self.buffer)
        if length > MAX_LINE_BYTES or self._bytes + length > MAX_REPLY_BYTES:
            raise BadReply("a reply without end")
        if end < 0:
            return None
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        # An empty line counts too, so that no reply is endless.
        self._bytes += length + 1
        return line.rstrip(b" \t\r")

    def _finish(self) -> Reply:
        reply = _reply(self._code, b"\n".join(self._lines))
        self._lines, self._code, self._bytes = [], b"", 0
        return reply


@lru_cache(maxsize=256)  # a host says the same of most messages
def _on_one_line(line: bytes) -> Reply | None:
    """The reply that this line is; None where it is no reply, or the first line of several."""
    match = _ONE_LINE.fullmatch(line.rstrip(b" \t\r"))
    return _reply(match[1], match[2] or b"") if match is not None else None


def _reply(code: bytes, text: bytes) -> Reply:
    # Bytes that are no UTF-8 are kept readable, and no lone surrogate reaches a log.
    return parse_reply(int(code), text.decode("utf-8", "backslashreplace"))


def _shown(line: bytes) -> str:
    return repr(line[:80])[1:]


class DotStuffing:
    """Adds dots to content for DATA. The content must have CRLF line ends.

    A dot after a bare CR or LF is doubled too, as a second guard: a host that takes these for line
    ends must not find the end of the data inside the content.
    """

    def __init__(self) -> None:
        self._last_two = b"\r\n"

    def stuff(self, piece: bytes) -> bytes:
        """The next piece, ready to send."""
        if not piece:
            return piece
        starts_with_dot = piece[:1] == b"." and self._last_two[-1:] in (b"\r", b"\n")
        self._last_two = (self._last_two + piece[-2:])[-2:]
        # A search for one octet is much faster than for two, and encoded content has no dots. An
        # expression looks for its first octet in that way; `replace` does not.
        if b"." in piece and (_LF_DOT(piece) or _CR_DOT(piece)):
            piece = piece.replace(b"\n.", b"\n..").replace(b"\r.", b"\r..")
        return b"." + piece if starts_with_dot else piece

    def end(self) -> bytes:
        """The final dot, on a line of its own."""
        return b".\r\n" if self._last_two == b"\r\n" else b"\r\n.\r\n"
