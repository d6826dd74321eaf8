"""The first worker's view of all workers' queues, for the HTTP interface.

What is looked at is read from the other workers' databases, over connections that cannot write; what
is changed is changed by each worker itself, asked through its control socket. Everything else is the
first worker's own: mail that comes over HTTP is taken by it.

The numbers of events are each queue's own. Here an event goes by its time in microseconds, and a page
ends with all events of its last microsecond, so that none is lost between two pages; an
event that commits later than another worker's younger one can be missed by who polls without a pause.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

from relay.admin.control import RequestError
from relay.admin.fleet import Peer
from relay.admin.operations import Readable
from relay.mail.event import Event
from relay.queue.entry import State
from relay.queue.rows import micros, moment
from relay.queue.sqlite.reader import Reader
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    QueuedItem,
    QueueFilter,
    SpoolError,
    Store,
    StoredEvent,
)

__all__ = ["WholeQueue"]


class _Queue(Readable, Protocol):
    async def counts(self) -> Mapping[State, int]: ...


class WholeQueue:
    """The first worker's store, except for what is asked of all."""

    def __init__(self, own: Store, others: Sequence[Reader], peers: Sequence[Peer]) -> None:
        self._own = own
        self._queues: Sequence[_Queue] = (own, *others)
        self._peers = peers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    async def counts(self) -> Mapping[State, int]:
        """Recipients in each state that is not final."""
        total: Counter[State] = Counter()
        for queue in self._queues:
            total.update(await queue.counts())
        return total

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[QueuedItem]:
        """A page of the messages that match, by queue id."""
        pages = await asyncio.gather(
            *(queue.list_messages(wanted, now=now, after=after, limit=limit) for queue in self._queues)
        )
        found = [item for page in pages for item in page]
        return sorted(found, key=lambda item: item.message.queue_id)[:limit]

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section, wherever the message is."""
        trouble: SpoolError | None = None
        for queue in self._queues:
            try:
                return await queue.read_header(queue_id, limit_bytes=limit_bytes)
            except SpoolError as error:
                trouble = trouble or error
        assert trouble is not None
        raise trouble

    async def change(
        self, wanted: QueueFilter, *, verb: str, now: datetime, events: Sequence[Event] = ()
    ) -> int:
        """The operator's verb, done by each worker to what it has."""
        changed = await self._own.change(wanted, verb=verb, now=now, events=events)
        request = _request(verb, wanted)
        for peer in self._peers:
            try:
                lines = [line async for line in peer.answer(request)]
            except RequestError as error:
                raise SpoolError(str(error)) from error
            changed += lines[-1]["done"]["changed"]
        return changed

    async def find_events(
        self, wanted: EventFilter, *, after: int = 0, limit: int = 300, ascending: bool = True
    ) -> list[StoredEvent]:
        """A page of the events that match, by time."""
        if after and ascending:
            wanted = replace(wanted, begin=max(moment(after + 1), wanted.begin or moment(0)))
        elif after:
            last = moment(after - 1)
            wanted = replace(wanted, end=min(last, wanted.end or last))
        found = (await self._events(wanted, limit, ascending))[:limit]
        if len(found) == limit:
            end = moment(found[-1].seq)
            found = [one for one in found if one.seq != found[-1].seq]
            found += await self._events(replace(wanted, begin=end, end=end), 1_000_000, ascending)
        return found

    async def _events(self, wanted: EventFilter, limit: int, ascending: bool) -> list[StoredEvent]:
        pages = await asyncio.gather(
            *(queue.find_events(wanted, limit=limit, ascending=ascending) for queue in self._queues)
        )
        found = [StoredEvent(micros(one.event.at), one.event) for page in pages for one in page]
        return sorted(found, key=lambda one: one.seq, reverse=not ascending)


def _request(verb: str, wanted: QueueFilter) -> dict[str, Any]:
    """The control socket's words for a change."""
    said: dict[str, Any] = {
        "ids": sorted(wanted.queue_ids),
        "domain": wanted.domain,
        "sender": wanted.sender,
        "older-than": wanted.older_than.total_seconds() if wanted.older_than else None,
        "state": wanted.state.value if wanted.state else None,
    }
    request = {"verb": verb, **{key: value for key, value in said.items() if value}}
    return request if len(request) > 1 else {**request, "all": True}
