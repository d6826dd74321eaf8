"""Who may ask: HTTP Basic (RFC 7617), user `api`, password one of the keys of the configuration.

A key stands in the configuration as it is, or as an argon2 hash made by `relay password`. Plain
keys are compared in constant time, all of them always. A hash costs tens of milliseconds and
megabytes on purpose, so it is computed in a thread, two at a time, and a key that was right is
remembered as a keyed digest, with the hash it was right for. A client whose keys were wrong too
often has to wait before another is looked at; a right one that is plain or remembered always
gets in, so that nobody can lock out his neighbours.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import Enum

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from relay.submit.failures import Failures, counted_as

__all__ = ["Keys", "Verdict"]

log = logging.getLogger(__name__)

_USER = b"api"
_LONGEST_KEY = 1024
_REMEMBERED = 1024
_HASH = "$argon2"


class Verdict(Enum):
    """What becomes of a request."""

    RIGHT = "right"
    WRONG = "wrong"
    WAIT = "wait"
    """Too many wrong keys from this client; this one was not looked at."""


class Keys:
    """Judges the Authorization field of requests."""

    def __init__(self, keys: Callable[[], Sequence[str]], *, clock: Callable[[], datetime]) -> None:
        self._keys = keys
        self._clock = clock
        self._failures = Failures()
        self._hasher = PasswordHasher()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="api-keys")
        self._secret = secrets.token_bytes(32)
        self._right: dict[bytes, None] = {}

    async def judge(self, authorization: str, client: str) -> Verdict:
        """Whether what a client says of itself is right. `client`: its address, to count mistakes by."""
        if not authorization:
            return (
                Verdict.WRONG
            )  # nothing was tried: a client that waits to be asked (RFC 9110 §11.6.1)
        keys, source = self._keys(), counted_as(client)
        key = _key_in(authorization)
        if key is not None:
            if self._is_plain(key, keys) or self._is_remembered(key, keys):
                return Verdict.RIGHT
            if self._failures.must_wait(source, self._clock()):
                log.warning("auth refused: client=%s service=http", client)
                return Verdict.WAIT
            if await self._is_hashed(key, keys):
                return Verdict.RIGHT
        self._failures.note(source, self._clock())
        # This form is promised: docs/fail2ban reads it.
        log.warning("auth failed: client=%s service=http", client)
        return Verdict.WRONG

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _is_plain(self, key: bytes, keys: Sequence[str]) -> bool:
        right = False
        for known in keys:
            if not known.startswith(_HASH):
                right |= hmac.compare_digest(known.encode(), key)
        return right

    def _is_remembered(self, key: bytes, keys: Sequence[str]) -> bool:
        return any(
            self._digest(key, known) in self._right for known in keys if known.startswith(_HASH)
        )

    async def _is_hashed(self, key: bytes, keys: Sequence[str]) -> bool:
        loop = asyncio.get_running_loop()
        for known in keys:
            if known.startswith(_HASH) and await loop.run_in_executor(
                self._pool, self._fits, known, key
            ):
                self._right[self._digest(key, known)] = None
                if len(self._right) > _REMEMBERED:
                    del self._right[next(iter(self._right))]
                return True
        return False

    def _fits(self, known: str, key: bytes) -> bool:
        try:
            return self._hasher.verify(known, key)
        except (Argon2Error, InvalidHashError):
            return False

    def _digest(self, key: bytes, known: str) -> bytes:
        """Of the key and the hash it was right for: a hash that is taken out forgets its key."""
        return hmac.digest(self._secret, known.encode() + b"\0" + key, hashlib.sha256)


def _key_in(authorization: str) -> bytes | None:
    """The password of HTTP Basic; None where the field is something else."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, key = base64.b64decode(credentials.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    if not colon or user != _USER or not 0 < len(key) <= _LONGEST_KEY:
        return None
    return key
