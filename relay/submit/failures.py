"""How often a password or a key may be wrong before its client has to wait. Pure.

Each password is counted before it is checked: by name and client, and by client. The count of a
right password is taken back. After too many wrong ones of a name, or of a client, the relay no
longer checks every password of that name or client, until ten minutes after the last one. It still
checks some:

* of each name that exists, one new password every ten seconds;
* of each name, also one password every ten seconds that had to wait before, because an application
  tries the same password again and a guesser does not. The relay checks the same password at most
  once in ten minutes.

So a right password is accepted although another person guesses at the same address, and although
another application tries a wrong password for ever.
"""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta
from typing import Protocol

from relay.mail.ip import canonical
from relay.mail.newest import keep_newest

_MOST_OF_NAME = 10
_MOST_OF_CLIENT = 30
_WINDOW = timedelta(minutes=10)
_TURN = timedelta(seconds=10)
"""Between two checks of a name whose client has to wait."""
_REMEMBERED = 10_000


class FailedElsewhere(Protocol):
    """The wrong passwords that other workers of this node have counted."""

    def failures_of(self, key: str, since: datetime) -> int:
        """How many a key has, if the last of them was not before `since`."""

    def failed(self, key: str, count: int, now: datetime) -> None:
        """Tell the other workers how many this worker has counted."""


class Failures:
    """Counts wrong passwords, by name and client and by client, and forgets them with time.

    It holds at most `remembered` counts and forgets the oldest first. `total`: all since the start.
    """

    def __init__(
        self, *, remembered: int = _REMEMBERED, elsewhere: FailedElsewhere | None = None
    ) -> None:
        self._remembered = remembered
        self._counts: dict[str, tuple[int, datetime]] = {}
        self._turns: dict[tuple[str, str, bool], datetime] = {}
        self._digests: dict[bytes, datetime | None] = {}
        self._elsewhere = elsewhere
        self.total = 0

    def must_wait(self, client: str, name: str, now: datetime) -> bool:
        """Whether there were too many wrong passwords."""
        of_name = self._of_all_workers(_key(client, name), now)
        return of_name >= _MOST_OF_NAME or self._of_all_workers(client, now) >= _MOST_OF_CLIENT

    def has_turn(self, client: str, name: str, digest: bytes, now: datetime) -> bool:
        """Whether the relay checks this password of a client that must wait.

        `digest`: of the password. `name`: "" for every name that does not exist, so that all
        of them share one turn.
        """
        is_repeated, checked = digest in self._digests, self._digests.get(digest)
        if checked is not None and now - checked < _WINDOW:
            return False
        turn = (client, name, is_repeated)
        has_turn = now - self._turns.get(turn, now - _TURN) >= _TURN
        if has_turn:
            keep_newest(self._turns, turn, now, most=self._remembered)
        keep_newest(self._digests, digest, now if has_turn else None, most=self._remembered)
        return has_turn

    def count(self, client: str, name: str, now: datetime) -> None:
        """Count a password that is about to be checked."""
        if not self.must_wait(client, name, now):
            keep_newest(self._turns, (client, name, False), now, most=self._remembered)
        for key in (_key(client, name), client):
            self._set(key, self._recent(key, now) + 1, now)

    def take_back(self, client: str, name: str) -> None:
        """Take back the count of a password that was right.

        Wrong passwords stay counted: another program at the same address may be guessing.
        """
        for key in (_key(client, name), client):
            count, last = self._counts.get(key, (0, None))
            if last is not None and count:
                self._set(key, count - 1, last)

    def has_failed(self, client: str, now: datetime) -> bool:
        """Whether a client recently gave this worker a wrong password."""
        return self._recent(client, now) > 0

    def of(self, client: str, name: str, now: datetime) -> int:
        """How many wrong passwords of a name came from a client, as far as this worker knows."""
        return self._recent(_key(client, name), now)

    def _of_all_workers(self, key: str, now: datetime) -> int:
        elsewhere = self._elsewhere.failures_of(key, now - _WINDOW) if self._elsewhere else 0
        return self._recent(key, now) + elsewhere

    def _recent(self, key: str, now: datetime) -> int:
        count, last = self._counts.get(key, (0, now))
        return count if now - last < _WINDOW else 0

    def _set(self, key: str, count: int, at: datetime) -> None:
        keep_newest(self._counts, key, (count, at), most=self._remembered)
        if self._elsewhere is not None:
            self._elsewhere.failed(key, count, at)


def _key(client: str, name: str) -> str:
    return f"{client} {name}"


def client_key(client: str) -> str:
    """The name that a client is counted under: the IPv4 address, or the /64 of an IPv6 address."""
    client = canonical(client)
    if ":" not in client:
        return client
    return str(ipaddress.IPv6Network((client, 64), strict=False))
