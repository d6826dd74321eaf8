"""Whether a password is right: argon2, off the event loop.

An argon2 hash costs tens of milliseconds and megabytes on purpose. Checks run in threads,
few at a time; and a password that was right is remembered, as a keyed digest in memory, so
that an application which authenticates for each message does not pay each time. An unknown
user costs as much as a known one, so that time does not tell which names exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from relay.receive.access import Access, User

__all__ = ["Passwords"]

_REMEMBERED = 1024


class Passwords:
    """Checks passwords, `at_once` at a time."""

    def __init__(self, *, at_once: int = 2) -> None:
        self._hasher = PasswordHasher()
        self._nobody = ""
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="argon2")
        self._key = secrets.token_bytes(32)
        self._right: dict[bytes, None] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def turn(self, client: str) -> asyncio.Lock:
        """One client's passwords are looked at one by one, over however many connections it sends
        them:

        what the last one came to counts for the next.
        """
        lock = self._turns.get(client)
        if lock is None:
            lock = self._turns[client] = asyncio.Lock()
        return lock

    async def verify(self, access: Access, name: str, password: str) -> User | None:
        """The user, if there is one of this name with this password."""
        user = access.users.get(name)
        digest = self._digest(user, password)
        if user is not None and digest in self._right:
            return user
        loop = asyncio.get_running_loop()
        is_right = await loop.run_in_executor(self._pool, self._is_right, user, password)
        if user is None or not is_right:
            return None
        self._right[digest] = None
        if len(self._right) > _REMEMBERED:
            del self._right[next(iter(self._right))]
        return user

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _is_right(self, user: User | None, password: str) -> bool:
        if user is None and not self._nobody:
            self._nobody = self._hasher.hash(secrets.token_hex(16))
        hashed = user.password if user is not None else self._nobody
        try:
            return self._hasher.verify(hashed, password)
        except (Argon2Error, InvalidHashError):
            return False

    def _digest(self, user: User | None, password: str) -> bytes:
        """Of the password and the hash it was right for: a changed hash forgets the old password."""
        hashed = user.password if user is not None else ""
        return hmac.digest(
            self._key, f"{hashed}\0{password}".encode("utf-8", "surrogatepass"), hashlib.sha256
        )
