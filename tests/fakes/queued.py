"""Messages for a store, and what attempts make of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
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
from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import DeliveryQueue, NewMessage, QueueFilter, QueueView, Store

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
SETTINGS = TlsSettings(Setting(True, Source.MESSAGE), Setting(False, Source.DOMAIN, "example.com"))
CONTENT = b"Subject: hello\r\nFrom: a@example.com\r\n\r\nbody\r\n"

MINUTE = timedelta(minutes=1)
WAIT = timedelta(minutes=5)
ALL = QueueFilter()

REPORT_WINDOW = timedelta(minutes=4)
"""How long a pending report waits for other attempts that are due."""

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
    entry: Entry, *outcomes: Outcome, at: datetime = NOW, wait: timedelta = WAIT
) -> Settlement:
    """What an attempt leaves: an outcome for each recipient, the last for all that follow."""
    changes = []
    for number, before in enumerate(entry.recipients):
        outcome = outcomes[min(number, len(outcomes) - 1)]
        state, text = _STATES[type(outcome)], outcome.message or outcome.description
        after = replace(
            before,
            state=state,
            attempts=before.attempts + 1,
            next_attempt=at + wait if state is State.DEFERRED else None,
            last=LastAttempt(at, outcome.code, outcome.status, text, "mx.example.net"),
            first_attempt=before.first_attempt or at,
        )
        changes.append(Change(after, outcome, outcome.code, outcome.status))
    return Settlement(entry, at, tuple(changes))


async def claim_all(
    queue: DeliveryQueue, *, now: datetime = NOW, skip: Collection[str] = ()
) -> list[Entry]:
    """Everything that is due."""
    entries: list[Entry] = []
    while more := await queue.claim_due(now=now, limit=100, skip=skip):
        entries += more
    return entries


async def queue_ids(view: QueueView) -> list[str]:
    """The messages of the queue, or those that match."""
    return [listed.queue_id for listed in await view.list_messages(ALL, now=NOW)]


async def some_messages(store: Store) -> None:
    """Four messages, of different age, sender, domain and state."""
    hour = timedelta(hours=1)
    await store.accept(new_message("a@one.example", queue_id="q0", arrived=NOW - 3 * hour))
    await store.accept(
        new_message("a@one.example", "b@two.example", queue_id="q1", arrived=NOW - hour)
    )
    await store.accept(new_message("b@two.example", queue_id="q2", sender="other@example.com"))
    await store.accept(new_message("c@three.example", queue_id="q3", sender="", state=State.HELD))


async def entries_of(store: Store, *recipients: str) -> list[Entry]:
    """The entries of a message that was just accepted, claimed."""
    await store.accept(new_message(*recipients))
    return await store.claim_due(now=NOW, limit=100)


def holding(entry: Entry, outcome: Outcome, *, at: datetime = NOW) -> Settlement:
    """An attempt whose results, a deferral too, are reported later."""
    settlement = settled(entry, outcome, at=at)
    changes = tuple(
        change
        if change.recipient.state.is_final
        else replace(change, recipient=replace(change.recipient, delay_notified=True))
        for change in settlement.changes
    )
    return replace(settlement, changes=changes, pending=changes, report_after=at + REPORT_WINDOW)


class HasContent(Protocol):
    """A queue, running or stopped."""

    def read_content(self, queue_id: str) -> AsyncIterator[bytes]: ...


async def content_of(store: HasContent, queue_id: str) -> bytes:
    """All of a message's content."""
    return b"".join([piece async for piece in store.read_content(queue_id)])
