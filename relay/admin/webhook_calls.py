"""Which calls webhooks are to get about events. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from relay.mail.address import AddressError, domain_of
from relay.queue.api_state import PendingCall, Webhook
from relay.queue.store import StoredEvent
from relay.report.webhook import kind_of


def calls_about(
    webhooks: Sequence[Webhook], events: Sequence[StoredEvent], *, now: datetime
) -> list[PendingCall]:
    """The calls about these events, each due now."""
    return [call for stored in events for call in _calls_for(webhooks, stored, now)]


def _calls_for(
    webhooks: Sequence[Webhook], stored: StoredEvent, now: datetime
) -> Iterator[PendingCall]:
    event = stored.event
    try:
        domain = domain_of(event.sender)
    except AddressError:
        return
    for webhook in webhooks:
        if (
            webhook.domain == domain
            and webhook.since < stored.seq
            and webhook.name == kind_of(event)
        ):
            for url in webhook.urls:
                yield PendingCall(url, event.line, now)
