"""The sessions of users: at most twelve hours long, and thirty minutes without a request.

A session has a random token of 256 bits, which only its browser knows: the relay keeps the SHA-256.
A session ends with `end`, after its time, when the user's name or password is no longer in the
configuration, and with the process. Pure except for the random tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from relay.web.options import WebUser

LIFETIME = timedelta(hours=12)
IDLE = timedelta(minutes=30)
_MOST = 1000
_MOST_OF_USER = 20
_TOKEN_BYTES = 32


@dataclass(slots=True)
class PageSession:
    """The session of one browser. `secret`: makes its form token. `password`: the hash at login."""

    user: str
    password: str
    began: datetime
    seen: datetime
    secret: bytes
    is_ended: bool = False

    @property
    def form_token(self) -> str:
        """The token in every form of this session, which no other site knows."""
        return hmac.new(self.secret, b"form", hashlib.sha256).hexdigest()

    def accepts(self, form_token: str) -> bool:
        """Whether this is the form token of the session."""
        return hmac.compare_digest(self.form_token.encode(), form_token.encode("utf-8", "replace"))

    def is_over(self, now: datetime) -> bool:
        """Whether the session has ended, for any reason."""
        return self.is_ended or now - self.began >= LIFETIME or now - self.seen >= IDLE


class Sessions:
    """All sessions of the page."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, PageSession] = {}

    def begin(self, user: WebUser, now: datetime) -> str:
        """Begin a session. Returns its token."""
        self._make_room(user.name, now)
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._sessions[_digest(token)] = PageSession(
            user.name, user.password or "", now, now, secrets.token_bytes(_TOKEN_BYTES)
        )
        return token

    def find(self, token: str, now: datetime) -> PageSession | None:
        """The session of a token. This counts as a request of the session."""
        session = self._sessions.get(_digest(token))
        if session is None:
            return None
        if session.is_over(now):
            self.end(token)
            return None
        session.seen = now
        return session

    def end(self, token: str) -> None:
        """End the session of a token, for all windows of its browser."""
        session = self._sessions.pop(_digest(token), None)
        if session is not None:
            session.is_ended = True

    def _make_room(self, user: str, now: datetime) -> None:
        for digest, session in list(self._sessions.items()):
            if session.is_over(now):
                self._remove(digest)
        of_user = [digest for digest, one in self._sessions.items() if one.user == user]
        for digest in of_user[: max(len(of_user) - _MOST_OF_USER + 1, 0)]:
            self._remove(digest)
        while len(self._sessions) >= _MOST:
            self._remove(next(iter(self._sessions)))

    def _remove(self, digest: bytes) -> None:
        self._sessions.pop(digest).is_ended = True


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()
