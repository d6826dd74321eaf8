"""Checks passwords and keys, and decides when a password is not checked at all.

An argon2 hash costs tens of milliseconds and megabytes on purpose. So threads compute the hashes,
and the relay remembers each right secret as a keyed digest in memory.

    remembered as right      accepted at once, whatever else comes from the same address
    any other                checked one after the other for each address, and counted before the
                             check: of a hundred guesses at once only ten are checked
    too many wrong           `SecretVerdict.WAIT`. `relay.submit.failures` decides which secrets are
                             still checked; only a right one gets another answer than `WAIT`

Addresses that recently gave a wrong secret share a thread of their own, so that a right password
from elsewhere does not wait for their guesses. Both threads have a lower priority than the rest of
the process.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import secrets
import sys
from base64 import b64encode
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from enum import Enum
from weakref import WeakValueDictionary

from argon2 import DEFAULT_MEMORY_COST, DEFAULT_PARALLELISM, DEFAULT_TIME_COST, PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from relay.mail.newest import keep_newest
from relay.submit.failures import Failures, client_key

_REMEMBERED = 1024
_NAME_LENGTH = 100
"""How much of a user's name is kept to count its wrong passwords."""
_NICENESS = 10


class SecretVerdict(Enum):
    """The result of a check."""

    RIGHT = "right"
    WRONG = "wrong"
    WAIT = "wait"
    """There were too many wrong secrets: this one was not checked, or it was wrong too."""


class SecretChecker:
    """Checks secrets against their argon2 hashes."""

    def __init__(self, failures: Failures, *, clock: Callable[[], datetime]) -> None:
        self.failures = failures
        self._clock = clock
        self._hasher = PasswordHasher()
        self._pool = ThreadPoolExecutor(1, "argon2", initializer=_lower_priority)
        self._pool_of_failed = ThreadPoolExecutor(1, "argon2-guesses", initializer=_lower_priority)
        self._key = secrets.token_bytes(32)
        self._right: dict[bytes, None] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._no_user = _hash_of_no_user()

    async def judge_user(
        self, password: bytes, known: str | None, *, client: str, name: str
    ) -> SecretVerdict:
        """Whether a password is that of a user. `known`: its hash; None: there is no such user.

        Both take the same time, so that the time does not tell which names exist.
        """
        return await self.judge(
            password,
            [known or self._no_user],
            client=client,
            name=name[:_NAME_LENGTH],
            exists=known is not None,
        )

    def failures_of(self, name: str, client: str) -> int:
        """How many passwords of this user from this client were recently wrong."""
        return self.failures.of(client_key(client), name[:_NAME_LENGTH], self._clock())

    async def judge(
        self, secret: bytes, hashes: Sequence[str], *, client: str, name: str, exists: bool = True
    ) -> SecretVerdict:
        """Whether a secret matches one of these hashes.

        `client`: its address. `name`: the user that the client names. `exists`: whether there is
        this user.
        """
        if self._is_remembered(secret, hashes):
            return SecretVerdict.RIGHT
        source = client_key(client)
        async with self._locks.setdefault(source, asyncio.Lock()):
            if self._is_remembered(secret, hashes):  # an earlier request had the same secret
                return SecretVerdict.RIGHT
            return await self._check(secret, hashes, source, name, exists)

    async def _check(
        self, secret: bytes, hashes: Sequence[str], source: str, name: str, exists: bool
    ) -> SecretVerdict:
        failures, now = self.failures, self._clock()
        must_wait, mark = failures.must_wait(source, name, now), self.digest(secret, name)
        if must_wait and not failures.has_turn(source, name if exists else "", mark, now):
            return SecretVerdict.WAIT
        pool = self._pool_of_failed if failures.has_failed(source, now) else self._pool
        failures.count(source, name, now)
        loop = asyncio.get_running_loop()
        matching = await loop.run_in_executor(pool, self._matching, secret, hashes)
        if matching is not None:
            failures.take_back(source, name)
            self._remember(self.digest(secret, matching))
            return SecretVerdict.RIGHT
        failures.total += 1
        return SecretVerdict.WAIT if must_wait else SecretVerdict.WRONG

    def digest(self, secret: bytes, name: str) -> bytes:
        """The keyed digest of a secret and of the hash or name it belongs to."""
        return hmac.digest(self._key, name.encode() + b"\0" + secret, hashlib.sha256)

    def close(self) -> None:
        """End the threads."""
        for pool in (self._pool, self._pool_of_failed):
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_remembered(self, secret: bytes, hashes: Sequence[str]) -> bool:
        """Whether the secret was right before, for a hash that the user still has."""
        return any(self.digest(secret, known) in self._right for known in hashes)

    def _remember(self, digest: bytes) -> None:
        keep_newest(self._right, digest, None, most=_REMEMBERED)

    def _matching(self, secret: bytes, hashes: Sequence[str]) -> str | None:
        for known in hashes:
            try:
                self._hasher.verify(known, secret)
            except (Argon2Error, InvalidHashError):
                continue
            return known
        return None


def log_refused(
    log: logging.Logger, verdict: SecretVerdict, *, client: str, service: str, user: object = None
) -> None:
    """Log that a client did not get in. The form of the line is an interface: fail2ban reads it
    (docs/fail2ban).
    """
    result = "refused" if verdict is SecretVerdict.WAIT else "failed"
    named = "" if user is None else f" user={user!r:.80}"
    log.warning("auth %s: client=%s service=%s%s", result, client, service, named)


def _hash_of_no_user() -> str:
    """A hash of an unknown password, as costly as those of `relay password`."""
    salt, octets = (b64encode(secrets.token_bytes(n)).decode().rstrip("=") for n in (16, 32))
    cost = f"m={DEFAULT_MEMORY_COST},t={DEFAULT_TIME_COST},p={DEFAULT_PARALLELISM}"
    return f"$argon2id$v=19${cost}${salt}${octets}"


def _lower_priority() -> None:
    """Lower the priority of this thread: one hash uses several threads, and so every core.

    On Linux each thread has its own niceness, and the threads that it starts inherit it.
    """
    if sys.platform == "linux":
        os.nice(_NICENESS)
