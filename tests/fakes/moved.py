"""A queue with a message of every kind, and all that can be seen of a queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from relay.mail.envelope import Notify, Ret
from relay.queue.entry import State, Terms
from relay.queue.store import NewMessage, QueueFilter, QueueView, Store
from tests.fakes.queued import (
    BOUNCED,
    DEFERRED,
    DELIVERED,
    NOW,
    content_of,
    holding,
    new_message,
    settled,
)

LARGE = b"Subject: large\r\n\r\n" + bytes(range(256)) * 4000
"""Beyond what either engine keeps in a row; with every octet."""

EVERY_KIND = ("deferred", "held", "large", "partly", "pending", "ready", "terms")


async def fill(store: Store) -> None:
    """A message of every kind, each called by it."""
    await store.accept(new_message("b@partly.example", "c@partly2.example", queue_id="partly"))
    await store.accept(new_message("b@deferred.example", queue_id="deferred"))
    await store.accept(new_message("b@pending.example", "c@pending2.example", queue_id="pending"))
    for entry in await store.claim_due(now=NOW, limit=100):
        match entry.domain:
            case "partly.example":
                await store.record(settled(entry, DELIVERED))
            case "pending.example":
                await store.record(holding(entry, BOUNCED))
            case "pending2.example":
                await store.record(holding(entry, DEFERRED))
            case _:
                await store.record(settled(entry, DEFERRED, wait=timedelta(minutes=30)))
    await store.accept(new_message(queue_id="ready"))
    await store.accept(new_message(queue_id="held", state=State.HELD, sender=""))
    await store.accept(new_message(queue_id="large", content=LARGE))
    await store.accept(with_terms())


def with_terms() -> NewMessage:
    """A message of which everything was asked that can be."""
    new = new_message(queue_id="terms")
    terms = Terms(
        NOW + timedelta(hours=3),
        timedelta(hours=9),
        ("billing", "ü"),
        (("order", "4711"),),
        is_signed=False,
        next_hop="provider",
    )
    message = replace(
        new.message,
        terms=terms,
        requiretls=True,
        ret=Ret.HDRS,
        envid="env",
        smtputf8=True,
        client="client.example [192.0.2.1]",
        client_user="app1",
    )
    [one] = new.recipients
    asked = replace(
        one,
        notify=frozenset({Notify.FAILURE, Notify.DELAY}),
        orcpt="rfc822;b@example.net",
        next_attempt=NOW + timedelta(hours=3),
    )
    return replace(new, message=message, recipients=(asked,))


async def seen(store: Store | QueueView) -> Mapping[str, Any]:
    """All that a queue has of each message; what is due, whether it waits or is ready."""
    found = {}
    for listed in await store.list_messages(QueueFilter(), now=NOW):
        item = await store.find_message(listed.queue_id)
        content = await content_of(store, listed.queue_id)
        pending = await store.pending_report(listed.queue_id)  # type: ignore[union-attr]
        found[listed.queue_id] = (item, content, pending)
    return found
