"""Reads the content of a message from the octets of a session.

`DataReader` reads the content after DATA: it ends at CRLF.CRLF and nowhere else, and the dot that
a client adds to a line that begins with a dot is removed (RFC 5321 §4.1.1.4, §4.5.2). `BdatReader`
reads the chunks of BDAT, whose octets are counted instead (RFC 3030 §2). Both give the same content
however the network cuts it. They hold no more than one piece beyond what the caller has not taken.
After a message is refused they read on and keep nothing.

`flaw` is what makes content unacceptable; `relay.receive.submission` judges it:

    too large      more octets than the limit, the dots of transparency not counted (RFC 1870 §3)
    bare newline   a CR or LF that stands alone (RFC 5321 §2.3.8); receivers disagree about where
                   a line, and so a message, ends there. The message is refused; or a space takes
                   its place, so that it can begin no header field and end no message; or, for
                   clients that send nothing else, a LF counts as a line end and becomes CRLF
    NUL            no MIME transport carries one (RFC 2045 §2.7, §2.8)
"""

from __future__ import annotations

import re
from enum import StrEnum
from io import IncrementalNewlineDecoder

from relay.receive.held import Held
from relay.receive.spec import BareNewline

_END = b"\r\n.\r\n"
_LF_DOT = re.compile(rb"\n\.").search
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")
_BARE_CR = re.compile(rb"\r(?!\n)")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_BARE_END = re.compile(rb"\n\.\r?\n")
_BARE_POSSIBLE_END = re.compile(rb"(?:\r?\n(?:\.\r?)?|\r)\Z")


class Flaw(StrEnum):
    """Why content cannot be taken."""

    TOO_LARGE = "too large"
    BARE_NEWLINE = "bare newline"
    NUL = "NUL"


_GRAVITY = {Flaw.NUL: 1, Flaw.BARE_NEWLINE: 2, Flaw.TOO_LARGE: 3}


class ContentReader:
    """The part that both readers share: the content not yet taken, and facts about all of it."""

    def __init__(self, *, limit_bytes: int, bare_newline: BareNewline = BareNewline.REFUSE) -> None:
        self.complete = False
        self.flaw: Flaw | None = None
        self.size_bytes = 0
        """Octets of content read so far, kept or not."""
        self.read_bytes = 0
        """Octets received from the client, kept or not."""
        self.eight_bit = False
        self.is_dotless = True
        """No line of the content so far begins with a dot."""
        self._limit_bytes = limit_bytes
        self._bare_newline = bare_newline
        self.held = Held()
        self._keeps = True

    def stop_keeping(self) -> None:
        """Read on to the end of the message, but hold nothing."""
        self._keeps = False
        self.held.clear()

    def _add(self, block: bytes) -> None:
        """Add a block, without stuffed dots. It must not begin or end inside a CRLF."""
        self.size_bytes += len(block)
        if self.size_bytes > self._limit_bytes:
            self._note(Flaw.TOO_LARGE)
        if self._keeps:
            self.held.add(block)

    def _inspect(self, block: bytes) -> bytes:
        """Note what is wrong with octets as they came. Returns them, with bare newlines made spaces
        or line ends where the listener asks for that.
        """
        if self.flaw is Flaw.TOO_LARGE:
            return block
        # All octets are looked at in C, and in as few passes as Python has for it.
        text = block.decode("latin-1")
        if not text.isascii():
            self.eight_bit = True
        if b"\0" in block:
            self._note(Flaw.NUL)
        if _has_bare_newline(text):
            if self._bare_newline is BareNewline.NORMALISE:
                return _BARE.sub(b" ", block)
            if self._bare_newline is BareNewline.LINE_END:
                return _BARE_LF.sub(b"\r\n", _BARE_CR.sub(b" ", block))
            self._note(Flaw.BARE_NEWLINE)
        return block

    def _note(self, flaw: Flaw) -> None:
        """Keep the worst of several flaws, so that their order does not matter."""
        if self.flaw is None or _GRAVITY[flaw] > _GRAVITY[self.flaw]:
            self.flaw = flaw
        self.stop_keeping()


