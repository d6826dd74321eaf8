"""Attempts whose messages are signed first, where their domain has a key.

The content lies in the queue as it will go out, so it is signed right before an attempt, with
the key of today. A large one is read once for its hash and once to be sent; nothing is held.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from relay.mail.header import split_content
from relay.mail.outcome import Outcome
from relay.queue.entry import Entry
from relay.sign.body import BodyHash
from relay.sign.signature import SigningKey, key_for, may_sign, sign

__all__ = ["Signing"]

log = logging.getLogger(__name__)

_LARGEST_HEADER = 2 * 1024 * 1024

Content = Callable[[], AsyncIterator[bytes]]


class _Attempts(Protocol):
    async def run(self, entry: Entry, content: Content) -> Mapping[int, Outcome]: ...


class Signing:
    """Signs, then attempts. `keys` is asked anew each time, so that a reload is seen."""

    def __init__(
        self,
        attempts: _Attempts,
        keys: Callable[[], Mapping[str, SigningKey]],
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._attempts = attempts
        self._keys = keys
        self._clock = clock

    async def run(self, entry: Entry, content: Content) -> Mapping[int, Outcome]:
        """An attempt with the signed message, if it is to be signed."""
        field = await self._field(entry, content) if may_sign(self._keys(), entry.message) else b""
        if not field:
            return await self._attempts.run(entry, content)
        message = replace(entry.message, size_bytes=entry.message.size_bytes + len(field))
        whole = None if entry.content is None else field + entry.content
        return await self._attempts.run(
            replace(entry, message=message, content=whole), lambda: _with(field, content)
        )

    async def _field(self, entry: Entry, content: Content) -> bytes:
        """The signature, b"" where the message is not ours to sign."""
        message, body = entry.message, BodyHash()
        pieces = content()
        header, rest = await _split_off(pieces)
        signing = key_for(self._keys(), message, header)
        if signing is None:
            return b""
        body.update(rest.removeprefix(b"\r\n"))
        async for piece in pieces:
            body.update(piece)
        try:
            return sign(signing, header, body.digest(), now=self._clock())
        except ValueError as error:
            log.warning("%s: goes out unsigned: %s", message.queue_id, error)
            return b""


async def _split_off(pieces: AsyncIterator[bytes]) -> tuple[bytes, bytes]:
    """The header section, and what was read beyond it."""
    front = b""
    async for piece in pieces:
        front += piece
        if b"\r\n\r\n" in front or len(front) > _LARGEST_HEADER:
            break
    return split_content(front)


async def _with(field: bytes, content: Content) -> AsyncIterator[bytes]:
    yield field
    async for piece in content():
        yield piece
