"""A message's content on its way out: whole, or in pieces from where it lies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

__all__ = ["PIECE_BYTES", "Content", "ContentBroken", "beginning", "pieces"]

Content = bytes | Callable[[], AsyncIterator[bytes]]
"""A message's content: whole, or in pieces."""

PIECE_BYTES = 64 * 1024
"""Content goes out, and is converted, in pieces of this size: progress can be seen, and others have
their turn.
"""


class ContentBroken(Exception):
    """The content could not be read to its end: our trouble, not the host's."""


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
        # Whatever it is, half a message must not look whole, and what other recipients were told
        # stands.
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
