"""The access tokens of this process: kept, renewed, asked for by one request however many wait. †

`relay.route.oauth2` decides what is sent, what an answer means and how long a server is left alone;
this module reads the files with the secrets, makes the request, and keeps the token in memory.

A refresh token may count only once: the server replaces it with each answer. Then the new one is in
its file, synced, before the access token is used, and no two processes ask with the same one: a
lock beside the file is held from before it is read until the new one is in place. The lock ends
with its process. If a process is killed between the answer and the file, the new token is lost with
it, and a person has to log in again (`relay login`) unless the server still takes the old one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

import aiohttp
from yarl import URL

from relay.deliver.https import HttpsClient, NoAnswer
from relay.route.credentials import CredentialsError, HeldToken
from relay.route.next_hop import Grant, TokenSource
from relay.route.oauth2 import HttpAnswer, TokenRequest, TokenSecrets, read_answer, token_request
from relay.route.secret_files import (
    SecretFileError,
    Stamp,
    locked,
    read_line,
    read_text,
    replace_secret,
    reserve,
    shown_path,
    stamp_of,
)
from relay.route.service_account import ServiceKey
from relay.route.token import Granted, Pause, Token, TokenRefused, Unavailable, pause_after

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
_LOCK_SECONDS = 15.0
_MOST_BYTES = 64 * 1024
_HEADERS = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "Content-Type": "application/x-www-form-urlencoded",
}

Post = Callable[[TokenRequest], Awaitable[HttpAnswer | NoAnswer]]


class TokenClient:
    """Posts requests for tokens; the HTTPS client judges address and certificate."""

    def __init__(self, https: HttpsClient) -> None:
        self._https = https

    async def post(self, request: TokenRequest) -> HttpAnswer | NoAnswer:
        """The answer within ten seconds, with the look-up of the server's address."""
        url = URL(request.url)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                return await self._https.ask(url, _read, headers=_HEADERS, body=request.body)
        except TimeoutError:
            return NoAnswer(f"{url.host} took longer than {REQUEST_SECONDS:g} s")


async def _read(answer: aiohttp.ClientResponse) -> HttpAnswer:
    body = b""
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > _MOST_BYTES:
            body = b""  # no token is that long: as an answer without JSON
            break
    headers = answer.headers
    return HttpAnswer(answer.status, body, headers.get("Retry-After", ""), headers.get("Date", ""))


@dataclass(eq=False, slots=True)
class _State:
    """What is known of one source. `stamps`: of its files, when they were last looked at.
    `unsaved`: a refresh token that could not be written yet.
    """

    source: TokenSource
    stamps: tuple[Stamp | None, ...]
    token: Token | None = None
    pause: Pause | None = None
    request: asyncio.Task[None] | None = None
    unsaved: str = field(default="", repr=False)


