"""Messages for a store, and what attempts make of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from relay.mail.event import Event
from relay.mail.outcome import Bounced, Deferred, Delivered, Outcome
from relay.policy.settings import Setting, Source, TlsSettings
from relay.queue.entry import (
    Entry,
    LastAttempt,
    MessageSummary,
    QueuedMessage,
    QueuedRecipient,
    State,
)
from relay.queue.queue_id import new_queue_id
from relay.queue.settle import Change, Settlement
from relay.queue.sqlite import SqliteStore
from relay.queue.store import NewMessage

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SETTINGS = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.DOMAIN, "example.com"))
CONTENT = b"Subject: hello\r\nFrom: a@example.com\r\n\r\nbody\r\n"

DELIVERED = Delivered("2.0.0", 250, "2.0.0 OK")
DEFERRED = Deferred("4.2.1", 450, "mailbox busy")
BOUNCED = Bounced("5.1.1", 550, "no such user")

_STATES = {Delivered: State.DELIVERED, Deferred: State.DEFERRED, Bounced: State.BOUNCED}


@contextlib.asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[SqliteStore]:
    """A real store, closed at the end; without syncs, which no test of its promises waits for."""
    wanted: dict[str, Any] = {"now": NOW, "synchronous": "OFF"} | options
    store = await SqliteStore.open(directory, **wanted)
    try:
        yield store
    finally:
        await store.close()


def new_message(
    *recipients: str,
    queue_id: str = "",
    content: bytes = CONTENT,
    sender: str = "a@example.com",
    arrived: datetime = NOW,
    state: State = State.QUEUED,
    due: datetime | None = None,
    staged_bytes: int = 0,
    events: tuple[Event, ...] = (),
    origin: str = "smtp",
) -> NewMessage:
    """A message for some addresses, `b@example.net` unless told otherwise."""
    addresses = recipients or ("b@example.net",)
    message = QueuedMessage(
        queue_id=queue_id or new_queue_id(arrived),
        reverse_path=sender,
        arrived=arrived,
        size_bytes=len(content) + staged_bytes,
        summary=MessageSummary("<1@example.com>", sender, addresses[0], "hello"),
        origin=origin,
    )
    queued = tuple(
        QueuedRecipient(
            index, address, address.rpartition("@")[2], SETTINGS, state=state, next_attempt=due
        )
        for index, address in enumerate(addresses)
    )
    return NewMessage(message, queued, content, staged_bytes, events)


def event(
    name: str, queue_id: str, recipient: str = "", *, at: datetime = NOW, number: int = 0
) -> Event:
    """A line of the delivery log."""
    return Event(
        f"{queue_id}.{name}.{number}",
        at,
        name,
        queue_id,
        "a@example.com",
        recipient,
        f'{{"event":"{name}"}}',
    )


def settled(
    entry: Entry, *outcomes: Outcome, at: datetime = NOW, wait: timedelta = timedelta(minutes=5)
) -> Settlement:
    """What an attempt leaves: an outcome for each recipient, the last for all that follow."""
    changes = []
    for number, before in enumerate(entry.recipients):
        outcome = outcomes[min(number, len(outcomes) - 1)]
        state = _STATES[type(outcome)]
        after = replace(
            before,
            state=state,
            attempts=before.attempts + 1,
            next_attempt=at + wait if state is State.DEFERRED else None,
            last=LastAttempt(at, outcome.code, outcome.status, outcome.message, "mx.example.net"),
            first_attempt=before.first_attempt or at,
        )
        changes.append(Change(after, outcome, outcome.code, outcome.status))
    return Settlement(entry, at, tuple(changes))


class HasContent(Protocol):
    """A queue, running or stopped."""

    def read_content(self, queue_id: str) -> AsyncIterator[bytes]: ...


async def content_of(store: HasContent, queue_id: str) -> bytes:
    """All of a message's content."""
    return b"".join([piece async for piece in store.read_content(queue_id)])
