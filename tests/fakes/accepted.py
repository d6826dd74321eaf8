"""A message in a store, for tests of what is told about it."""

from __future__ import annotations

from dataclasses import replace

from relay.queue.sqlite.store import SqliteStore
from relay.queue.store import NewMessage
from relay.report import deliverylog
from tests.fakes.mail import CONTENT, entry


async def accept(store: SqliteStore, queue_id: str, sender: str) -> None:
    """Accept a message, with its event."""
    one = entry(reverse_path=sender)
    message = replace(one.message, queue_id=queue_id)
    event = deliverylog.accepted(message, one.recipients)
    await store.accept(NewMessage(message, one.recipients, CONTENT, events=(event,)))