class Tokens:
    """`sources`: those of the configuration, now. `on_request`: hears of each request, by the
    name of the source and what came of it: "granted", "refused" or "unavailable".
    """

    def __init__(
        self,
        sources: Callable[[], Mapping[str, TokenSource]],
        post: Post,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], datetime],
        on_request: Callable[[str, str], None] = lambda name, result: None,
    ) -> None:
        self._sources = sources
        self._post = post
        self._monotonic = monotonic
        self._clock = clock
        self._on_request = on_request
        self._states: dict[str, _State] = {}
        self._requests: set[asyncio.Task[None]] = set()

    async def token(self, name: str) -> HeldToken:
        """A token that has not expired. Raises `CredentialsError`."""
        state = self._state(name)
        token, now = state.token, self._monotonic()
        if token is not None and not token.is_over(now):
            if token.is_due(now):
                self._begin(state)
            return HeldToken(token.access)
        return await self._wait_for(state)

    async def anew(self, name: str, refused: str) -> HeldToken:
        """Another token than one that a host has refused. Raises `CredentialsError`."""
        state = self._state(name)
        token = state.token
        if token is None or token.access == refused or token.is_over(self._monotonic()):
            state.token = None
            return await self._wait_for(state)
        return HeldToken(token.access, is_fresh=True)

    async def close(self) -> None:
        """Wait for the requests under way: the answer may have a refresh token in it."""
        if self._requests:
            await asyncio.wait(self._requests, timeout=REQUEST_SECONDS + _LOCK_SECONDS)

    def forget_pauses(self) -> None:
        """Ask every server again when the next message needs it: the configuration was reloaded."""
        for state in self._states.values():
            state.pause = None

    # --- one source -------------------------------------------------------------------------------

    def _state(self, name: str) -> _State:
        source = self._sources().get(name)
        if source is None:
            raise CredentialsError(f"there is no oauth2.{name} in the configuration")
        stamps = _stamps(source)
        state = self._states.get(name)
        if state is None or state.source != source:
            state = self._states[name] = _State(source, stamps)
        elif state.stamps != stamps:
            self._files_changed(state, stamps)
        return state

    def _files_changed(self, state: _State, stamps: tuple[Stamp | None, ...]) -> None:
        """A person may have corrected what was refused. A refresh token may also have been replaced
        by another process, and then the access token is as good as before.
        """
        state.stamps, state.pause, state.unsaved = stamps, None, ""
        if state.source.grant is not Grant.REFRESH_TOKEN:
            state.token = None

    def _begin(self, state: _State) -> asyncio.Task[None] | None:
        """Make a request, or join the one under way; None while the server is left alone."""
        if state.request is not None:
            return state.request
        if state.pause is not None and self._monotonic() < state.pause.until:
            return None
        state.request = task = asyncio.create_task(self._ask(state))
        self._requests.add(task)
        task.add_done_callback(partial(self._ended, state))
        return task

    def _ended(self, state: _State, task: asyncio.Task[None]) -> None:
        state.request = None
        self._requests.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        # Without the text of the error: a library may quote in it what it was given.
        what = f"the request failed in the relay itself ({type(error).__name__})"
        failure = Unavailable(f"oauth2.{state.source.name}: no token: {what}")
        state.pause = pause_after(state.pause, failure, now=self._monotonic())
        log.error("%s", failure.reason)

    async def _wait_for(self, state: _State) -> HeldToken:
        task = self._begin(state)
        if task is not None:
            await asyncio.wait([task])
            if state.token is not None:
                return HeldToken(state.token.access, is_fresh=True)
        if state.pause is None:
            raise CredentialsError(f"oauth2.{state.source.name}: no token", "4.7.0")
        raise CredentialsError(state.pause.failure.reason, state.pause.status)

    # --- one request ------------------------------------------------------------------------------

    async def _ask(self, state: _State) -> None:
        found = await self._outcome(state)
        name, now = state.source.name, self._monotonic()
        match found:
            case Token():
                if state.pause is not None:
                    log.info("oauth2.%s: there is a token again", name)
                state.token, state.pause = found, None
                self._on_request(name, "granted")
            case TokenRefused():
                state.pause = pause_after(state.pause, found, now=now)
                log.error("%s; %s", found.reason, _next_try(state.pause, now))
                self._on_request(name, "refused")
            case Unavailable():
                state.pause = pause_after(state.pause, found, now=now)
                log.warning("%s; %s", found.reason, _next_try(state.pause, now))
                self._on_request(name, "unavailable")

    async def _outcome(self, state: _State) -> Token | TokenRefused | Unavailable:
        source = state.source
        try:
            if source.grant is not Grant.REFRESH_TOKEN or source.refresh_token_file is None:
                return await self._request(state)
            async with locked(source.refresh_token_file, seconds=_LOCK_SECONDS):
                return await self._request(state)
        except TimeoutError:
            return Unavailable(f"oauth2.{source.name}: another process holds the lock")
        except (SecretFileError, ValueError) as error:
            return TokenRefused("", f"oauth2.{source.name}: {error}")

    async def _request(self, state: _State) -> Token | TokenRefused | Unavailable:
        source = state.source
        secrets = await asyncio.to_thread(_read_secrets, source, state.unsaved)
        request = token_request(source, secrets, now=self._clock())
        began = self._monotonic()
        answer = await self._post(request)
        if isinstance(answer, NoAnswer):
            reason = request.secrets.masked(answer.reason)
            return Unavailable(f"oauth2.{source.name}: no token: {reason}")
        found = read_answer(answer, request, source, now=self._clock())
        if not isinstance(found, Granted):
            return found
        if found.refresh_token and found.refresh_token != secrets.refresh_token:
            state.unsaved = found.refresh_token
        if state.unsaved and source.refresh_token_file is not None:
            await self._save(state, source.refresh_token_file)
        return Token(found.access_token, began, found.life)

    async def _save(self, state: _State, path: str) -> None:
        """Write the refresh token that counts from now on. Until that succeeds, this process uses
        it from memory, and writes it after the next request.
        """
        try:
            await asyncio.to_thread(replace_secret, path, state.unsaved)
        except SecretFileError as error:
            log.error(
                "oauth2.%s: the new refresh token is not written: %s", state.source.name, error
            )
        else:
            state.unsaved = ""
        state.stamps = _stamps(state.source)


def _next_try(pause: Pause, now: float) -> str:
    words = f"mail waits, asked again in {timedelta(seconds=round(pause.until - now))}"
    asked = pause.ignored_retry_after
    return f"{words} (its Retry-After, {asked}, is too long)" if asked is not None else words


def _stamps(source: TokenSource) -> tuple[Stamp | None, ...]:
    files = (source.client_secret_file, source.refresh_token_file, source.key_file)
    return tuple(stamp_of(path) for path in files if path is not None)


def _read_secrets(source: TokenSource, unsaved: str) -> TokenSecrets:
    """The secrets of a source. `unsaved`: a refresh token that could not be written."""
    secret = refresh = ""
    key = None
    if source.client_secret_file is not None:
        secret = read_line(source.client_secret_file)
    if source.grant is Grant.REFRESH_TOKEN and source.refresh_token_file is not None:
        path = source.refresh_token_file
        if not unsaved and stamp_of(path) is None:
            raise SecretFileError(
                f"{shown_path(path)}: no token yet; run `relay login {source.name}`"
            )
        refresh = unsaved or read_line(path)
        if not unsaved:
            reserve(path)
    if source.grant is Grant.SERVICE_ACCOUNT and source.key_file is not None:
        try:
            key = ServiceKey.parse(read_text(source.key_file))
        except ValueError as error:
            raise SecretFileError(f"{source.key_file}: {error}") from None
    return TokenSecrets(secret, refresh, key)
