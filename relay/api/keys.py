"""Who may ask: HTTP Basic (RFC 7617), user `api`, password one of the keys of the configuration.

A key stands in the configuration as it is, or as an argon2 hash made by `relay password`. Plain
keys are compared in constant time, all of them always, and pass at once, whatever else comes from
their address. The rest is for `relay.submit.secrets`, and so are guesses.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
from collections.abc import Callable, Sequence
from datetime import datetime

from relay.submit.failures import Failures
from relay.submit.secrets import Secrets, Verdict, log_refused

__all__ = ["Keys", "Verdict"]

log = logging.getLogger(__name__)

_USER = b"api"
_LONGEST_KEY = 1024
_HASH = "$argon2"


class Keys:
    """Judges the Authorization field of requests."""

    def __init__(self, keys: Callable[[], Sequence[str]], *, clock: Callable[[], datetime]) -> None:
        self._keys = keys
        self._secrets = Secrets(Failures(), clock=clock)

    async def judge(self, authorization: str, client: str) -> Verdict:
        """Whether what a client says of itself is right. `client`: its address, to count mistakes
        by.
        """
        if not authorization:
            return (
                Verdict.WRONG
            )  # nothing was tried: a client that waits to be asked (RFC 9110 §11.6.1)
        keys, key = self._keys(), _key_in(authorization)
        if key is not None and _is_plain(key, keys):
            return Verdict.RIGHT
        hashes = [known for known in keys if known.startswith(_HASH)] if key is not None else []
        verdict = await self._secrets.judge(
            key or authorization.encode(), hashes, client=client, name="api"
        )
        if verdict is not Verdict.RIGHT:
            log_refused(log, verdict, client=client, service="http")
        return verdict

    def name_of(self, authorization: str) -> str:
        """What stands for a key where its requests are counted."""
        return f"key {self._secrets.digest(authorization.encode(), '').hex()}"

    def close(self) -> None:
        """Let the threads go."""
        self._secrets.close()


def _is_plain(key: bytes, keys: Sequence[str]) -> bool:
    right = False
    for known in keys:
        if not known.startswith(_HASH):
            right |= hmac.compare_digest(known.encode(), key)
    return right


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
