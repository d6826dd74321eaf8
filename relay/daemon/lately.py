"""Which domains took mail at once before a restart, from the events of the last hour. †

Domains that answered lately have slots for attempts and for look-ups to themselves
(`relay.deliver.slots`, `relay.route.dns`). A relay that forgot them at a restart would try what is
in its queue first: with thousands of dead domains in it, mail for all others waited for a minute.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

from relay.deliver import pacing
from relay.queue.store import EventFilter, EventPage, QueueView, SpoolError

log = logging.getLogger(__name__)

_SPAN = timedelta(hours=1)
_MOST_EVENTS = 5000
_PAGE = 1000
_PATIENCE = timedelta(seconds=0.2)
_SECONDS = 2.0
"""How long a start may take longer for this."""


class Lately(NamedTuple):
    """A domain that took mail, and the host that took it."""

    domain: str
    host: str


async def served_lately(store: QueueView, *, now: datetime) -> list[Lately]:
    """The domains whose last delivery within the hour was prompt, the latest last."""
    wanted = EventFilter(begin=now - _SPAN, names=frozenset({"delivered"}))
    found: dict[str, Lately] = {}
    after = events = 0
    try:
        async with asyncio.timeout(_SECONDS):
            while events < _MOST_EVENTS:
                before = EventPage(after, _PAGE, ascending=False, patience=_PATIENCE)
                page = await store.find_events(wanted, before)
                if not page:
                    break
                for stored in page:
                    event = json.loads(stored.event.line)
                    status, domain = event["delivery-status"], event["recipient-domain"].lower()
                    if (status.get("session-seconds") or 0.0) < pacing.LONG.total_seconds():
                        found.setdefault(domain, Lately(domain, status.get("mx-host") or ""))
                after, events = page[-1].seq, events + len(page)
    except (SpoolError, TimeoutError) as error:
        log.info("which domains took mail lately is not known in full: %s", error or "no time")
    return list(reversed(found.values()))


def names_to_look_up(served: Iterable[Lately]) -> list[str]:
    """The names that an attempt for such a domain looks up."""
    return [
        name
        for domain, host in served
        for name in (domain, f"_mta-sts.{domain}", host, f"_25._tcp.{host}" if host else "")
        if name
    ]
