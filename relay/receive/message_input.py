"""The content of a message in a session: what to do after each piece of it. Pure.

`relay.receive.protocol` feeds the octets of DATA or BDAT; `next_step` decides whether a piece is
staged, the message is finished, a chunk gets its reply, or more is read.
"""

from __future__ import annotations

from typing import NamedTuple

from relay.receive.actions import Finish, Incoming, StagePiece
from relay.receive.content import BdatReader, DataReader

DRAIN_FACTOR = 4
"""A message over the limit is read to its end up to so many times the limit, then cut off."""

_CHUNK_OK = b"250 2.0.0 Ok, go on\r\n"


class Chunk(NamedTuple):
    """The argument of BDAT (RFC 3030 §2)."""

    octets: int
    is_last: bool


def parse_chunk(arg: bytes) -> Chunk | None:
    """The size of a chunk, and whether it is the last; None where the argument is invalid."""
    size, _, last = arg.partition(b" ")
    last = last.strip().upper()
    is_valid = size.isdigit() and len(size) <= 20 and last in (b"", b"LAST")
    return Chunk(int(size), last == b"LAST") if is_valid else None


class MessageInput:
    """One message that is coming in. `most_octets`: how much of it is read before it is cut off.

    `is_reading`: the next octets are content. `closes_session`: the session ends with the message.
    """

    def __init__(
        self, intake: Incoming, reader: DataReader | BdatReader, *, most_octets: int
    ) -> None:
        self.intake = intake
        self.is_reading = True
        self.closes_session = False
        self._reader = reader
        self._most_octets = most_octets

    def begin_chunk(self, chunk: Chunk) -> None:
        """A chunk follows, after a BDAT command."""
        assert isinstance(self._reader, BdatReader)
        self._reader.begin_chunk(chunk.octets, last=chunk.is_last)
        self.is_reading = True

    def feed(self, octets: bytes, start: int) -> int:
        """Read content from `start` on; returns the position behind the last octet of it."""
        return self._reader.feed(octets, start)

    def next_step(self) -> Finish | StagePiece | bytes | None:
        """The action, or the reply, that follows the octets so far; None: read more."""
        reader = self._reader
        if reader.complete:
            return self._finish()
        if self.intake.should_stage():
            return StagePiece(self.intake)
        if isinstance(reader, BdatReader) and not reader.in_chunk:
            is_refused = self.intake.refusal is not None or reader.flaw is not None
            self.is_reading = False
            return self._finish() if is_refused else _CHUNK_OK
        # After a dot between bare LFs the client waits for a reply. The message is refused and the
        # session closed, so that nothing behind this dot is read as commands.
        has_bare_dot = isinstance(reader, DataReader) and reader.ends_with_bare_dot
        if has_bare_dot or reader.read_bytes > self._most_octets:
            self.closes_session = True
            return self._finish()
        return None

    def _finish(self) -> Finish:
        self.is_reading = False
        return Finish(self.intake)
