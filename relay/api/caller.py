"""Calls webhooks about events, and calls again until they answer.

It reads new events from the store. The calls about them are committed to the store before the first
is made, so that a crash loses none: each event is told at least once. A receiver knows a repetition
by the id of the event. Redirects are not followed, answers are not read, and only addresses that
`relay.api.targets` allows are called.

At most fifty calls are under way at a time, and three to one host. A quarter of the fifty is for
hosts that answered promptly the last time, so that hosts that do not answer cannot stop the calls
to others. Without a webhook the task sleeps. With several workers, each makes the calls about its
own events; `elsewhere` returns the webhooks of the first worker. Of several nodes each makes the
calls about its own events, and those that a lost node has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from datetime import datetime
from functools import partial
from urllib.parse import urlsplit

import aiohttp

from relay.admin.webhook_calls import calls_about
from relay.api.targets import NoTarget, Targets
from relay.mail.newest import keep_newest
from relay.queue.api_state import ApiState, PendingCall, Webhook
from relay.queue.store import EventLog, SpoolError
from relay.report.webhook import next_try, payload
from relay.route.judged import JudgedResolver

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_OTHERS_SECONDS = 5.0
"""How often a node looks for what others have left."""
_PAUSE_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_PAGE = 500
_AT_ONCE = 50
_OF_ONE_HOST = 3
_OF_OTHERS = _AT_ONCE - _AT_ONCE // 4
"""Calls at a time to hosts that did not answer promptly the last time."""
_PROMPT_SECONDS = 5.0
_MOST_PROMPT = 1000
_REMEMBER_EVERY = 10_000


class Caller:
    """Makes the calls. `run` is a task."""

    def __init__(
        self,
        events: EventLog,
        api_state: ApiState,
        *,
        signing_key: Callable[[], str | None],
        clock: Callable[[], datetime],
        targets: Targets,
        elsewhere: Callable[[], list[Webhook] | None] | None = None,
    ) -> None:
        self._events = events
        self._api_state = api_state
        self._signing_key = signing_key
        self._clock = clock
        self._targets = targets
        self._elsewhere = elsewhere
        self._told: list[Webhook] | None = None
        self._changed = asyncio.Event()
        self._changed.set()
        self._webhooks: list[Webhook] = []
        self._seen = 0
        self._remembered = 0
        self._has_calls = True
        self._next_look = 0.0
        self._wake = asyncio.Event()
        self._calling: dict[int, str] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._prompt: dict[str, None] = {}
        """Hosts that answered promptly the last time."""

    def changed(self) -> None:
        """Read the webhooks again: they have changed."""
        self._changed.set()
        self._wake.set()

    async def run(self) -> None:
        """Make calls until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        connector = aiohttp.TCPConnector(
            resolver=JudgedResolver(self._targets.addresses), use_dns_cache=False, limit=_AT_ONCE
        )
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would connect to addresses that were not judged
        ) as session:
            try:
                await self._go_on(session)
            finally:
                for task in self._calls:
                    task.cancel()
                await asyncio.gather(*self._calls, return_exceptions=True)

    async def _go_on(self, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                await self._step(session)
            except SpoolError as error:
                log.warning("webhooks wait: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _step(self, session: aiohttp.ClientSession) -> None:
        if self._elsewhere is not None:
            await self._mirror(self._elsewhere())
        if self._changed.is_set():
            self._changed.clear()
            await self._read_webhooks()
        if self._webhooks:
            while await self._add_calls():
                pass
        if self._api_state.is_shared:
            await self._look_after_others()
        if self._has_calls:
            await self._call_due(session)
        await self._rest()

    async def _look_after_others(self) -> None:
        """See now and then what lost nodes have left: events not looked at, and calls."""
        now = asyncio.get_running_loop().time()
        if now < self._next_look:
            return
        while await self._api_state.add_lost_calls(partial(calls_about, now=self._clock())):
            pass
        self._has_calls = self._has_calls or await self._api_state.next_call_due() is not None
        self._next_look = now + _OTHERS_SECONDS

    async def _rest(self) -> None:
        """Wait until the next look. Without a webhook and a call, wait until there is one."""
        is_shared = self._api_state.is_shared
        is_idle = not (self._webhooks or self._has_calls or self._elsewhere or is_shared)
        seconds = None if is_idle else _LOOK_SECONDS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _read_webhooks(self) -> None:
        self._webhooks = await self._api_state.webhooks()
        since = min((webhook.since for webhook in self._webhooks), default=0)
        self._seen = max(self._seen, await self._api_state.calls_seen(), since)
        self._remembered = max(self._remembered, self._seen - _REMEMBER_EVERY)

    async def _mirror(self, told: list[Webhook] | None) -> None:
        """Take over the webhooks of the first worker. A new one is for events from now on."""
        if told is None or told is self._told:
            return
        own = {(one.domain, one.name): one.urls for one in await self._api_state.webhooks()}
        wanted = {(one.domain, one.name): one.urls for one in told}
        for domain, name in own.keys() | wanted.keys():
            urls = wanted.get((domain, name), ())
            if own.get((domain, name), ()) != urls:
                await self._api_state.set_webhook(domain, name, urls)
        self._told = told
        self.changed()

    async def _add_calls(self) -> bool:
        """Write the calls about the next events to the store. Whether there were events."""
        events = await self._events.events_after(self._seen, limit=_PAGE)
        if not events:
            return False
        calls = calls_about(self._webhooks, events, now=self._clock())
        seen = events[-1].seq
        if calls or seen - self._remembered >= _REMEMBER_EVERY:
            await self._api_state.add_calls(calls, seen=seen)
            self._remembered = seen
            self._has_calls = self._has_calls or bool(calls)
        self._seen = seen
        return True

    async def _call_due(self, session: aiohttp.ClientSession) -> None:
        key = self._signing_key()
        if key is None:
            return  # no call is made without a signature; the calls wait for a key
        full: set[str] = set()  # URLs of hosts to which no more calls may be made now
        while len(self._calling) < _AT_ONCE:
            due = await self._api_state.calls_due(
                now=self._clock(), limit=_AT_ONCE + len(self._calling), besides=full
            )
            fresh = [call for call in due if call.number not in self._calling]
            if not fresh:
                break
            for call in fresh:
                if not self._may_call(_host_of(call.url)):
                    full.add(call.url)
                elif len(self._calling) < _AT_ONCE:
                    self._begin(session, call, key)
        if not self._calling and not full:
            self._has_calls = await self._api_state.next_call_due() is not None

    def _may_call(self, host: str) -> bool:
        """Whether one more call to this host is within the limits."""
        calling = list(self._calling.values())
        if calling.count(host) >= _OF_ONE_HOST:
            return False
        others = sum(other not in self._prompt for other in calling)
        return host in self._prompt or others < _OF_OTHERS

    def _note(self, host: str, *, is_prompt: bool) -> None:
        if is_prompt:
            keep_newest(self._prompt, host, None, most=_MOST_PROMPT)
        else:
            self._prompt.pop(host, None)

    def _begin(self, session: aiohttp.ClientSession, call: PendingCall, key: str) -> None:
        self._calling[call.number] = _host_of(call.url)
        task = asyncio.create_task(self._call(session, call, key))
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _call(self, session: aiohttp.ClientSession, call: PendingCall, key: str) -> None:
        """Make a call and write its result to the store."""
        began = asyncio.get_running_loop().time()
        try:
            status = await self._post(session, call, key)
            took = asyncio.get_running_loop().time() - began
            is_prompt = status is not None and took < _PROMPT_SECONDS
            self._note(_host_of(call.url), is_prompt=is_prompt)
            due = next_try(status, attempts=call.attempts, now=self._clock())
            said = "no answer" if status is None else f"answer {status}"
            if due is not None:
                when = due.isoformat(timespec="seconds")
                log.info("webhook at %s: %s, once more at %s", _host_of(call.url), said, when)
            elif status is None or not 200 <= status < 300:
                log.warning("webhook at %s: %s, given up", _host_of(call.url), said)
            await self._api_state.settle_call(call, due=due)
        except SpoolError as error:
            log.warning("webhooks wait: %s", error)
            await asyncio.sleep(_PAUSE_SECONDS)
        finally:
            del self._calling[call.number]
            self._wake.set()

    async def _post(
        self, session: aiohttp.ClientSession, call: PendingCall, key: str
    ) -> int | None:
        """The status of the answer; None without an answer."""
        body = payload(
            call.line,
            signing_key=key,
            timestamp=int(self._clock().timestamp()),
            token=secrets.token_hex(25),
        )
        fields = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                # aiohttp has names looked up and judged when it connects, but not addresses.
                await self._targets.addresses(urlsplit(call.url).hostname or "")
                async with session.post(
                    call.url, data=body, headers=fields, allow_redirects=False
                ) as response:
                    return response.status
        except NoTarget as error:
            log.warning("webhook at %s: not called: %s", _host_of(call.url), error)
            return None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None


def _host_of(url: str) -> str:
    """The host of a URL, for the log: the rest of the URL is often a secret."""
    return urlsplit(url).hostname or "?"
