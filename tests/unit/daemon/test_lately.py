"""Which domains took mail at once before a restart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from relay.daemon.lately import Lately, names_to_look_up, served_lately
from relay.mail.event import Event
from relay.queue.store import EventFilter, EventPage, QueueView, SpoolError, StoredEvent

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Events:
    """Deliveries, the earliest first: domain, host, seconds."""

    def __init__(self, *deliveries: tuple[str, str | None, float | None]) -> None:
        self.deliveries = deliveries
        self.asked: list[EventFilter] = []
        self.trouble: Exception | None = None

    async def find_events(self, wanted: EventFilter, page: EventPage) -> Sequence[StoredEvent]:
        assert not page.ascending
        self.asked.append(wanted)
        if self.trouble is not None:
            raise self.trouble
        numbers = range((page.after or len(self.deliveries) + 1) - 1, 0, -1)
        return [self._event(number) for number in list(numbers)[: min(page.limit, 2)]]

    def _event(self, number: int) -> StoredEvent:
        domain, host, seconds = self.deliveries[number - 1]
        status = {"mx-host": host, "session-seconds": seconds}
        line = json.dumps({"recipient-domain": domain, "delivery-status": status})
        return StoredEvent(number, Event("", NOW, "delivered", "", "", f"a@{domain}", line))


async def lately(events: Events) -> list[Lately]:
    return await served_lately(cast(QueueView, events), now=NOW)


async def test_domains_that_took_mail_promptly_are_known_the_latest_last() -> None:
    events = Events(
        ("a.example", "mx.a.example", 0.1),
        ("slow.example", "mx.slow.example", 9.0),
        ("B.example", None, None),
        ("a.example", "mx2.a.example", 0.2),
        ("c.example", "mx.c.example", 0.1),
    )
    assert await lately(events) == [
        ("b.example", ""),
        ("a.example", "mx2.a.example"),
        ("c.example", "mx.c.example"),
    ]
    assert {(one.names, one.begin) for one in events.asked} == {
        (frozenset({"delivered"}), NOW - timedelta(hours=1))
    }


@pytest.mark.parametrize("trouble", [SpoolError("no disk"), TimeoutError()])
async def test_a_relay_starts_although_its_events_cannot_be_read(trouble: Exception) -> None:
    events = Events(("a.example", "mx.a.example", 0.1))
    events.trouble = trouble
    assert await lately(events) == []


def test_the_names_of_a_domain_are_those_that_an_attempt_looks_up() -> None:
    assert names_to_look_up([Lately("a.example", "mx.a.example"), Lately("b.example", "")]) == [
        "a.example",
        "_mta-sts.a.example",
        "mx.a.example",
        "_25._tcp.mx.a.example",
        "b.example",
        "_mta-sts.b.example",
    ]
