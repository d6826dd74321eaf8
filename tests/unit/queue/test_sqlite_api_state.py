"""What the HTTP interface keeps beside the queue: durable, and in nobody's way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from relay.queue.api_state import DomainSettings, PendingCall, Webhook
from relay.queue.entry import State, Terms
from relay.queue.sqlite import SqliteStore, StoppedQueue
from relay.queue.store import EventFilter, NewMessage, QueueFilter
from relay.report import deliverylog
from tests.fakes.mail import ARRIVED, CONTENT, entry

URL = "https://hooks.example/a"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "spool", now=ARRIVED, synchronous="OFF")
    yield opened
    await opened.close()


async def reopened(store: SqliteStore, directory: Path) -> SqliteStore:
    await store.close()
    return await SqliteStore.open(directory / "spool", now=ARRIVED, synchronous="OFF")


async def test_the_settings_of_a_domain_survive_a_restart_and_are_set_one_by_one(store, tmp_path):
    assert await store.api_state.domain_settings() == {}
    await store.api_state.set_domain_settings("a.example", DomainSettings(require_tls=True))
    both = await store.api_state.set_domain_settings(
        "a.example", DomainSettings(skip_verification=False)
    )
    assert both == DomainSettings(True, False)
    await store.close()
    async with await StoppedQueue.open(tmp_path / "spool") as stopped:
        assert await stopped.domain_settings() == {"a.example": DomainSettings(True, False)}


async def test_a_webhook_is_replaced_and_removed(store):
    await store.api_state.set_webhook("a.example", "delivered", [URL])
    await store.api_state.set_webhook("a.example", "delivered", [URL, "https://hooks.example/b"])
    assert await store.api_state.webhooks() == [
        Webhook("a.example", "delivered", (URL, "https://hooks.example/b"), since=0)
    ]
    await store.api_state.set_webhook("a.example", "delivered", [])
    assert await store.api_state.webhooks() == []


async def test_a_call_is_owed_across_a_restart_until_it_is_settled(store, tmp_path):
    await store.api_state.add_calls([PendingCall(URL, "{}", ARRIVED)], seen=7)
    store = await reopened(store, tmp_path)
    assert await store.api_state.calls_seen() == 7
    [call] = await store.api_state.calls_due(now=ARRIVED, limit=10)
    later = ARRIVED + timedelta(minutes=5)
    await store.api_state.settle_call(call, due=later)
    assert await store.api_state.calls_due(now=ARRIVED, limit=10) == []
    assert await store.api_state.next_call_due() == later
    [call] = await store.api_state.calls_due(now=later, limit=10)
    assert call.attempts == 1
    await store.api_state.settle_call(call, due=None)
    assert await store.api_state.next_call_due() is None
    await store.close()


def _message(queue_id: str, sender: str, **terms) -> NewMessage:
    one = entry(reverse_path=sender)
    message = replace(one.message, queue_id=queue_id, terms=Terms(**terms))
    return NewMessage(
        message, one.recipients, CONTENT, events=(deliverylog.accepted(message, one.recipients),)
    )


async def test_a_message_that_is_for_nobody_is_told_of_and_leaves_nothing_behind(store):
    new = _message("Q1", "a@a.example", is_test=True)
    done = tuple(
        type(one)(0, one.address, one.domain, one.settings, state=State.DELIVERED)
        for one in new.recipients
    )
    await store.accept(NewMessage(new.message, done, CONTENT, events=new.events))
    assert await store.claim_due(now=ARRIVED, limit=10) == []
    assert await store.list_messages(QueueFilter(), now=ARRIVED) == []
    assert len(await store.events_after(0)) == 1
    assert set((await store.counts()).values()) == {0}


async def test_events_are_found_by_the_domain_of_the_sender_and_by_what_they_tell(store):
    await store.accept(_message("Q1", "a@A.example", tags=("news",)))
    await store.accept(_message("Q2", "a@sub.a.example", tags=("news",)))
    await store.accept(_message("Q3", "a@b.example"))

    async def found(**wanted):
        return [one.event.queue_id for one in await store.find_events(EventFilter(**wanted))]

    assert await found(sender_domain="a.example") == ["Q1"]
    assert await found(fields=(("tag", "news"),)) == ["Q1", "Q2"]
    assert await found(fields=(("tag", "news"), ("severity", "permanent"))) == []
    assert await found(fields=(("message-id", "x"),)) == []
