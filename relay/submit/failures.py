"""How often a password or a key may be wrong before its client has to wait, and who is one client.
Pure.

Each password is counted before it is looked at, by name at a client and by client; of a right one
the count is taken back. Too many of one name, or of one client, and nothing of that name or client
is looked at in its turn any more, for ten minutes after the last. What still is: of each name that
exists one new password in ten seconds, and one that was made to wait before, since an application
comes again and a guess does not; the same one once in ten minutes. So a right password gets in
beside somebody who guesses, and beside an application that has a wrong one and tries for ever.
"""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from relay.mail.ip import canonical

__all__ = ["FailedElsewhere", "Failures", "counted_as"]

K = TypeVar("K")
V = TypeVar("V")

_OF_NAME = 10
_OF_CLIENT = 30
_WINDOW = timedelta(minutes=10)
_TURN = timedelta(seconds=10)
_REMEMBERED = 10_000


class FailedElsewhere(Protocol):
    """The wrong passwords that other workers of this node were told."""

    def failures_of(self, key: str, since: datetime) -> int:
        """How many under a key, if the last of them was not before `since`."""

    def failed(self, key: str, count: int, now: datetime) -> None:
        """Tell them how many there are here now."""


class Failures:
    """Wrong passwords by name at a client and by client, forgotten with time.

    Bounded: beyond `remembered` the oldest is forgotten first. `total`: all there ever were.
    """

    def __init__(
        self, *, remembered: int = _REMEMBERED, elsewhere: FailedElsewhere | None = None
    ) -> None:
        self._remembered = remembered
        self._counts: dict[str, tuple[int, datetime]] = {}
        self._turns: dict[tuple[str, str, bool], datetime] = {}
        self._marks: dict[bytes, datetime | None] = {}
        self._elsewhere = elsewhere
        self.total = 0

    def must_wait(self, client: str, name: str, now: datetime) -> bool:
        """Whether there were too many."""
        return (
            self._all(_key(client, name), now) >= _OF_NAME or self._all(client, now) >= _OF_CLIENT
        )

    def has_turn(self, client: str, name: str, mark: bytes, now: datetime) -> bool:
        """Whether this password of one who must wait is looked at all the same. `mark`: stands for
        the password; `name`: "" for all that do not exist, so that they have one turn together.
        """
        comes_again, looked_at = mark in self._marks, self._marks.get(mark)
        if looked_at is not None and now - looked_at < _WINDOW:
            return False
        turn = (client, name, comes_again)
        has_turn = now - self._turns.get(turn, now - _TURN) >= _TURN
        if has_turn:
            _put(self._turns, turn, now, self._remembered)
        _put(self._marks, mark, now if has_turn else None, self._remembered)
        return has_turn

    def count(self, client: str, name: str, now: datetime) -> None:
        """Count a password that is looked at now."""
        if not self.must_wait(client, name, now):
            _put(self._turns, (client, name, False), now, self._remembered)
        for key in (_key(client, name), client):
            self._set(key, self._recent(key, now) + 1, now)

    def take_back(self, client: str, name: str) -> None:
        """It was right. Others that were not stay counted: the application that has the right one
        may have somebody who guesses for a neighbour.
        """
        for key in (_key(client, name), client):
            count, last = self._counts.get(key, (0, None))
            if last is not None and count:
                self._set(key, count - 1, last)

    def has_failed(self, client: str, now: datetime) -> bool:
        """Whether a client gave a wrong password lately, to this worker."""
        return self._recent(client, now) > 0

    def of(self, client: str, name: str, now: datetime) -> int:
        """How many of this name from this client, as far as this worker knows."""
        return self._recent(_key(client, name), now)

    def _all(self, key: str, now: datetime) -> int:
        elsewhere = self._elsewhere.failures_of(key, now - _WINDOW) if self._elsewhere else 0
        return self._recent(key, now) + elsewhere

    def _recent(self, key: str, now: datetime) -> int:
        count, last = self._counts.get(key, (0, now))
        return count if now - last < _WINDOW else 0

    def _set(self, key: str, count: int, at: datetime) -> None:
        _put(self._counts, key, (count, at), self._remembered)
        if self._elsewhere is not None:
            self._elsewhere.failed(key, count, at)


def _key(client: str, name: str) -> str:
    return f"{client} {name}"


def _put(known: dict[K, V], key: K, value: V, most: int) -> None:
    """Remember as the newest; beyond `most` the oldest is forgotten."""
    known.pop(key, None)
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]


def counted_as(client: str) -> str:
    """A client as it is counted: an IPv4 address; of IPv6 the /64, all of which one client has."""
    client = canonical(client)
    if ":" not in client:
        return client
    return str(ipaddress.IPv6Network((client, 64), strict=False))
