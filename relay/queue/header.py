"""The header section of a stored message, read as far as needed. Pure."""

from __future__ import annotations

from collections.abc import AsyncIterator


async def header_section(pieces: AsyncIterator[bytes], *, limit_bytes: int) -> bytes:
    """The header section that content in `pieces` begins with, and the empty line behind it.

    At most `limit_bytes`; all of the content where it has no empty line.
    """
    header = b""
    async for piece in pieces:
        searched = max(0, len(header) - 3)
        header += piece
        if header.startswith(b"\r\n"):
            return header[:2][:limit_bytes]
        end = header.find(b"\r\n\r\n", searched)
        if end >= 0:
            return header[: end + 4][:limit_bytes]
        if len(header) >= limit_bytes:
            return header[:limit_bytes]
    return header
