"""Checks API keys: HTTP Basic (RFC 7617) with the user `api`, and a key as the password.

A key is in the configuration as plain text, or as an argon2 hash made by `relay password`. Plain
keys are compared in constant time, always all of them. A right one is accepted at once, whatever
else comes from its address. `relay.submit.secrets` checks the others, and limits guesses.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
from collections.abc import Callable, Sequence
from datetime import datetime

from relay.submit.failures import Failures
from relay.submit.secrets import SecretChecker, SecretVerdict, log_refused

log = logging.getLogger(__name__)

_USER = b"api"
_LONGEST_KEY = 1024
_HASH = "$argon2"


class Keys:
    """Judges the Authorization field of requests."""

    def __init__(self, keys: Callable[[], Sequence[str]], *, clock: Callable[[], datetime]) -> None:
        self._keys = keys
        self._secrets = SecretChecker(Failures(), clock=clock)

    async def judge(self, authorization: str, client: str) -> SecretVerdict:
        """Whether an Authorization field has a right key. `client`: the address."""
        if not authorization:
            # No guess: the client waits for the challenge (RFC 9110 §11.6.1).
            return SecretVerdict.WRONG
        # no guess: the client waits for the challenge (RFC 9110 §11.6.1)
        keys, key = self._keys(), _key_in(authorization)
        if key is not None and _is_plain(key, keys):
            return SecretVerdict.RIGHT
        hashes = [known for known in keys if known.startswith(_HASH)] if key is not None else []
        verdict = await self._secrets.judge(
            key or authorization.encode(), hashes, client=client, name="api"
        )
        if verdict is not SecretVerdict.RIGHT:
            log_refused(log, verdict, client=client, service="http")
        return verdict

    def name_of(self, authorization: str) -> str:
        """A name for a key, to count its requests by."""
        return f"key {self._secrets.digest(authorization.encode(), '').hex()}"

    def close(self) -> None:
        """End the threads."""
        self._secrets.close()


def _is_plain(key: bytes, keys: Sequence[str]) -> bool:
    right = False
    for known in keys:
        if not known.startswith(_HASH):
            right |= hmac.compare_digest(known.encode(), key)
    return right


def _key_in(authorization: str) -> bytes | None:
    """The password of HTTP Basic; None where the field is invalid."""
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
