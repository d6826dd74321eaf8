"""The DKIM-Signature of a message, over exactly the content that is sent.

An attempt asks for it after all other changes to the content (also a conversion to 7 bits), and it
uses the current key. A large message is read once for its hash and once to send it, and is not
held in memory.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from relay.mail.header import split_content
from relay.mail.threads import in_thread_if_large
from relay.queue.entry import QueuedMessage
from relay.sign.body import BodyHash
from relay.sign.signature import SigningKey, key_for, may_sign, sign, why_unsigned

log = logging.getLogger(__name__)

_LARGEST_HEADER = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Signature:
    """`field` goes on top of the content; b"" where the message gets no signature.

    `unsigned`: why, where the message's domain has a key; "" where that is as it should be.
    """

    field: bytes = b""
    unsigned: str = ""


_NOT_SIGNED = Signature()


class Signer:
    """Signs messages. `keys` is called each time, so that a reload takes effect."""

    def __init__(
        self, keys: Callable[[], Mapping[str, SigningKey]], *, clock: Callable[[], datetime]
    ) -> None:
        self._keys = keys
        self._clock = clock

    async def sign(
        self, message: QueuedMessage, content: bytes | Callable[[], AsyncIterator[bytes]]
    ) -> Signature:
        """The signature of a message, or why it has none."""
        keys = self._keys()
        if not keys:
            return _NOT_SIGNED
        if not may_sign(keys, message):
            return Signature(unsigned=why_unsigned(keys, message))
        pieces = _one_piece(content) if isinstance(content, bytes) else content()
        header, rest = await _split_off(pieces)
        signing = await in_thread_if_large(
            partial(key_for, keys, message, header), octets=len(header)
        )
        if signing is None:
            return Signature(unsigned=why_unsigned(keys, message))
        body = BodyHash()
        body.update(rest.removeprefix(b"\r\n"))
        async for piece in pieces:
            body.update(piece)
        try:
            work = partial(sign, signing, header, body.digest(), now=self._clock())
            return Signature(await in_thread_if_large(work, octets=len(header)))
        except ValueError as error:
            log.warning("%s: goes out unsigned: %s", message.queue_id, error)
            return Signature(unsigned=str(error))


async def _one_piece(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _split_off(pieces: AsyncIterator[bytes]) -> tuple[bytes, bytes]:
    """The header section, and what was read beyond it."""
    front = b""
    async for piece in pieces:
        front += piece
        if b"\r\n\r\n" in front or len(front) > _LARGEST_HEADER:
            break
    return split_content(front)
