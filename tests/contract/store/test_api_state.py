"""What the HTTP interface keeps beside the queue."""

from __future__ import annotations

from datetime import timedelta

from relay.queue.api_state import DomainSettings, PendingCall, Webhook
from tests.fakes.queued import NOW

URL = "https://hooks.example/a"


async def test_webhook_is_replaced_and_removed(store):
    await store.api_state.set_webhook("a.example", "delivered", [URL])
    await store.api_state.set_webhook("a.example", "delivered", [URL, "https://hooks.example/b"])
    assert await store.api_state.webhooks() == [
        Webhook("a.example", "delivered", (URL, "https://hooks.example/b"), since=0)
    ]
    await store.api_state.set_webhook("a.example", "delivered", [])
    assert await store.api_state.webhooks() == []


async def test_domain_settings_survive_a_restart_and_are_set_one_by_one(engine):
    async with engine.opened() as store:
        assert await store.api_state.domain_settings() == {}
        await store.api_state.set_domain_settings("a.example", DomainSettings(require_tls=True))
        skip = DomainSettings(skip_verification=False)
        both = await store.api_state.set_domain_settings("a.example", skip)
        assert both == DomainSettings(True, False)
    async with engine.opened() as store:
        assert await store.api_state.domain_settings() == {"a.example": both}


async def test_webhook_call_stays_over_a_restart_until_it_is_settled(engine):
    async with engine.opened() as store:
        await store.api_state.add_calls([PendingCall(URL, "{}", NOW)], seen=7)
    async with engine.opened() as store:
        assert await store.api_state.calls_seen() == 7
        [call] = await store.api_state.calls_due(now=NOW, limit=10)
        later = NOW + timedelta(minutes=5)
        await store.api_state.settle_call(call, due=later)
        assert await store.api_state.calls_due(now=NOW, limit=10) == []
        assert await store.api_state.next_call_due() == later
        [call] = await store.api_state.calls_due(now=later, limit=10)
        assert call.attempts == 1
        await store.api_state.settle_call(call, due=None)
        assert await store.api_state.next_call_due() is None
