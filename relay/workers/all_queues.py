"""The queues of all workers looked at as one: by socket, HTTP and, where none runs, command line.

Each queue is read from its own database, over a connection that cannot write; so a worker that is
just starting again hides nothing. A queue that cannot be read makes the whole question fail with
`SpoolError`: half an answer never looks like a whole one.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import date, datetime

from relay.queue.destinations import DestinationPart
from relay.queue.entry import State
from relay.queue.event_search import Streams
from relay.queue.nodes import Node
from relay.queue.statistics import (
    FIRST_EXCEPTIONS,
    CountedException,
    CountedMail,
    CountFilter,
    ExceptionPage,
    HourlyCount,
    added_up,
)
from relay.queue.store import (
    CHUNK_BYTES,
    ListedMessage,
    QueuedItem,
    QueueFilter,
    QueueView,
    SpoolError,
    more_follows,
)
from relay.queue.tls_sessions import CountedSessions, DomainSessions, sessions_added_up


class AllQueues:
    """A `QueueView` of several queues."""

    def __init__(self, queues: Sequence[QueueView]) -> None:
        self._queues = queues
        self.find_events = Streams(queues).find_events

    async def counts(self) -> Mapping[State, int]:
        """Recipients in each state that is not final."""
        total: Counter[State] = Counter()
        for queue in self._queues:
            total.update(await queue.counts())
        return total

    async def nodes(self) -> list[Node]:
        """The workers of one machine are no nodes."""
        return await self._queues[0].nodes()

    async def count_destinations(self, after: str) -> tuple[list[DestinationPart], str | None]:
        """The next step of a count by domain: one queue after the other."""
        number, _, within = after.partition("/")
        here = int(number or 0)
        parts, until = await self._queues[here].count_destinations(within)
        if until is not None:
            return parts, f"{here}/{until}"
        return parts, f"{here + 1}/" if here + 1 < len(self._queues) else None

    async def list_messages(
        self, wanted: QueueFilter, *, now: datetime, after: str = "", limit: int = 1000
    ) -> list[ListedMessage]:
        """A page of the messages that match, by queue id."""
        found: list[ListedMessage] = []
        reached: str | None = after
        while reached is not None and not more_follows(found, limit):
            # Of each queue its share of the page: the rest of a whole page would be read in vain.
            some = (limit - len(found)) // len(self._queues) + 1
            pages = await asyncio.gather(
                *(
                    queue.list_messages(wanted, now=now, after=reached, limit=some)
                    for queue in self._queues
                )
            )
            following, reached = _in_order(pages, some)
            found += following
        return found[:limit]

    async def count_mail(self, wanted: CountFilter) -> list[CountedMail]:
        """The counts of a period, added up over its hours and over all workers."""
        return added_up([await queue.count_mail(wanted) for queue in self._queues])

    async def count_hours(self, wanted: CountFilter) -> list[HourlyCount]:
        """The counts of a period by the hour."""
        sums: Counter[tuple[datetime, str, str]] = Counter()
        for queue in self._queues:
            for hour, result, protection, number in await queue.count_hours(wanted):
                sums[hour, result, protection] += number
        return [HourlyCount(*key, number) for key, number in sorted(sums.items())]

    async def find_exceptions(
        self, wanted: CountFilter, page: ExceptionPage = FIRST_EXCEPTIONS
    ) -> list[CountedException]:
        """A page of the exceptions by time."""
        found = [one for queue in self._queues for one in await queue.find_exceptions(wanted, page)]
        return sorted(found, reverse=page.newest)[: page.limit]

    async def tls_days(self) -> list[date]:
        """The days of which sessions are kept."""
        return sorted({day for queue in self._queues for day in await queue.tls_days()})

    async def tls_domains(
        self, day: date, *, after: str = "", limit: int = 500
    ) -> list[DomainSessions]:
        """A page of the domains that had sessions in a day."""
        sums: dict[str, DomainSessions] = {}
        for queue in self._queues:
            for domain, successful, failed in await queue.tls_domains(
                day, after=after, limit=limit
            ):
                _, before, failed_before = sums.get(domain, (domain, 0, 0))
                sums[domain] = DomainSessions(domain, before + successful, failed_before + failed)
        return [sums[domain] for domain in sorted(sums)[:limit]]

    async def tls_sessions(self, day: date, domain: str) -> list[CountedSessions]:
        """The sessions of a day and domain, of all workers."""
        return sessions_added_up([await queue.tls_sessions(day, domain) for queue in self._queues])

    async def find_message(self, queue_id: str) -> QueuedItem | None:
        """All that is kept about one message, wherever it is."""
        found = await self._find(queue_id)
        return None if found is None else found[1]

    async def read_header(self, queue_id: str, *, limit_bytes: int = CHUNK_BYTES) -> bytes:
        """The header section, wherever the message is."""
        queue = await self._queue_of(queue_id)
        return await queue.read_header(queue_id, limit_bytes=limit_bytes)

    async def read_content(self, queue_id: str) -> AsyncIterator[bytes]:
        """The content, wherever the message is."""
        queue = await self._queue_of(queue_id)
        async for piece in queue.read_content(queue_id):
            yield piece

    async def _queue_of(self, queue_id: str) -> QueueView:
        found = await self._find(queue_id)
        if found is None:
            raise SpoolError(f"{queue_id}: there is no such message")
        return found[0]

    async def _find(self, queue_id: str) -> tuple[QueueView, QueuedItem] | None:
        """A message and its queue. A queue that cannot be read matters where no other has it."""
        trouble: SpoolError | None = None
        for queue in self._queues:
            try:
                if (found := await queue.find_message(queue_id)) is not None:
                    return queue, found
            except SpoolError as error:
                trouble = error
        if trouble is not None:
            raise trouble
        return None


def _in_order(
    pages: Sequence[Sequence[ListedMessage]], limit: int
) -> tuple[list[ListedMessage], str | None]:
    """The messages of several pages up to where all reach; and that place, None: the end."""
    found = sorted((item for page in pages for item in page), key=lambda item: item.queue_id)
    # Behind the end of a full page its queue may have more, which come first.
    reached = min((page[-1].queue_id for page in pages if more_follows(page, limit)), default=None)
    return [item for item in found if reached is None or item.queue_id <= reached], reached
