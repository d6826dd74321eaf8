"""What the filters of `relay.queue.store` mean, for the store in memory."""

from __future__ import annotations

from datetime import datetime

from relay.mail.address import domain_spellings, spellings
from relay.queue.entry import QueuedMessage, QueuedRecipient
from relay.queue.store import QueueFilter


def message_matches(message: QueuedMessage, wanted: QueueFilter, now: datetime) -> bool:
    return (
        (not wanted.queue_ids or message.queue_id in wanted.queue_ids)
        and (not wanted.sender or message.reverse_path.lower() in spellings(wanted.sender))
        and (wanted.older_than is None or message.arrived <= now - wanted.older_than)
    )


def recipient_matches(one: QueuedRecipient, wanted: QueueFilter) -> bool:
    return (not wanted.domain or one.domain.lower() in domain_spellings(wanted.domain)) and (
        wanted.state is None or one.state is wanted.state
    )
