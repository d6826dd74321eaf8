"""The bytes of SMTP as a client sees them: replies in, content out. No I/O.

`ReplyReader` takes replies out of a stream, however it is cut (RFC 5321 §4.2), in
bounded memory: a peer may send anything, and what is not a reply is `Garbled`.
`DotStuffing` makes content fit for DATA (RFC 5321 §4.5.2), piece by piece.
"""

from __future__ import annotations

from relay.mail.reply import Reply, parse_reply

__all__ = ["MAX_LINE_BYTES", "MAX_REPLY_BYTES", "DotStuffing", "Garbled", "ReplyReader"]

MAX_LINE_BYTES = 8 * 1024
"""RFC 5321 §4.5.3.1.5 allows 512; real hosts have said more."""

MAX_REPLY_BYTES = 32 * 1024
"""All lines of one reply."""


class Garbled(Exception):
    """What the peer sent is no reply. `str()` says what was wrong, for a person."""


class ReplyReader:
    """Takes replies out of `buffer`, which its owner fills (and may empty between two replies)."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self._lines: list[bytes] = []
        self._code = b""
        self._bytes = 0
        self._garbled: Garbled | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no byte that belongs to no reply taken yet."""
        return not self.buffer and not self._lines

    def reset(self) -> None:
        """Forget all that came."""
        self.buffer.clear()
        self._lines, self._code, self._bytes, self._garbled = [], b"", 0, None

    def take(self) -> Reply | None:
        """The next reply if all of it is there. Raises `Garbled` on what cannot become one, and
        ever after:

        which command the next line would belong to, nobody knows.
        """
        if self._garbled is not None:
            raise self._garbled
        try:
            return self._take()
        except Garbled as garbled:
            self._garbled = garbled
            raise

    def _take(self) -> Reply | None:
        while (line := self._take_line()) is not None:
            code, mark = line[:3], line[3:4]
            if (
                len(code) < 3
                or not (code.isdigit() and b"100" <= code <= b"599")
                or mark not in (b"", b" ", b"-")
            ):
                raise Garbled(f"not a reply: {_shown(line)}")
            if self._lines and code[:1] != self._code[:1]:
                raise Garbled(f"a reply of two minds: {_shown(self._code)} and {_shown(line)}")
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
            raise Garbled("a reply without end")
        if end < 0:
            return None
        line = bytes(self.buffer[:end])
        del self.buffer[: end + 1]
        # An empty line counts too, so that no endless reply is free.
        self._bytes += length + 1
        return line.rstrip(b" \t\r")

    def _finish(self) -> Reply:
        # Bytes that are no UTF-8 are kept readable, and no lone surrogate reaches a log.
        text = b"\n".join(self._lines).decode("utf-8", "backslashreplace")
        reply = parse_reply(int(self._code), text)
        self._lines, self._code, self._bytes = [], b"", 0
        return reply


def _shown(line: bytes) -> str:
    return repr(line[:80])[1:]


class DotStuffing:
    """Content as it goes after DATA. The content has CRLF line ends and nothing else.

    Should a bare CR or LF have got in all the same, a dot after it is doubled too: no host,
    whatever it takes for a line end, may find the end of the data inside it.
    """

    def __init__(self) -> None:
        self._last_two = b"\r\n"

    def stuff(self, piece: bytes) -> bytes:
        """The next piece, ready to send."""
        if not piece:
            return piece
        starts_with_dot = piece[:1] == b"." and self._last_two[-1:] in (b"\r", b"\n")
        self._last_two = (self._last_two + piece[-2:])[-2:]
        # One octet is looked for much faster than two, and encoded content has no dots.
        if b"." in piece:
            piece = piece.replace(b"\n.", b"\n..").replace(b"\r.", b"\r..")
        return b"." + piece if starts_with_dot else piece

    def end(self) -> bytes:
        """What ends the data: the final dot, on a line of its own."""
        return b".\r\n" if self._last_two == b"\r\n" else b"\r\n.\r\n"