class DataReader(ContentReader):
    """Reads content up to the line with a single dot.

    The CRLF that ended DATA is put before the first octet, so that a line begins there as
    everywhere else. The end of what came is kept back while it may be the beginning of `_END`.
    """

    def __init__(
        self,
        *,
        limit_bytes: int,
        bare_newline: BareNewline = BareNewline.REFUSE,
        ends_with_lf: bool = False,
    ) -> None:
        super().__init__(limit_bytes=limit_bytes, bare_newline=bare_newline)
        self._ends_with_lf = ends_with_lf
        self._tail = b"\r\n"
        self._implied = 2
        self.ends_with_bare_dot = False
        """What came so far ends with LF.LF, as a client that knows no CRLF would end a message."""

    def feed(self, data: bytes, start: int = 0) -> int:
        """Read on from `start`; returns the position behind the last octet of the content."""
        octets = self._tail + data[start:]
        if self._bare_newline is BareNewline.LINE_END:
            return self._feed_lines(octets, len(data) - start, len(data))
        dot = _line_with_dot(octets)
        end = octets.find(_END, max(0, dot - 2)) if dot >= 0 else -1
        if end < 0:
            keep = _possible_end(octets)
            self.read_bytes += len(data) - start
            self._tail = octets[len(octets) - keep :]
            self._take_in(octets[: len(octets) - keep], has_dots=0 <= dot < len(octets) - keep)
            self.ends_with_bare_dot = self.flaw is Flaw.BARE_NEWLINE and octets.endswith(b"\n.\n")
            return len(data)
        position = len(data) - (len(octets) - end - len(_END))
        self.read_bytes += position - start
        self._tail = b""
        self._take_in(octets[: end + 2], has_dots=dot < end + 2)
        self.complete = True
        return position

    def _feed_lines(self, octets: bytes, count: int, size: int) -> int:
        """`feed` where a LF is a line end.

        Only a client whose commands end with a LF ends its content with LF.LF. From others, LF.LF
        is part of what they were given to send, and ends nothing.
        """
        if self._ends_with_lf:
            match = _BARE_END.search(octets)
            line_end, end = (match.start() + 1, match.end()) if match else (-1, -1)
        else:
            found = octets.find(_END)
            line_end, end = (found + 2, found + len(_END)) if found >= 0 else (-1, -1)
        if end < 0:
            possible = _BARE_POSSIBLE_END.search(octets, max(0, len(octets) - 4))
            line_end = possible.start() if possible else len(octets)
        left = len(octets) - end if end >= 0 else 0
        self.read_bytes += count - left
        self._tail = octets[line_end:] if end < 0 else b""
        self._take_in(octets[:line_end], has_dots=True)
        self.complete = end >= 0
        return size - left

    def _take_in(self, block: bytes, *, has_dots: bool) -> None:
        """Take in a block; `has_dots`: a line of it may begin with a dot."""
        if not block:
            return
        block = self._inspect(block)
        if has_dots:
            self.is_dotless = False
            block = block.replace(b"\r\n.", b"\r\n")
        if self._implied:
            block = block[self._implied :]
            self._implied = 0
        self._add(block)


class BdatReader(ContentReader):
    """Reads the chunks of BDAT. A CR at the end of a chunk waits for the LF of the next."""

    def __init__(self, *, limit_bytes: int, bare_newline: BareNewline = BareNewline.REFUSE) -> None:
        super().__init__(limit_bytes=limit_bytes, bare_newline=bare_newline)
        self._wanted = 0
        self._last = False
        self._tail = b""
        self._ended_line = True

    @property
    def in_chunk(self) -> bool:
        return self._wanted > 0

    def begin_chunk(self, count: int, *, last: bool) -> None:
        """A chunk of `count` octets follows, after a BDAT command."""
        self._wanted = count
        self._last = last
        if not count:
            self._end_chunk()

    def feed(self, data: bytes, start: int = 0) -> int:
        """Read on from `start`; returns the position after the last octet of the chunk."""
        chunk = data[start : start + self._wanted]
        self._wanted -= len(chunk)
        self.read_bytes += len(chunk)
        octets = self._tail + chunk
        keep = 1 if octets.endswith(b"\r") else 0
        self._tail = octets[len(octets) - keep :]
        self._take_in(octets[: len(octets) - keep])
        if not self._wanted:
            self._end_chunk()
        return start + len(chunk)

    def _take_in(self, block: bytes) -> None:
        if block:
            block = self._inspect(block)
            if (self._ended_line and block.startswith(b".")) or _line_with_dot(block) >= 0:
                self.is_dotless = False
            self._ended_line = block.endswith(b"\r\n")
            self._add(block)

    def _end_chunk(self) -> None:
        if not self._last:
            return
        self._take_in(self._tail)
        if not self._ended_line:
            self._add(b"\r\n")  # content that is sent with DATA has to end with a line end
        self.complete = True


def _has_bare_newline(text: str) -> bool:
    """Whether a CR or LF stands alone. The decoder tells which kinds of line ends it saw: it knows
    them in one pass, as `count` and `translate` do not.
    """
    decoder = IncrementalNewlineDecoder(None, translate=False)
    decoder.decode(text, final=True)
    return decoder.newlines not in (None, "\r\n")


def _line_with_dot(octets: bytes) -> int:
    """Where the first dot behind a line end is; -1: nowhere."""
    # A search for one octet is much faster than for two, and encoded content has no dots.
    found = _LF_DOT(octets) if b"." in octets else None
    return found.start() + 1 if found is not None else -1


def _possible_end(octets: bytes) -> int:
    """The largest number of octets at the end that may be the beginning of `_END`."""
    for count in (4, 3, 2, 1):
        if octets.endswith(_END[:count]):
            return count
    return 0
