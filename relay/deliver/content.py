"""A message's content on its way out: in one piece, or in pieces from the store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from relay.queue.store import ContentFile

Content = bytes | Callable[[], AsyncIterator[bytes]]
"""A message's content: in one piece, or in several."""

PIECE_BYTES = 256 * 1024
"""The size of the pieces in which content is sent and converted.

So the progress is visible, and other sessions get their turn.
"""


class ContentBroken(Exception):
    """The content could not be read to its end: the relay's trouble, not the host's."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Content as the store has it: in pieces, or as a file that can be sent as it is.

    `open_file` returns None where there is no such file.
    """

    in_pieces: Callable[[], AsyncIterator[bytes]]
    open_file: Callable[[], Awaitable[ContentFile | None]]

    def __call__(self) -> AsyncIterator[bytes]:
        return self.in_pieces()


async def file_of(content: Content) -> ContentFile | None:
    """The file of content, for the caller to close, where it can be sent as it is."""
    if not isinstance(content, Stored):
        return None
    try:
        return await content.open_file()
    except Exception as error:
        raise ContentBroken(str(error) or type(error).__name__) from error


async def pieces(content: Content) -> AsyncGenerator[bytes]:
    """The content in pieces of at most `PIECE_BYTES`."""
    if isinstance(content, bytes):
        for piece in _slices(content):
            yield piece
        return
    try:
        async for chunk in content():
            for piece in _slices(chunk):
                yield piece
    except Exception as error:
        # After any error, half a message must not look complete, and the answers for other
        # recipients stay.
        raise ContentBroken(str(error) or type(error).__name__) from error


def _slices(chunk: bytes) -> Iterator[bytes]:
    for start in range(0, len(chunk), PIECE_BYTES):
        yield chunk[start : start + PIECE_BYTES]


async def beginning(content: Content) -> bytes:
    """The first piece, b"" of nothing."""
    if isinstance(content, bytes):
        return content
    source = content()
    try:
        return await anext(source, b"")
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()
