"""The login for a next hop that the operator named, as it is now. †

Each attempt asks for the login and waits for it, because a login may need a file that has changed,
or a token that another server gives (`AccessTokens`). Passwords are cached here, and the time stamp
of the file is looked at each time.

A login that a host has refused rests there for 1, 5 and then 15 minutes at a time, so that no
account is locked because the relay tries a wrong password again and again. The other hosts of the
next hop are tried meanwhile: one host may have lost the account. For the same reason a login that
no host has accepted yet is tried by one connection at a time (`turn`). It counts as another login,
and does not rest, as soon as its files or the configuration have changed.

    of ─► connect, TLS ─► turn ─► AUTH ─► accepted, or refused
                                     └──► 535 for a token that was at hand: anew, and AUTH once more
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Protocol

from relay.route.next_hop import Auth, AuthMechanism, Credentials, NextHop
from relay.route.secret_files import SecretFileError, Stamp, read_line, stamp_of

__all__ = ["AccessTokens", "CredentialsError", "HeldToken", "RouteCredentials"]

log = logging.getLogger(__name__)

_RESTS = (60.0, 300.0, 900.0)
_PATIENCE = 30.0
"""Seconds to wait for another connection that tries the login; one that hangs holds up no other."""


class CredentialsError(Exception):
    """The login is not available now; the text says why, without a secret. `status`: of mail that
    waits for it; 4.3.5 where the configuration is wrong.
    """

    def __init__(self, text: str, status: str = "4.3.5") -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class HeldToken:
    """An access token. `is_fresh`: it was fetched for the attempt that asked for it."""

    access: str = field(repr=False)
    is_fresh: bool = False


class AccessTokens(Protocol):
    """What has the access tokens: `relay.deliver.tokens.Tokens`. Both raise `CredentialsError`."""

    async def token(self, name: str) -> HeldToken: ...

    async def anew(self, name: str, refused: str) -> HeldToken: ...


@dataclass(slots=True)
class _Rest:
    """The refusals of one host in a row, with the words of the last."""

    refusals: int = 0
    until: float = 0.0
    words: str = ""


@dataclass(slots=True)
class _Login:
    """What hosts said to a login. `rests`: by the name of the host."""

    credentials: Credentials
    is_proven: bool = False
    rests: dict[str, _Rest] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


_Key = tuple[Auth, tuple[tuple[str, ...], ...]]


class RouteCredentials:
    """The logins of all next hops of this process.

    `tokens` None: no token is asked for; for who only wants to know that there is a login. `told`:
    hears of each login that was refused, by the name of the next hop.
    """

    def __init__(
        self,
        tokens: AccessTokens | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        told: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._tokens = tokens
        self._clock = clock
        self._told = told
        self._passwords: dict[str, tuple[Stamp | None, str]] = {}
        self._logins: dict[_Key, _Login] = {}

    async def of(self, hop: NextHop) -> Credentials | None:
        """The login of a next hop, None where it has none. Raises `CredentialsError`."""
        auth = hop.auth
        if auth is None:
            return None
        password = None
        if auth.password_file is not None:
            password = await self._password(hop, auth.password_file)
        elif auth.oauth2 is None and not _is_by_certificate(hop, auth):
            raise CredentialsError(f"the login of next hop {hop.name} has no password_file")
        credentials = Credentials(auth.username or "", password, mechanism=auth.mechanism)
        self._check_rest(hop, credentials, "")
        if auth.oauth2 is None or self._tokens is None:
            return credentials
        return _holding(credentials, await self._tokens.token(auth.oauth2))

    async def anew(self, hop: NextHop, refused: Credentials) -> Credentials:
        """The login with another token than one that a host has refused. Raises
        `CredentialsError`.
        """
        assert hop.auth is not None
        assert hop.auth.oauth2 is not None
        assert self._tokens is not None
        return _holding(refused, await self._tokens.anew(hop.auth.oauth2, refused.token or ""))

    def forget(self) -> None:
        """Try every login again: the configuration was reloaded."""
        self._logins.clear()

    # --- what hosts say ---------------------------------------------------------------------------

    @asynccontextmanager
    async def turn(self, hop: NextHop, credentials: Credentials, host: str) -> AsyncIterator[None]:
        """Wait until this login may be tried at a host. Raises `CredentialsError` where it was
        refused there meanwhile.
        """
        login = self._login(hop, credentials)
        if login.is_proven:
            yield
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                await login.turn.acquire()
        except TimeoutError:
            yield
            return
        try:
            self._check_rest(hop, credentials, host)
            yield
        finally:
            login.turn.release()

    def accepted(self, hop: NextHop, credentials: Credentials, host: str) -> None:
        """A host took the login."""
        login = self._login(hop, credentials)
        login.is_proven = True
        login.rests.pop(host, None)

    def refused(self, hop: NextHop, credentials: Credentials, host: str, words: str) -> None:
        """A host refused the login for good, with these words."""
        login, now = self._login(hop, credentials), self._clock()
        login.is_proven = False
        rest = login.rests.setdefault(host, _Rest())
        rest.words = words
        if now < rest.until:
            return  # one of several connections that tried at the same time
        rest.refusals += 1
        seconds = _RESTS[min(rest.refusals, len(_RESTS)) - 1]
        rest.until = now + seconds
        log.error(
            "next hop %s: %s; mail for this host waits, the login is tried again in %s",
            hop.name,
            words,
            timedelta(seconds=seconds),
        )
        self._told(hop.name)

    def rest(self, hop: NextHop, credentials: Credentials, host: str = "") -> str:
        """Why this login is not tried now at a host, or at any of the next hop; "" where it may
        be.
        """
        login = self._logins.get(_key(hop))
        if login is None or login.credentials != credentials:
            return ""
        now = self._clock()
        resting = {name: rest for name, rest in login.rests.items() if now < rest.until}
        if host:
            rest = resting.get(host)
        else:
            hosts = {name for equals in hop.hosts for name in equals}
            first = min(resting.values(), key=lambda rest: rest.until, default=None)
            rest = first if len(resting) >= len(hosts) else None
        if rest is None:
            return ""
        seconds = timedelta(seconds=max(round(rest.until - now), 1))
        return f"the login is not tried again for {seconds}: {rest.words}"

    def _check_rest(self, hop: NextHop, credentials: Credentials, host: str) -> None:
        if words := self.rest(hop, credentials, host):
            raise CredentialsError(f"next hop {hop.name}: {words}", "4.7.8")

    def _login(self, hop: NextHop, credentials: Credentials) -> _Login:
        key = _key(hop)
        login = self._logins.get(key)
        if login is None or login.credentials != credentials:
            login = self._logins[key] = _Login(credentials)
        return login

    # --- passwords --------------------------------------------------------------------------------

    async def _password(self, hop: NextHop, path: str) -> str:
        """The first line of the file, read in a thread when the file has changed."""
        stamp = stamp_of(path)
        kept = self._passwords.get(path)
        if kept is not None and stamp is not None and kept[0] == stamp:
            return kept[1]
        try:
            password = await asyncio.to_thread(read_line, path)
        except SecretFileError as error:
            text = f"the password for the next hop {hop.name} cannot be read from {error}"
            raise CredentialsError(text) from error
        self._passwords[path] = stamp, password
        return password


def _holding(credentials: Credentials, token: HeldToken) -> Credentials:
    return replace(credentials, token=token.access, is_fresh=token.is_fresh)


def _is_by_certificate(hop: NextHop, auth: Auth) -> bool:
    return auth.mechanism is AuthMechanism.EXTERNAL or hop.certificate is not None


def _key(hop: NextHop) -> _Key:
    assert hop.auth is not None
    return hop.auth, hop.hosts
