"""Checks the password of a user, with `relay.submit.secrets`.

The check takes as long for a user that does not exist as for one that does, so that the time does
not tell which names exist.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from datetime import datetime
from secrets import token_bytes

from argon2 import DEFAULT_MEMORY_COST, DEFAULT_PARALLELISM, DEFAULT_TIME_COST

from relay.receive.access import Access, User
from relay.submit.failures import Failures, client_key
from relay.submit.secrets import Secrets, Verdict

__all__ = ["Passwords"]

_NAME_LENGTH = 100
"""How much of a name is kept to count its wrong passwords."""


class Passwords:
    """Checks passwords."""

    def __init__(self, failures: Failures | None = None, *, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self.failures = failures or Failures()
        self._secrets = Secrets(self.failures, clock=clock)
        self._nobody = _hash_of_nobody()

    async def judge(
        self, access: Access, name: str, password: bytes, *, client: str
    ) -> User | Verdict:
        """The user, if there is one of this name with this password."""
        user = access.users.get(name)
        verdict = await self._secrets.judge(
            password,
            [user.password if user else self._nobody],
            client=client,
            name=name[:_NAME_LENGTH],
            exists=user is not None,
        )
        return user if verdict is Verdict.RIGHT and user else verdict

    def failures_of(self, name: str, client: str) -> int:
        """How many passwords of this name from this client were recently wrong."""
        return self.failures.of(client_key(client), name[:_NAME_LENGTH], self._clock())

    def close(self) -> None:
        """End the threads."""
        self._secrets.close()


def _hash_of_nobody() -> str:
    """A hash with the cost of those of `relay password`, and with an unknown password."""
    salt, octets = (b64encode(token_bytes(n)).decode().rstrip("=") for n in (16, 32))
    cost = f"m={DEFAULT_MEMORY_COST},t={DEFAULT_TIME_COST},p={DEFAULT_PARALLELISM}"
    return f"$argon2id$v=19${cost}${salt}${octets}"
