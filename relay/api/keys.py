"""Who may ask: HTTP Basic (RFC 7617), user `api`, password one of the keys of the configuration.

A key stands in the configuration as it is, or as an argon2 hash made by `relay password`. Plain
keys are compared in constant time, all of them always. A hash costs tens of milliseconds and
megabytes on purpose, so hashes are computed in a thread, one at a time, and a key that was right
is remembered as a keyed digest, with the hash it was right for.

    plain or remembered           passes at once, whatever else comes from its address
    ten wrong from an address     429 for ten minutes: no other key of it is looked at
    such a key, sent again        looked at, one a second for an address

The keys of one address are looked at one after the other, each once those before it are counted:
a hundred guesses at once are ten. The last line is for a right key that is new to this process
and has guessers for neighbours: a client that is asked to wait comes again, a guess does not.
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
from datetime import datetime, timedelta
from enum import Enum
from typing import TypeVar
from weakref import WeakValueDictionary

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from relay.submit.failures import Failures, counted_as

__all__ = ["Keys", "Verdict"]

log = logging.getLogger(__name__)

K = TypeVar("K")
V = TypeVar("V")

_USER = b"api"
_LONGEST_KEY = 1024
_REMEMBERED = 1024
_HASH = "$argon2"
_WAITING_KEYS = 10_000
_LOOK_AGAIN = timedelta(seconds=1)


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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="api-keys")
        self._secret = secrets.token_bytes(32)
        self._right: dict[bytes, None] = {}
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: dict[bytes, None] = {}
        self._looked_again: dict[str, datetime] = {}

    async def judge(self, authorization: str, client: str) -> Verdict:
        """Whether what a client says of itself is right. `client`: its address, to count mistakes
        by.
        """
        if not authorization:
            return (
                Verdict.WRONG
            )  # nothing was tried: a client that waits to be asked (RFC 9110 §11.6.1)
        keys, source = self._keys(), counted_as(client)
        key = _key_in(authorization)
        if key is not None and (self._is_plain(key, keys) or self._is_remembered(key, keys)):
            return Verdict.RIGHT
        line = self._lines.setdefault(source, asyncio.Lock())
        async with line:
            verdict = await self._look(key, keys, source)
        if verdict is not Verdict.RIGHT:
            # This form is promised: docs/fail2ban reads it.
            said = "failed" if verdict is Verdict.WRONG else "refused"
            log.warning("auth %s: client=%s service=http", said, client)
        return verdict

    def name_of(self, authorization: str) -> str:
        """What stands for a key where its requests are counted."""
        return f"key {self._digest(authorization.encode(), '').hex()}"

    async def _look(self, key: bytes | None, keys: Sequence[str], source: str) -> Verdict:
        """A key that has to be computed, or is none. Those of the same client before it are
        counted.
        """
        if key is not None:
            now = self._clock()
            if self._failures.must_wait(source, now) and not self._comes_again(key, source, now):
                return Verdict.WAIT
            if await self._is_hashed(key, keys):
                return Verdict.RIGHT
        self._failures.note(source, self._clock())
        return Verdict.WRONG

    def _comes_again(self, key: bytes, source: str, now: datetime) -> bool:
        """Whether a key that was made to wait is looked at now."""
        name = self._digest(key, source)
        if name not in self._waiting:
            _remember(self._waiting, name, None, _WAITING_KEYS)
            return False
        if now - self._looked_again.get(source, now - _LOOK_AGAIN) < _LOOK_AGAIN:
            return False
        del self._waiting[name]
        _remember(self._looked_again, source, now, _WAITING_KEYS)
        return True

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
                _remember(self._right, self._digest(key, known), None, _REMEMBERED)
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


def _remember(known: dict[K, V], name: K, value: V, most: int) -> None:
    """Add to what is remembered; beyond `most` the oldest is forgotten."""
    known.pop(name, None)
    known[name] = value
    if len(known) > most:
        del known[next(iter(known))]


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
