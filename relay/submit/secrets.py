"""Whether a password or a key is right, and when it is not even looked at.

An argon2 hash costs tens of milliseconds and megabytes on purpose. So hashes are computed in
threads, and a secret that was right is remembered, as a keyed digest in memory.

    remembered as right      passes at once, whatever else comes from its address
    any other                those of one address one after the other, each counted before it is
                             looked at: a hundred guesses at once are ten
    too many wrong           `Verdict.WAIT`; `relay.submit.failures` says what is looked at all the
                             same, and only a right one is told what came of it

Addresses that gave a wrong secret lately have a thread of their own: however many guess, somebody
else's right password does not wait for them. Both threads give way to the rest of the process.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import Enum
from weakref import WeakValueDictionary

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from relay.submit.failures import Failures, counted_as

__all__ = ["Secrets", "Verdict"]

_REMEMBERED = 1024
_NICENESS = 10


class Verdict(Enum):
    """What came of a secret."""

    RIGHT = "right"
    WRONG = "wrong"
    WAIT = "wait"
    """Too many wrong ones: this one was not looked at, or it was wrong too."""


class Secrets:
    """Judges secrets by their argon2 hashes."""

    def __init__(self, failures: Failures, *, clock: Callable[[], datetime]) -> None:
        self.failures = failures
        self._clock = clock
        self._hasher = PasswordHasher()
        self._pool = ThreadPoolExecutor(1, "argon2", initializer=_give_way)
        self._pool_of_guessers = ThreadPoolExecutor(1, "argon2-guesses", initializer=_give_way)
        self._key = secrets.token_bytes(32)
        self._right: dict[bytes, None] = {}
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def judge(
        self, secret: bytes, hashes: Sequence[str], *, client: str, name: str, exists: bool = True
    ) -> Verdict:
        """Whether a secret fits one of these hashes. `client`: an address, `name`: of whom the
        secret is said to be. Where no such name `exists`, the hashes are of nobody.
        """
        if self._is_remembered(secret, hashes):
            return Verdict.RIGHT
        source = counted_as(client)
        line = self._lines.setdefault(source, asyncio.Lock())
        async with line:
            if self._is_remembered(secret, hashes):  # one before it in the line was the same
                return Verdict.RIGHT
            return await self._look(secret, hashes, source, name, exists)

    async def _look(
        self, secret: bytes, hashes: Sequence[str], source: str, name: str, exists: bool
    ) -> Verdict:
        failures, now = self.failures, self._clock()
        must_wait, mark = failures.must_wait(source, name, now), self.digest(secret, name)
        if must_wait and not failures.has_turn(source, name if exists else "", mark, now):
            return Verdict.WAIT
        pool = self._pool_of_guessers if failures.has_failed(source, now) else self._pool
        failures.count(source, name, now)
        loop = asyncio.get_running_loop()
        fitting = await loop.run_in_executor(pool, self._fitting, secret, hashes)
        if fitting is not None:
            failures.take_back(source, name)
            self._remember(self.digest(secret, fitting))
            return Verdict.RIGHT
        failures.total += 1
        return Verdict.WAIT if must_wait else Verdict.WRONG

    def digest(self, secret: bytes, name: str) -> bytes:
        """What stands for a secret in memory, with the hash or the name it belongs to."""
        return hmac.digest(self._key, name.encode() + b"\0" + secret, hashlib.sha256)

    def close(self) -> None:
        """Let the threads go."""
        for pool in (self._pool, self._pool_of_guessers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_remembered(self, secret: bytes, hashes: Sequence[str]) -> bool:
        """A hash that is taken out or changed forgets its secret."""
        return any(self.digest(secret, known) in self._right for known in hashes)

    def _remember(self, digest: bytes) -> None:
        self._right[digest] = None
        if len(self._right) > _REMEMBERED:
            del self._right[next(iter(self._right))]

    def _fitting(self, secret: bytes, hashes: Sequence[str]) -> str | None:
        for known in hashes:
            try:
                self._hasher.verify(known, secret)
            except (Argon2Error, InvalidHashError):
                continue
            return known
        return None


def _give_way() -> None:
    """Let mail go first: a hash has several threads of its own, which take every core there is.

    Niceness is each thread's own on Linux, and is inherited.
    """
    if sys.platform == "linux":
        os.nice(_NICENESS)
