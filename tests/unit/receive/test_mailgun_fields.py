"""Mailgun's header fields over SMTP: what is in the queue and in the delivery log then."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import QueueFilter

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest.fixture
async def store(desk, tmp_path):
    desk.store = await SqliteStore.open(tmp_path, synchronous="OFF")
    desk.now = lambda: NOW
    yield desk.store
    await desk.store.close()


async def said_to(desk, content: bytes) -> str:
    client = await desk.client()
    await client.begin("a@example.com", "b@example.net", "c@example.org")
    said: str = await client.data(content + b"\r\n.\r\n")
    return said


async def told(store: SqliteStore) -> list[dict[str, Any]]:
    return [json.loads(one.event.line) for one in await store.events_after(0)]


@pytest.mark.parametrize("size", [10, 600_000])
async def test_message_in_test_mode_has_its_events_and_is_delivered_to_nobody(
    desk, store, tmp_path, size
):
    text = b"x" * 60 + b"\r\n"
    content = b"Subject: x\r\nX-Mailgun-Drop-Message: yes\r\nX-Mailgun-Tag: try\r\n\r\n"
    assert (await said_to(desk, content + text * (size // 62))).startswith("250 ")
    assert await store.list_messages(QueueFilter(), now=NOW) == []
    assert await store.claim_due(now=NOW + timedelta(days=9), limit=10) == []
    events = await told(store)
    assert [one["event"] for one in events] == ["accepted", "delivered", "delivered"]
    assert [one["recipient"] for one in events[1:]] == ["b@example.net", "c@example.org"]
    assert {one["delivery-status"]["code"] for one in events[1:]} == {650}
    assert [one["tags"] for one in events] == [["try"]] * 3
    assert [file for file in (tmp_path / "content").rglob("*") if file.is_file()] == []


async def test_a_message_for_later_is_due_then_with_its_tags_and_variables(desk, store):
    content = (
        b"Subject: x\r\nX-Mailgun-Deliver-By: Fri, 20 Nov 2026 13:00:00 +0000\r\n"
        b'X-Mailgun-Variables: {"order": "4711"}\r\nX-Mailgun-Deliver-Within: 30m\r\n\r\ntext'
    )
    assert (await said_to(desk, content)).startswith("250 ")
    assert await store.claim_due(now=NOW, limit=10) == []
    later = NOW + timedelta(hours=1)
    entries = await store.claim_due(now=later, limit=10)
    assert [entry.domain for entry in entries] == ["example.net", "example.org"]
    terms = entries[0].message.terms
    assert (terms.not_before, terms.lifetime) == (later, timedelta(minutes=30))
    assert terms.variables == (("order", "4711"),)
    pieces = [piece async for piece in store.read_content(entries[0].message.queue_id)]
    assert b"X-Mailgun" not in b"".join(pieces)
    assert (await told(store))[0]["user-variables"] == {"order": "4711"}


async def test_a_field_that_asks_for_what_the_relay_cannot_do_is_refused(desk, store):
    said = await said_to(desk, b"X-Mailgun-Recipient-Variables: {}\r\n\r\ntext")
    assert said == '554 5.6.0 X-Mailgun-Recipient-Variables: "{}" is not supported by this relay'
    assert await told(store) == []


async def test_text_of_any_size_behind_an_empty_line_is_looked_at_and_arrives_whole(desk, store):
    text = b"".join(b"line %d\r\n" % n for n in range(60_000))
    assert (await said_to(desk, b"\r\n" + text)).startswith("250 ")
    [entry, _] = await store.claim_due(now=NOW, limit=10)
    pieces = [piece async for piece in store.read_content(entry.message.queue_id)]
    assert b"".join(pieces).endswith(b"\r\n\r\n" + text + b"\r\n")
    said = await said_to(desk, b"\r\nX-Require-TLS: yes\r\n\r\n" + text)
    assert said.startswith("554 5.6.0 X-Require-TLS")
