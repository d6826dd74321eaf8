"""`relay.queue.api_state` in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import count

from relay.queue.api_state import CallsAbout, DomainSettings, PendingCall, Webhook
from relay.queue.store import EventFilter, QueueView


class MemoryApiState:
    """See `relay.queue.api_state`."""

    def __init__(self, view: QueueView) -> None:
        self._view = view
        self._settings: dict[str, DomainSettings] = {}
        self._webhooks: dict[tuple[str, str], Webhook] = {}
        self._calls: dict[int, PendingCall] = {}
        self._numbers = count(1)
        self._seen = 0

    def when_changed_elsewhere(self, call: Callable[[], Awaitable[None]]) -> None:
        pass

    is_shared = False

    async def add_lost_calls(self, about: CallsAbout) -> bool:
        return False

    async def domain_settings(self) -> Mapping[str, DomainSettings]:
        return dict(self._settings)

    async def set_domain_settings(self, domain: str, settings: DomainSettings) -> DomainSettings:
        old = self._settings.get(domain, DomainSettings())
        self._settings[domain] = DomainSettings(
            old.require_tls if settings.require_tls is None else settings.require_tls,
            old.skip_verification
            if settings.skip_verification is None
            else settings.skip_verification,
        )
        return self._settings[domain]

    async def webhooks(self) -> list[Webhook]:
        return [self._webhooks[key] for key in sorted(self._webhooks)]

    async def set_webhook(self, domain: str, name: str, urls: Sequence[str]) -> None:
        old = self._webhooks.pop((domain, name), None)
        if urls:
            last = await self._view.find_events(EventFilter(), limit=1, ascending=False)
            since = old.since if old else last[0].seq if last else 0
            self._webhooks[domain, name] = Webhook(domain, name, tuple(urls), since)

    async def add_calls(self, calls: Sequence[PendingCall], *, seen: int) -> None:
        for call in calls:
            number = next(self._numbers)
            self._calls[number] = replace(call, number=number)
        self._seen = seen

    async def calls_seen(self) -> int:
        return self._seen

    async def calls_due(
        self, *, now: datetime, limit: int, besides: Collection[str] = ()
    ) -> list[PendingCall]:
        due = [one for one in self._calls.values() if one.due <= now and one.url not in besides]
        return sorted(due, key=lambda one: one.due)[:limit]

    async def next_call_due(self) -> datetime | None:
        return min((one.due for one in self._calls.values()), default=None)

    async def settle_call(self, call: PendingCall, *, due: datetime | None) -> None:
        old = self._calls.pop(call.number)
        if due is not None:
            self._calls[call.number] = replace(old, due=due, attempts=old.attempts + 1)
