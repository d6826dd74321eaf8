"""The queues of all workers looked at as one: by socket, HTTP and, where none runs, command line.

Each queue is read from its own database, over a connection that cannot write; so a worker that is
just starting again hides nothing. A queue that cannot be read makes the whole question fail with
`SpoolError`: half an answer never looks like a whole one.

The numbers of events are each queue's own, in the order of its commits, which is not always that of
time. A listing takes the queues' events in that order and goes on with whichever is next in time.
The number of an event is the place in every queue at which the listing has just given it, written
as one number: a listing that goes on from there misses no event and repeats none, however late a
queue commits.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import date, datetime, timedelta

from relay.queue.destinations import DestinationPart
from relay.queue.entry import State
from relay.queue.statistics import (
    CountedException,
    CountedMail,
    CountFilter,
    HourlyCount,
    added_up,
)
from relay.queue.store import (
    CHUNK_BYTES,
    EventFilter,
    ListedMessage,
    QueuedItem,
    QueueFilter,
    QueueView,
    SpoolError,
    StoredEvent,
    more_follows,
)
from relay.queue.tls_sessions import CountedSessions, DomainSessions, sessions_added_up

__all__ = ["AllQueues"]


class AllQueues:
    """A `QueueView` of several queues."""

    def __init__(self, queues: Sequence[QueueView]) -> None:
        self._queues = queues

    async def counts(self) -> Mapping[State, int]:
        """Recipients in each state that is not final."""
        total: Counter[State] = Counter()
        for queue in self._queues:
            total.update(await queue.counts())
        return total

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
        self,
        wanted: CountFilter,
        *,
        after: tuple[datetime, str] | None = None,
        limit: int = 500,
        newest: bool = False,
    ) -> list[CountedException]:
        """A page of the exceptions by time."""
        pages = [
            await queue.find_exceptions(wanted, after=after, limit=limit, newest=newest)
            for queue in self._queues
        ]
        return sorted((one for page in pages for one in page), reverse=newest)[:limit]

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

    async def find_events(
        self,
        wanted: EventFilter,
        *,
        after: int = 0,
        limit: int = 300,
        ascending: bool = True,
        patience: timedelta | None = None,
    ) -> list[StoredEvent]:
        """A page of the events that match."""
        began = time.monotonic()
        if after:
            cuts = [_beside(cut, ascending) for cut in _read(after, len(self._queues))]
            starts = [_start(cut, ascending) for cut in cuts]
        else:
            ends = await asyncio.gather(*map(_end, self._queues))
            cuts, starts = [], [0] * len(self._queues)
        found: list[StoredEvent] = []
        while True:
            some = (limit - len(found)) // len(self._queues) + 1
            pages = await asyncio.gather(
                *(
                    queue.find_events(
                        wanted, after=start, limit=some, ascending=ascending, patience=patience
                    )
                    for queue, start in zip(self._queues, starts, strict=True)
                )
            )
            if not cuts:
                beginnings = zip(pages, ends, strict=True)
                cuts = [_beginning(page, end, ascending) for page, end in beginnings]
            hurried = patience is not None and time.monotonic() - began >= patience.total_seconds()
            goes_on = [bool(page) and (hurried or len(page) == some) for page in pages]
            found += _by_time(pages, cuts, limit - len(found), ascending, goes_on)
            if hurried or len(found) == limit or not any(goes_on):
                return found
            starts = [_start(cut, ascending) for cut in cuts]


async def _end(queue: QueueView) -> int:
    """The number of a queue's newest event, 0 where it has none."""
    newest = await queue.find_events(EventFilter(), limit=1, ascending=False)
    return newest[0].seq if newest else 0


def _in_order(
    pages: Sequence[Sequence[ListedMessage]], limit: int
) -> tuple[list[ListedMessage], str | None]:
    """The messages of several pages up to where all reach; and that place, None: the end."""
    found = sorted((item for page in pages for item in page), key=lambda item: item.queue_id)
    # Behind the end of a full page its queue may have more, which come first.
    reached = min((page[-1].queue_id for page in pages if more_follows(page, limit)), default=None)
    return [item for item in found if reached is None or item.queue_id <= reached], reached


# The place of a listing in a queue is a cut: twice an event's number is that event itself, one more
# or less is the place just behind or before it. The cuts of all queues are written as one number,
# with the cut of the event that was given last in the lowest place: so one more or less is the
# place beside this event, as with a queue's own numbers.

_CUT_BITS = 48
_MIDDLE = 1 << (_CUT_BITS - 1)


def _written(cuts: Sequence[int], told: int) -> int:
    number = told
    for cut in (*cuts[:told], *cuts[told + 1 :], cuts[told]):
        number = number << _CUT_BITS | (cut + _MIDDLE)
    return number


def _read(number: int, count: int) -> list[int]:
    """The cuts of so many queues; of a number that is none, some."""
    cuts = []
    for _ in range(count):
        cuts.append((number & ((1 << _CUT_BITS) - 1)) - _MIDDLE)
        number >>= _CUT_BITS
    last, *others = cuts
    others.reverse()
    others.insert(number % count, last)
    return others


def _beside(cut: int, ascending: bool) -> int:
    """The place just behind an event, in the direction of the listing."""
    if cut % 2:
        return cut
    return cut + 1 if ascending else cut - 1


def _start(cut: int, ascending: bool) -> int:
    """Where a queue goes on behind a cut; 0, which would be its beginning, is no event's number."""
    number = cut // 2 if ascending else -(-cut // 2)
    return number or (-1 if ascending else 1)


def _beginning(page: Sequence[StoredEvent], end: int, ascending: bool) -> int:
    """The cut before a first page; where nothing matches, behind what the queue had until `end`."""
    if not page:
        return 2 * end + 1
    return 2 * page[0].seq + (-1 if ascending else 1)


def _by_time(
    pages: Sequence[Sequence[StoredEvent]],
    cuts: list[int],
    limit: int,
    ascending: bool,
    goes_on: Sequence[bool],
) -> list[StoredEvent]:
    """At most `limit` events of the pages; `cuts` then stand behind them.

    `goes_on`: behind a page its queue may have more, which comes before others' events.
    """
    found: list[StoredEvent] = []
    left = [deque(page) for page in pages]
    pick = min if ascending else max
    while len(found) < limit and any(left):
        if any(more and not rest for more, rest in zip(goes_on, left, strict=True)):
            break
        queue = pick(
            (number for number, page in enumerate(left) if page),
            key=lambda n: (left[n][0].event.at, n),
        )
        one = left[queue].popleft()
        cuts[queue] = 2 * one.seq
        found.append(StoredEvent(_written(cuts, queue), one.event))
        cuts[queue] = _beside(cuts[queue], ascending)
    return found
