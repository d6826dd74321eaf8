"""Tells webhooks what happened, until they have heard it.

It follows the events of the store as the delivery log's file does. Calls are owed, in one
commit, before any is made, so that an event is told at least once however often we are killed;
a receiver knows a repetition by the event's id. Redirects are not followed, answers not read.
Without a webhook it sleeps. With several workers each tells of its own events; `elsewhere` asks
for the webhooks that the first one keeps.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime
from urllib.parse import urlsplit

import aiohttp

from relay.mail.address import AddressError, domain_of
from relay.queue.desk import Desk, OwedCall, Webhook
from relay.queue.store import SpoolError, Store, StoredEvent
from relay.report.webhook import kind_of, next_try, payload

__all__ = ["Caller"]

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_PAUSE_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
_PAGE = 500
_AT_ONCE = 10
_REMEMBER_EVERY = 10_000


class Caller:
    """`run` until it is cancelled."""

    def __init__(
        self,
        store: Store,
        desk: Desk,
        *,
        signing_key: Callable[[], str | None],
        clock: Callable[[], datetime],
        elsewhere: Callable[[], list[Webhook] | None] | None = None,
    ) -> None:
        self._store = store
        self._desk = desk
        self._signing_key = signing_key
        self._clock = clock
        self._elsewhere = elsewhere
        self._told: list[Webhook] | None = None
        self._changed = asyncio.Event()
        self._changed.set()
        self._webhooks: list[Webhook] = []
        self._seen = 0
        self._remembered = 0
        self._owes = True

    def changed(self) -> None:
        """The webhooks are others now."""
        self._changed.set()

    async def run(self) -> None:
        """Tell, for ever."""
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session:
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
            while await self._owe():
                pass
        if self._owes:
            await self._call_due(session)
        await self._rest()

    async def _rest(self) -> None:
        """Until it is worth another look; without a webhook and a call only until there is one."""
        is_idle = not (self._webhooks or self._owes or self._elsewhere)
        seconds = None if is_idle else _LOOK_SECONDS
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _read_webhooks(self) -> None:
        self._webhooks = await self._desk.webhooks()
        since = min((webhook.since for webhook in self._webhooks), default=0)
        self._seen = max(self._seen, await self._desk.calls_seen(), since)
        self._remembered = max(self._remembered, self._seen - _REMEMBER_EVERY)

    async def _mirror(self, told: list[Webhook] | None) -> None:
        """Keep what another worker keeps; one that is new begins, here too, with what comes now."""
        if told is None or told is self._told:
            return
        own = {(one.domain, one.name): one.urls for one in await self._desk.webhooks()}
        wanted = {(one.domain, one.name): one.urls for one in told}
        for domain, name in own.keys() | wanted.keys():
            urls = wanted.get((domain, name), ())
            if own.get((domain, name), ()) != urls:
                await self._desk.set_webhook(domain, name, urls)
        self._told = told
        self._changed.set()

    async def _owe(self) -> bool:
        """Look at the next events and owe what is to be told of them; whether there were any."""
        events = await self._store.events_after(self._seen, limit=_PAGE)
        if not events:
            return False
        calls = [call for stored in events for call in self._calls_for(stored)]
        seen = events[-1].seq
        if calls or seen - self._remembered >= _REMEMBER_EVERY:
            await self._desk.owe_calls(calls, seen=seen)
            self._remembered = seen
            self._owes = self._owes or bool(calls)
        self._seen = seen
        return True

    def _calls_for(self, stored: StoredEvent) -> Iterable[OwedCall]:
        event = stored.event
        try:
            domain = domain_of(event.sender)
        except AddressError:
            return
        for webhook in self._webhooks:
            if (
                webhook.domain == domain
                and webhook.since < stored.seq
                and webhook.name == kind_of(event)
            ):
                for url in webhook.urls:
                    yield OwedCall(url, event.line, self._clock())

    async def _call_due(self, session: aiohttp.ClientSession) -> None:
        key = self._signing_key()
        if key is None:
            return  # nothing is said unsigned; it is owed until there is a key again
        calls = await self._desk.calls_due(now=self._clock(), limit=_AT_ONCE)
        if calls:
            await asyncio.gather(*(self._call(session, call, key) for call in calls))
        else:
            self._owes = await self._desk.next_call_due() is not None

    async def _call(self, session: aiohttp.ClientSession, call: OwedCall, key: str) -> None:
        now = self._clock()
        status = await self._post(
            session,
            call.url,
            payload(
                call.line,
                signing_key=key,
                timestamp=int(now.timestamp()),
                token=secrets.token_hex(25),
            ),
        )
        due = next_try(status, attempts=call.attempts, now=self._clock())
        said = "no answer" if status is None else f"answer {status}"
        if due is not None:
            when = due.isoformat(timespec="seconds")
            log.info("webhook at %s: %s, once more at %s", _host_of(call.url), said, when)
        elif status is None or not 200 <= status < 300:
            log.warning("webhook at %s: %s, given up", _host_of(call.url), said)
        await self._desk.settle_call(call, due=due)

    async def _post(self, session: aiohttp.ClientSession, url: str, body: bytes) -> int | None:
        """The status of the answer; None where there is none."""
        fields = {"Content-Type": "application/json"}
        try:
            async with session.post(
                url, data=body, headers=fields, allow_redirects=False
            ) as response:
                return response.status
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None


def _host_of(url: str) -> str:
    """As much of an address as a log may have: the rest is often a secret."""
    return urlsplit(url).hostname or "?"
