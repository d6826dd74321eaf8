"""The login for a next hop that the operator named, as it is now. †

Each attempt asks for the login and waits for it, because a login may need a file that has changed,
or a token that another server gives (`AccessTokens`). Passwords are cached here, and the time stamp
of the file is looked at each time.

A login that a host has refused rests there for 1, 5 and then 15 minutes at a time, so that no
account is locked because the relay tries a wrong password again and again. The other hosts of the
next hop are tried meanwhile: one host may have lost the account. For the same reason a login that
no host has accepted yet is tried by one connection at a time (`turn`). Both hold for all workers
together (`Rests`). A login counts as another one, and does not rest, as soon as its password or the
configuration have changed.

    of ─► connect, TLS ─► turn ─► AUTH ─► accepted, or refused
                                     └──► 535 for a token that was at hand: anew, and AUTH once more
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

from relay.route.mx import hop_host_names
from relay.route.next_hop import Auth, AuthMechanism, Credentials, NextHop
from relay.route.secret_files import SecretFileError, Stamp, read_line, stamp_of

log = logging.getLogger(__name__)

_RESTS = (60.0, 300.0, 900.0)
_PATIENCE = 30.0
"""Seconds to wait for another connection that tries the login; one that hangs holds up no other."""
_LOOKS = 0.1
_BY_TOKEN = frozenset({AuthMechanism.AUTO, AuthMechanism.XOAUTH2, AuthMechanism.OAUTHBEARER})
"""No token is asked for where another mechanism would not use it."""
_ANOTHER_WORKER = "a host has refused it, as the log of another worker says"


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


@dataclass(frozen=True, slots=True)
class Rest:
    """How a login does at a host. `refusals`: in a row. `until`: it is not tried there before.
    `tried_until`: a connection tries it, no longer than to then. Times are seconds of the monotonic
    clock.
    """

    refusals: int = 0
    until: float = 0.0
    tried_until: float = 0.0


class Rests(Protocol):
    """Keeps how logins do, each under a key that tells nothing of it: for one worker (a `dict`), or
    for all (`relay.workers.shared_rests`).
    """

    def get(self, key: bytes, default: Rest, /) -> Rest: ...

    def __setitem__(self, key: bytes, rest: Rest, /) -> None: ...


_WELL = Rest()


@dataclass(slots=True)
class _Login:
    """A login of this worker. `words`: of the hosts that refused it last. `keys`: for `Rests`, by
    the name of the host.
    """

    credentials: Credentials
    is_proven: bool = False
    words: dict[str, str] = field(default_factory=dict)
    keys: dict[str, bytes] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


_Key = tuple[Auth, tuple[tuple[str, ...], ...]]


class RouteCredentials:
    """The logins of all next hops of this process.

    `tokens` None: no token is asked for; for who only wants to know that there is a login.
    `on_refusal`: hears of each login that was refused, by the name of the next hop.
    """

    def __init__(
        self,
        tokens: AccessTokens | None = None,
        *,
        rests: Rests | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_refusal: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._tokens = tokens
        self._rests: Rests = {} if rests is None else rests
        self._clock = clock
        self._on_refusal = on_refusal
        self._passwords: dict[str, tuple[Stamp | None, str]] = {}
        self._logins: dict[_Key, _Login] = {}

    async def of(self, hop: NextHop) -> Credentials | None:
        """The login of a next hop, None where it has none. Raises `CredentialsError`."""
        auth = hop.auth
        if auth is None:
            return None
        password, source = None, auth.oauth2 if auth.mechanism in _BY_TOKEN else None
        if auth.password_file is not None:
            password = await self._password(hop, auth.password_file)
        elif source is None and not _is_by_certificate(hop, auth):
            raise CredentialsError(f"the login of next hop {hop.name} has no password_file")
        credentials = Credentials(auth.username or "", password, mechanism=auth.mechanism)
        self._check_rest(hop, credentials, "")
        if source is None or self._tokens is None:
            return credentials
        return _holding(credentials, await self._tokens.token(source))

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
        for login in self._logins.values():
            for key in login.keys.values():
                self._rests[key] = _WELL
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
        is_its_turn = await self._wait_for_turn(hop, login, host)
        try:
            self._check_rest(hop, credentials, host)
            yield
        finally:
            if is_its_turn:
                self._change(hop, login, host, tried_until=0.0)
                login.turn.release()

    async def _wait_for_turn(self, hop: NextHop, login: _Login, host: str) -> bool:
        """Wait until no other connection tries the login, of this worker or of another one; False
        where that takes too long.
        """
        try:
            async with asyncio.timeout(_PATIENCE):
                await login.turn.acquire()
        except TimeoutError:
            return False
        try:
            await self._wait_for_workers(hop, login, host)
            self._change(hop, login, host, tried_until=self._clock() + _PATIENCE)
        except BaseException:  # also where the attempt is cancelled
            login.turn.release()
            raise
        return True

    async def _wait_for_workers(self, hop: NextHop, login: _Login, host: str) -> None:
        ends = self._clock() + _PATIENCE
        while self._clock() < min(self._rest(hop, login, host).tried_until, ends):  # noqa: ASYNC110
            await asyncio.sleep(_LOOKS)

    def accepted(self, hop: NextHop, credentials: Credentials, host: str) -> None:
        """A host took the login."""
        login = self._login(hop, credentials)
        login.is_proven = True
        if self._rest(hop, login, host).refusals:
            self._change(hop, login, host, refusals=0, until=0.0)

    def refused(self, hop: NextHop, credentials: Credentials, host: str, words: str) -> None:
        """A host refused the login for good, with these words."""
        login, now = self._login(hop, credentials), self._clock()
        login.is_proven, login.words[host] = False, words
        before = self._rest(hop, login, host)
        if now < before.until:
            return  # one of several connections that tried at the same time
        seconds = _RESTS[min(before.refusals, len(_RESTS) - 1)]
        refusals = before.refusals + 1
        self._change(hop, login, host, refusals=refusals, until=now + seconds)
        log.error(
            "next hop %s: %s; mail for this host waits, the login is tried again in %s; "
            "once it is corrected, `relay queue retry` sends what waits",
            hop.name,
            words,
            timedelta(seconds=seconds),
        )
        self._on_refusal(hop.name)

    def rest(self, hop: NextHop, credentials: Credentials, host: str = "") -> str:
        """Why this login is not tried now at a host, or at any of the next hop; "" where it may
        be.
        """
        login, now = self._login(hop, credentials), self._clock()
        names = [host] if host else hop_host_names(hop)
        until, first = min((self._rest(hop, login, name).until, name) for name in names)
        if until <= now:
            return ""
        login.is_proven = False
        seconds = timedelta(seconds=max(round(until - now), 1))
        words = login.words.get(first, _ANOTHER_WORKER)
        return f"the login is not tried again for {seconds}: {words}"

    def _rest(self, hop: NextHop, login: _Login, host: str) -> Rest:
        return self._rests.get(_key_of(hop, login, host), _WELL)

    def _change(self, hop: NextHop, login: _Login, host: str, **values: Any) -> None:
        self._rests[_key_of(hop, login, host)] = replace(self._rest(hop, login, host), **values)

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


def _key_of(hop: NextHop, login: _Login, host: str) -> bytes:
    """The key for `Rests`: another one for another password, so that a corrected one does not rest.

    Only workers of the same relay see it, in their memory.
    """
    if host not in login.keys:
        said = repr((hop.auth, hop.hosts, login.credentials.password, host))
        login.keys[host] = hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()
    return login.keys[host]


def _is_by_certificate(hop: NextHop, auth: Auth) -> bool:
    return auth.mechanism is AuthMechanism.EXTERNAL or hop.certificate is not None


def _key(hop: NextHop) -> _Key:
    assert hop.auth is not None
    return hop.auth, hop.hosts
