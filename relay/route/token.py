"""An access token, the failures to get one, and how long the server is left alone after one. Pure.

    the answer                                      mail          asked again
    200 and an access token                         goes          before the token expires
    an error code that only a person can cure       waits, 4.7.8  after 1, 5, 15, 15, … minutes
    429, 5yz, no JSON, no answer, redirect          waits, 4.7.0  after 5, 10, 20, 40, 60 seconds
                                                                  or later, if Retry-After says
                                                                  so, but within an hour

A token is renewed when the shorter of five minutes and a tenth of its life is left. Times are those
of the monotonic clock, so that a change of the wall clock neither keeps a token that has expired
nor throws a good one away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

_RENEWED_BEFORE = timedelta(minutes=5)
_REFUSED_WAITS = (60.0, 300.0, 900.0)
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 60.0
_LONGEST_RETRY_AFTER = timedelta(hours=1)
"""A server that names a longer time is asked earlier: it may be back, and all mail waits for it."""


@dataclass(frozen=True, slots=True)
class Token:
    """An access token. `obtained`: before it was asked for, by the monotonic clock."""

    access: str = field(repr=False)
    obtained: float
    life: timedelta

    def is_due(self, now: float) -> bool:
        """Whether it is time to ask for the next one."""
        margin = min(_RENEWED_BEFORE, self.life / 10)
        return now >= self.obtained + (self.life - margin).total_seconds()

    def is_over(self, now: float) -> bool:
        """Whether it has expired."""
        return now >= self.obtained + self.life.total_seconds()


@dataclass(frozen=True, slots=True)
class Granted:
    """The server granted a token. `refresh_token`: the one to use from now on, "" for the same."""

    access_token: str = field(repr=False)
    life: timedelta
    refresh_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class TokenRefused:
    """Only a person can cure this; the server is not asked again for minutes."""

    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The server gave no usable answer and may give one soon."""

    reason: str
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """The server is not asked before `until`. `count`: failures of the same kind in a row."""

    failure: TokenRefused | Unavailable
    until: float
    count: int = 1

    @property
    def status(self) -> str:
        """The enhanced status of mail that waits for it."""
        return "4.7.8" if isinstance(self.failure, TokenRefused) else "4.7.0"

    @property
    def ignored_retry_after(self) -> timedelta | None:
        """The Retry-After that is longer than the relay waits; None where it is obeyed."""
        asked = self.failure.retry_after if isinstance(self.failure, Unavailable) else None
        return asked if asked is not None and asked > _LONGEST_RETRY_AFTER else None


def pause_after(before: Pause | None, failure: TokenRefused | Unavailable, *, now: float) -> Pause:
    """How long the server is left alone after a failure. `before`: the pause before it, if any."""
    is_next = before is not None and type(before.failure) is type(failure)
    count = before.count + 1 if before is not None and is_next else 1
    if isinstance(failure, TokenRefused):
        wait = _REFUSED_WAITS[min(count, len(_REFUSED_WAITS)) - 1]
    else:
        wait = min(_FIRST_WAIT * 2.0 ** min(count - 1, 10), _LONGEST_WAIT)
        if failure.retry_after is not None:
            # Also after "Retry-After: 0", each message must not make a request.
            asked = min(failure.retry_after, _LONGEST_RETRY_AFTER)
            wait = max(wait, asked.total_seconds())
    return Pause(failure, now + wait, count)
